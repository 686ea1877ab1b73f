"""Frozen models of one modality: what they open, how they read, and what tells them apart."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import protoclip
from protoclip.config import ModelConfig, TextTowerConfig
from protoclip.data.pairs import Sample
from protoclip.data.transforms import MiddleTransform
from protoclip.encode.encoder import Encoder, open_encoder, text_encoder
from protoclip.models.loading import MAX_TOKENS
from protoclip.models.open_clip import open_clip_tokenizer
from protoclip.models.start import resolve_start

sys.path.append(str(Path(__file__).parents[2]))
from tiny_hugging_face import save_bert, save_dual_encoder, save_mpnet, save_roberta
from tiny_starts import CLIP

CAPTIONS = ["a dog", "a", "the red fox jumps over a lazy dog and over the river"]
CPU = torch.device("cpu")


def opened(teacher: str, modality: str = "auto", pooling: Any = "mean") -> Encoder:
    return open_encoder(teacher, modality=modality, pooling=pooling, device=CPU)


def prepared(encoder: Encoder, image: Image.Image) -> Tensor:
    """The input of an image."""
    file = io.BytesIO()
    image.save(file, "PNG")
    sample = Sample(sample_id="a", image=file.getvalue(), captions=(), where="")
    pixels: Tensor = encoder.prepare(sample)
    return pixels


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a BERT of random weights that reads letters."""
    pytest.importorskip("transformers")
    return str(save_bert(tmp_path_factory.mktemp("bert"), max_position_embeddings=64))


@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler"])
def test_padding_does_not_change_a_feature(bert, pooling):
    """In a batch each caption gets the unit-norm feature that it gets alone in float64."""
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel.from_pretrained(bert).double().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    expected = []
    for caption in CAPTIONS:
        with torch.no_grad():
            out = model(tokenizer(caption, return_tensors="pt")["input_ids"])
        states = out.last_hidden_state[0]
        one = {"mean": states.mean(0), "cls": states[0], "pooler": out.pooler_output[0]}[pooling]
        expected.append(one / one.norm())
    encoder = opened(f"hf:{bert}", pooling=pooling)
    assert (encoder.width, encoder.reads) == (32, "text")
    long, longer = encoder.encode(["dog " * 30 + "a", "dog " * 30 + "a fox"])  # the model's limit
    torch.testing.assert_close(long, longer)
    found = encoder.encode(CAPTIONS).double()
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-6, rtol=0)


def test_a_model_without_pooler_is_refused(bert, tmp_path):
    """Weights that the files lack would be random. Other poolings do not need them."""
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel.from_pretrained(bert, add_pooling_layer=False)
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"pooling 'pooler' needs pooler.*files do not hold"):
        opened(f"hf:{tmp_path}", pooling="pooler")
    first, second = opened(f"hf:{tmp_path}"), opened(f"hf:{tmp_path}")
    torch.testing.assert_close(first.encode(CAPTIONS), opened(f"hf:{bert}").encode(CAPTIONS))
    assert first.checksum() == second.checksum()
    next(second.module.parameters()).data[0, 0] += 1e-3
    assert first.checksum() != second.checksum()


def test_timm_models_give_pooled_features(tmp_path):
    """With the model's own transform and without its classifier. The weights may be in a file."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t").eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    encoder = opened(f"timm:resnet10t/{tmp_path}/weights.safetensors")
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    inputs = transform(Image.fromarray(pixels))
    expected = model.forward_features(inputs[None]).mean((2, 3))[0]
    assert (encoder.width, encoder.reads) == (512, "image")
    found = encoder.encode([prepared(encoder, Image.fromarray(pixels))])[0]
    torch.testing.assert_close(found, expected / expected.norm())
    long = Image.fromarray(np.tile(pixels, (1, 9, 1)))
    torch.testing.assert_close(prepared(encoder, long), MiddleTransform(transform)(long))
    assert encoder.facts() == repr(transform)  # or all would be encoded anew
    save_file({"fc.weight": torch.ones(3)}, tmp_path / "others.safetensors")
    with pytest.raises(ValueError, match=r"cannot be opened .*others.safetensors lacks conv1"):
        opened(f"timm:resnet10t/{tmp_path}/others.safetensors")


def test_open_clip_models_give_either_tower(tmp_path, monkeypatch):
    """The image tower unless text is asked. The weights may be in a file."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", CLIP)
    model, transform, _ = protoclip.load("open_clip:tiny")
    towers: Any = model.towers
    tokenizer = open_clip_tokenizer(open_clip.get_model_config("tiny")["text_cfg"])
    torch.save(towers.state_dict(), tmp_path / "weights.pt")
    image = opened(f"open_clip:tiny/{tmp_path}/weights.pt")
    text = opened(f"open_clip:tiny/{tmp_path}/weights.pt", modality="text")
    assert (image.reads, text.reads) == ("image", "text")
    pixels = prepared(image, Image.new("RGB", (300, 260), (200, 30, 90)))
    tokens = tokenizer(CAPTIONS)
    assert pixels.tolist()[0][0] == [200, 30, 90]
    whole = transform(Image.new("RGB", (300, 260), (200, 30, 90)))
    expected = towers.encode_image(whole[None], normalize=True)
    torch.testing.assert_close(image.encode([pixels]), expected)
    torch.testing.assert_close(text.encode(CAPTIONS), towers.encode_text(tokens, normalize=True))


def test_a_model_of_transformers_with_two_towers_gives_either(tmp_path):
    folder = save_dual_encoder(tmp_path)
    image, text = opened(f"hf:{folder}"), opened(f"hf:{folder}", modality="text")
    assert (image.reads, text.reads) == ("image", "text")
    model, _, tokenizer = protoclip.load(f"hf:{folder}")
    expected = model.encode_text(tokenizer(CAPTIONS), normalize=True)
    torch.testing.assert_close(text.encode(CAPTIONS), expected)


@pytest.mark.parametrize(
    ("teacher", "modality", "message"),
    [
        ("open_clip:RN50", "auto", "name the weights too, as in open_clip:RN50/openai"),
        ("open_clip:RN51/openai", "auto", "open_clip has no model 'RN51'"),
        ("timm:resnet10t,weights=x.pt", "auto", "is named as in timm:resnet50/FILE"),
        ("timm:resnet10x", "auto", r"timm:resnet10x: cannot be opened \(Unknown model"),
        ("hf:{folder}", "auto", "Unrecognized model"),
        ("minilm", "auto", r"minilm: pip install 'protoclip\[teachers\]'"),
        ("hf:{bert}", "image", r"cannot be opened \(reads text only"),
        ("timm:resnet10t", "text", "--modality text: timm:resnet10t reads image only"),
    ],
)
def test_what_cannot_be_opened_is_named(teacher, modality, message, bert, tmp_path, monkeypatch):
    if teacher == "minilm":
        monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
        opened(teacher.format(folder=tmp_path, bert=bert), modality)


def test_a_tokenizer_that_reads_otherwise_is_another_encoder():
    """Over the same weights: as with capitals kept that were not before."""

    def key(tokenizer: Callable[[str], str]) -> str:
        def collate(texts: list[str]) -> Tensor:
            codes = [[ord(letter) % 97 for letter in tokenizer(text)[:60]] for text in texts]
            return torch.tensor([(code + 60 * [0])[:60] for code in codes], dtype=torch.float32)

        torch.manual_seed(0)
        encoder = text_encoder(nn.Linear(60, 4), CPU, collate, lambda x: x[:, :4])
        return encoder.key()

    def plain(text: str) -> str:
        return text

    assert len({key(plain), key(str.lower), key(lambda text: text.replace("ï", "i"))}) == 3
    assert key(plain) == key(plain)


@pytest.mark.parametrize("save", [save_bert, save_mpnet, save_roberta])
def test_a_long_caption_is_cut_to_the_positions_of_the_model(save, tmp_path):
    """RoBERTa and MPNet have two more, which no token gets."""
    folder = save(tmp_path)
    teacher = open_encoder(
        f"hf:{folder}", modality="auto", pooling="mean", device=torch.device("cpu")
    )
    long, longer = teacher.encode(["a dog " * 11, "a dog " * MAX_TOKENS])  # 24 tokens of both
    torch.testing.assert_close(long, longer)
    assert teacher.encode(["a dog " * MAX_TOKENS]).isfinite().all()
    section = ModelConfig(text=TextTowerConfig(name=str(folder)))
    assert resolve_start(section).context_length == 24
