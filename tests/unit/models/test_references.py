"""Models of other libraries: their features are the libraries' own, and nothing they bring runs."""

import json
import pickle
import re
import string
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
import transformers
from huggingface_hub.errors import RepositoryNotFoundError
from PIL import Image
from safetensors.torch import save_file
from transformers import ViTConfig, ViTModel

import protoclip
from protoclip.cli import main
from protoclip.config import HeadConfig, ModelConfig
from protoclip.data import access
from protoclip.data.captions import trim_padding
from protoclip.data.transforms import (
    EvaluationTransform,
    LibraryTransform,
    PillowTransform,
    SquashTransform,
)
from protoclip.models.protoclip import ProtoCLIP, projection_head
from protoclip.models.start import resolve_start
from protoclip.models.transformers import describe_preprocessing, transform_of
from tiny_hugging_face import save_bert, save_dual_encoder, save_siglip
from tiny_starts import CLIP, save_open_clip

TEXTS = ["a red square", "b", "a photo of two green corners on a very long stripe"]
PIXELS = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
# Their centre crops begin at whole pixels, also once they are resized.
IMAGES = [Image.fromarray(PIXELS[:64]), Image.fromarray(PIXELS[:96, :64]), Image.new("RGB", (9, 9))]
ROUNDING = 0.04  # about 2 of 255 steps, on the scale that models read


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> open_clip.CLIP:
    """open_clip's model `tiny`; its weights `mine` were trained with QuickGELU."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", CLIP)
    model = open_clip.create_model("tiny", force_quick_gelu=True).eval()
    file = tmp_path / "mine.safetensors"
    save_file(model.state_dict(), file)
    tag = {"file": str(file), "quick_gelu": True, "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"mine": tag})
    return model


def assert_same_inside(found: torch.Tensor, expected: torch.Tensor) -> None:
    """The same pixels, as far as resizing before the crop does not mix in what is outside."""
    inside = (..., slice(3, -3), slice(3, -3))
    torch.testing.assert_close(found[inside], expected[inside], atol=ROUNDING, rtol=0)


def assert_same_features(loaded: Any, image_features: Any, text_features: Any) -> None:
    """Features of `IMAGES` and `TEXTS`; with `normalize` these have unit norm."""
    model, transform, tokenizer = loaded
    assert not model.training
    with torch.no_grad():
        images, tokens = torch.stack([transform(image) for image in IMAGES]), tokenizer(TEXTS)
        pairs = (
            (model.encode_image, images, image_features),
            (model.encode_text, tokens, text_features),
        )
        for encode, inputs, expected in pairs:
            assert encode(inputs).dtype == torch.float32
            torch.testing.assert_close(encode(inputs), expected, atol=1e-5, rtol=1e-5)
            unit = torch.nn.functional.normalize(expected, dim=-1)
            torch.testing.assert_close(encode(inputs, normalize=True), unit, atol=1e-5, rtol=1e-5)
            assert not torch.allclose(expected, unit)


@pytest.mark.parametrize(
    ("preprocessing", "kind"),
    [
        ({"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}, PillowTransform),
        ({"resize_mode": "squash", "interpolation": "bilinear"}, LibraryTransform),
        ({"interpolation": "bilinear"}, LibraryTransform),
        ({"resize_mode": "longest"}, LibraryTransform),
    ],
)
def test_an_open_clip_folder(preprocessing, kind, tmp_path):
    folder = save_open_clip(tmp_path / "model", **preprocessing)
    loaded = protoclip.load(f"local-dir:{folder}")
    library, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    library.eval()
    transform = loaded[1]
    assert isinstance(transform, kind)
    images = torch.stack([preprocess(image) for image in IMAGES])
    found = torch.stack([transform(image) for image in IMAGES])
    assert torch.equal(found, images)
    between_pixels = Image.fromarray(PIXELS[:33, :48])  # where the crop of the resized one begins
    assert torch.equal(transform(between_pixels), preprocess(between_pixels))
    again = pickle.loads(pickle.dumps(transform))
    assert repr(again) == repr(transform) == repr(protoclip.load(folder)[1])
    torch.testing.assert_close(again(IMAGES[0]), images[0])
    with torch.no_grad():
        tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
        expected_text = library.encode_text(tokens, normalize=False)
        assert_same_features(loaded, library.encode_image(images, normalize=False), expected_text)


def test_an_open_clip_name_is_untrained_and_the_same_each_time(tiny, capsys):
    state = torch.get_rng_state()
    first, transform, _ = protoclip.load("open_clip:tiny")
    note = "note: open_clip:tiny: untrained; no weights are named\n"
    assert capsys.readouterr().err == note
    torch.manual_seed(7)
    second = protoclip.load("open_clip:tiny")[0]
    assert transform.size == 32
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    torch.set_rng_state(state)
    protoclip.load("open_clip:tiny")
    assert torch.equal(state, torch.get_rng_state())


def test_published_weights_get_their_own_activation_and_normalisation(tiny, capsys):
    """open_clip warns that `tiny` has another activation than `mine`, and goes on with it."""
    loaded = protoclip.load("open_clip:tiny/mine")
    assert loaded[1] == PillowTransform(size=32, mean=(0.5,) * 3, std=(0.2,) * 3)
    assert capsys.readouterr().err == ""
    with torch.no_grad():
        images = torch.stack([loaded[1](image) for image in IMAGES])
        tokens = open_clip.get_tokenizer("tiny")(TEXTS)
        assert_same_features(loaded, tiny.encode_image(images), tiny.encode_text(tokens))
        # Those of a run that began from such weights are loaded into new ones.
        again = resolve_start(ModelConfig(name="tiny", pretrained="mine")).build_towers()
        again.load_state_dict(tiny.state_dict())
        torch.testing.assert_close(again.encode_text(tokens), tiny.encode_text(tokens))


@pytest.mark.parametrize(("heads", "prefix"), [(True, "module."), (False, "")])
def test_a_checkpoint_of_the_reference_code(heads, prefix, tiny, tmp_path):
    """With QuickGELU; the projection heads are there if the file has them."""
    own = ProtoCLIP(tiny, projection_head(16, HeadConfig(hidden_dim=24, projection_dim=8))).eval()
    weights = dict(tiny.state_dict())
    if heads:
        for name in ("image", "text"):
            head = getattr(own, f"{name}_head")
            torch.nn.init.normal_(head[0].weight)
            weights |= {f"{name}_projection_head.{k}": v for k, v in head.state_dict().items()}
        weights["logit_scale_proto"] = torch.tensor(1.5)
    file = tmp_path / "epoch_latest.pt"
    content = {prefix + key: value for key, value in weights.items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": content}, file)
    loaded = protoclip.load(f"reference:{file},model=tiny")
    model, transform, tokenizer = loaded
    with torch.no_grad():
        images, tokens = torch.stack([transform(image) for image in IMAGES]), tokenizer(TEXTS)
        assert_same_features(loaded, tiny.encode_image(images), tiny.encode_text(tokens))
        assert isinstance(model, ProtoCLIP) == heads
        if heads:
            expected, found = own(images, tokens), model(images, tokens)
            torch.testing.assert_close(found.image_projections, expected.image_projections)
            torch.testing.assert_close(found.text_projections, expected.text_projections)
            assert found.prototype_logit_scale.log().item() == pytest.approx(1.5)
    del content[f"{prefix}logit_scale"]
    torch.save({"state_dict": {**content, f"{prefix}extra.weight": torch.ones(1)}}, file)
    with pytest.raises(ValueError, match=r"cannot be opened \(Error.* in loading state_dict"):
        protoclip.load(f"reference:{file},model=tiny")


def clip_tokenizer() -> Any:
    """One token a letter."""
    letters = string.ascii_lowercase
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {name: number for number, name in enumerate(names)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


IMAGE = {
    **{"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "image_size": 32, "patch_size": 8},
}
TEXT = {
    **{"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "max_position_embeddings": 24, "vocab_size": 60},
    **{"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53},
}
SQUARE = {"height": 32, "width": 32}


def save_hugging_face(kind: str, folder: Path) -> tuple[Any, Any, Any]:
    """A tiny model with random weights, its tokenizer and its image processor, also saved.

    The text towers of dual encoders are models of any kind; these two pool differently.
    """
    torch.manual_seed(0)
    if kind in ("siglip", "dual_bert"):
        {"siglip": save_siglip, "dual_bert": save_dual_encoder}[kind](folder)
        auto = (transformers.AutoModel, transformers.AutoTokenizer, transformers.AutoImageProcessor)
        model, tokenizer, processor = (kind.from_pretrained(folder) for kind in auto)
        return model.eval(), tokenizer, processor
    tokenizer: Any = clip_tokenizer()
    if kind == "clip":
        config = transformers.CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=16)
        model: Any = transformers.CLIPModel(config)
        processor: Any = transformers.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size=SQUARE, image_mean=[0.1, 0.2, 0.3]
        )
    elif kind == "siglip2":
        text, image = {**TEXT, "projection_size": 32}, {**IMAGE, "num_patches": 16}
        model = transformers.Siglip2Model(
            transformers.Siglip2Config(text_config=text, vision_config=image)
        )
        tokenizer.padding_side = "right"
        processor = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    else:
        model = transformers.VisionTextDualEncoderModel(
            transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
                transformers.ViTConfig(**IMAGE),
                transformers.CLIPTextConfig(**TEXT),
                projection_dim=16,
            )
        )
        processor = transformers.ViTImageProcessor(size=SQUARE)
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    # transformers may open a tokenizer as the class that it expects of the model.
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder), processor


def features(outputs: Any) -> torch.Tensor:
    return getattr(outputs, "pooler_output", outputs)


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2", "dual_bert", "dual_clip"])
def test_a_hugging_face_model(kind, tmp_path):
    """Features as from its own processor and tokenizer, used as the model was trained."""
    library, tokenizer, processor = save_hugging_face(kind, tmp_path)
    loaded = protoclip.load(f"hf:{tmp_path}")
    images = dict(processor(IMAGES, return_tensors="pt"))
    if kind in ("clip", "dual_bert"):  # whose transforms are ours
        assert (loaded[1].mean == (0.1, 0.2, 0.3)) == (kind == "clip")
        found = torch.stack([loaded[1](image) for image in IMAGES])
        assert_same_inside(found, images["pixel_values"])
        images = {"pixel_values": found}
    again = pickle.loads(pickle.dumps(loaded[1]))
    torch.testing.assert_close(again(IMAGES[1]), loaded[1](IMAGES[1]))
    assert repr(again) == repr(loaded[1]) == repr(protoclip.load(tmp_path)[1])
    assert loaded[2](TEXTS[:1]).shape == (1, 24)
    settings = {"truncation": True, "max_length": 24, "return_tensors": "pt"}
    if kind.startswith("siglip"):
        tokens = {"input_ids": tokenizer(TEXTS, padding="max_length", **settings)["input_ids"]}
    else:
        tokens = tokenizer(TEXTS, padding=True, **settings)
    with torch.no_grad():
        expected_text = features(library.get_text_features(**tokens))
        assert_same_features(loaded, features(library.get_image_features(**images)), expected_text)
        assert loaded[0].ignores_padding == (not kind.startswith("siglip"))
        if loaded[0].ignores_padding:
            tokens = loaded[2](["a dog", "red"])
            short = trim_padding(tokens)
            assert short.shape[1] < 24
            encode = loaded[0].encode_text
            torch.testing.assert_close(encode(short), encode(tokens))


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"size": SQUARE, "crop_size": SQUARE}, SquashTransform),  # which cuts nothing off
        ({"size": SQUARE, "do_center_crop": False}, SquashTransform),
        ({"size": {"shortest_edge": 32}, "crop_size": SQUARE}, EvaluationTransform),
        ({"size": {"height": 40, "width": 40}, "crop_size": SQUARE}, None),
    ],
)
def test_what_squashes_images_is_known_by_its_settings(settings, kind):
    """Of the last kind a run keeps neither; it crops."""
    processor = transformers.CLIPImageProcessor(**settings)
    theirs = transform_of(processor)
    said = describe_preprocessing(processor, theirs)
    assert (said["resize_mode"] == "squash") is (kind is SquashTransform)
    if kind is not None:
        ours = kind(size=said["size"], mean=tuple(said["mean"]), std=tuple(said["std"]))
        assert_same_inside(ours(IMAGES[1]), theirs(IMAGES[1]))


def refuse(self: Any, name: str, **settings: Any) -> None:
    raise RepositoryNotFoundError("404", response=MagicMock())


def pickled(self: Any, name: str, **settings: Any) -> Any:
    return SimpleNamespace(siblings=[SimpleNamespace(rfilename="pytorch_model.bin")])


def of_open_clip(self: Any, name: str, **settings: Any) -> Any:
    return SimpleNamespace(siblings=[SimpleNamespace(rfilename="open_clip_config.json")])


@pytest.mark.parametrize(
    ("answer", "reference", "message"),
    [
        (refuse, "hf:nobody/nothing", "the hub has no model 'nobody/nothing', or only for those"),
        (pickled, "hf:nobody/nothing", "pytorch_model.bin is pickled and could run code"),
        (of_open_clip, "hf:nobody/nothing", "is open_clip's; download the repository, and load"),
    ],
)
def test_what_the_hub_answers_is_one_line_within_seconds(
    answer, reference, message, monkeypatch, tmp_path
):
    monkeypatch.setattr(access, "HUB_SECONDS", 0.1)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", answer)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        protoclip.load(reference)
    assert str(error.value).startswith(f"{reference}: ")
    assert "\n" not in str(error.value)
    assert time.monotonic() - start < 25
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


class Hostile:
    """Unpickling it makes the file `ran`."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> Any:
        return (Path.touch, (self.ran,))


def save_pickle(file: Path) -> None:
    file.write_bytes(pickle.dumps({"state_dict": Hostile(file.with_name("ran"))}, protocol=2))


def add_code(folder: Path, *names: str) -> Path:
    """Let the JSON files of a folder ask for classes of a module beside, which makes `ran`."""
    ran = folder.parent / "ran"
    (folder / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass Evil: pass\n"
    )
    kinds = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoImageProcessor", "AutoProcessor")
    for name in names:
        file = folder / name
        settings = json.loads(file.read_text()) if file.exists() else {}
        settings["auto_map"] = dict.fromkeys(kinds, "evil.Evil")
        file.write_text(json.dumps(settings))
    return folder


def with_code_and_pickles(save: Callable[[Path], Path], folder: Path) -> str:
    """A good model, beside which lie code and pickled weights."""
    add_code(
        save(folder / "model"), "config.json", "tokenizer_config.json", "preprocessor_config.json"
    )
    save_pickle(folder / "model" / "pytorch_model.bin")
    return str(folder / "model")


@pytest.mark.parametrize("save", [save_siglip, save_dual_encoder])
def test_a_good_model_with_code_beside_it_opens_without_the_code(save, tmp_path):
    start = with_code_and_pickles(save, tmp_path)
    protoclip.load(start)
    protoclip.export(start, tmp_path / "out", ["hf"])
    with pytest.raises(SystemExit):
        main(["train", "--model.start", start, "--data.train", "none.tsv"])
    assert not list(tmp_path.rglob("ran"))
    assert not [*(tmp_path / "out").rglob("*.py"), *(tmp_path / "out").rglob("*.bin")]


def of_unknown_kind(folder: Path) -> str:
    model = save_siglip(folder / "model")
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "model_type": "evil"}))
    return str(add_code(model, "config.json"))


def with_text_tower(folder: Path) -> str:
    """Its text tower is elsewhere, of a kind that brings its own code."""
    bert = save_bert(folder / "bert")
    text = {"context_length": 12, "hf_model_name": str(bert), "hf_proj_type": "linear"}
    model = save_open_clip(folder / "model", {**CLIP, "text_cfg": text})
    (bert / "config.json").write_text(json.dumps({"model_type": "evil"}))
    add_code(bert, "config.json")
    return str(model)


def pickled_hugging_face(folder: Path) -> str:
    model = save_siglip(folder / "model")
    (model / "model.safetensors").unlink()
    save_pickle(model / "pytorch_model.bin")
    return str(model)


def reference_code(folder: Path) -> str:
    save_pickle(folder / "epoch.pt")
    return f"reference:{folder / 'epoch.pt'},model=RN50"


def adapter(folder: Path) -> str:
    """A good model, beside which lies what peft writes, but pickled."""
    pytest.importorskip("peft")  # without it transformers looks for no adapters
    model = save_siglip(folder / "model")
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(model), "r": 2}
    (model / "adapter_config.json").write_text(json.dumps(settings))
    save_pickle(model / "adapter_model.bin")
    return str(model)


WRONG: dict[Callable[[Path], str], str] = {
    of_unknown_kind: "needs its own code, which never runs here; choose another model",
    with_text_tower: "needs its own code, which never runs here; choose another model",
    pickled_hugging_face: "pytorch_model.bin is pickled and could run code; convert it to safetens",
    reference_code: "holds more than tensors, which could run code and is not read; save its",
    adapter: "cannot be opened (",
}


def test_no_question_asks_whether_to_run_a_tokenizer(tmp_path, monkeypatch, capsys):
    """A model of a kind that has none, whose folder names a class beside it."""
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=32)
    model = tmp_path / "model"
    ViTModel(config, add_pooling_layer=False).save_pretrained(model)
    add_code(model)
    tokenizer = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(SystemExit):
        main(["embed-teacher", "--teacher", f"hf:{model}", "--out", str(tmp_path / "out")])
    assert not list(tmp_path.rglob("ran"))
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("command", ["export {} {}/out", "train --model.start {} --run.out {}/out"])
@pytest.mark.parametrize("make", WRONG)
def test_what_cannot_be_opened_is_one_line(make, command, tmp_path, capsys):
    """No code runs, and nothing is left."""
    reference = make(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(command.format(reference, tmp_path).split())
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("protoclip: error: ")
    assert WRONG[make] in said[-1]
    assert all(text.startswith("note: ") for text in said[:-1])
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert not list(tmp_path.rglob("ran"))


def test_the_pickle_is_hostile(tmp_path):
    """Read as a pickle, it runs; so the tests above can fail."""
    save_pickle(tmp_path / "a.bin")
    pickle.loads((tmp_path / "a.bin").read_bytes())
    assert (tmp_path / "ran").exists()
