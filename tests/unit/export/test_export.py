"""Exported folders: each library computes what the model does, from the folder alone."""

import gzip
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from exported import assert_close, blocks_of, run_code, run_examples, save_run
from PIL import Image

import protoclip
from protoclip.cli import main
from protoclip.config import ImageTowerConfig
from protoclip.export import huggingface, run
from protoclip.export.card import write_examples
from protoclip.files import read_json
from protoclip.models.open_clip import clip_tokenizer
from protoclip.models.opening import PICKLED
from testing import tiny_model
from tiny_hugging_face import save_bert, save_dual_encoder, save_siglip

TEXTS = ["a red square", "It's 2 cats, & a dog!", "a photo of two green corners on a long stripe"]
TEXTS += ["it’s “x”", "a &amp; b", "m&#39;s &amp;lt;b", "ﬁ Ｔ &#150; ﾊﾟ"]
PIXELS = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
IMAGES = [Image.fromarray(PIXELS).resize((64, 64)), Image.new("RGB", (48, 48), "gold")]
ALL = ("open_clip", "hf", "timm")
MERGES = 90  # of CLIP's 48,894, which take a second to read; the named models have no more
TEXT = {"context_length": 12, "width": 32, "heads": 2, "layers": 2, "vocab_size": 514 + MERGES}
VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
CLIP = {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "patch_size": None}
TIMM = {"timm_model_name": "test_vit", "image_size": 160}
SIGLIP = {
    "embed_dim": 64,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {**TIMM, "timm_pool": "avg", "timm_proj": "none"},
    "text_cfg": {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
}
NAMED: dict[str, dict[str, Any]] = {
    "clip": CLIP,
    "clip-quickgelu": {**CLIP, "quick_gelu": True},
    "resnet": {**CLIP, "vision_cfg": RESNET},
    "timm": {**CLIP, "vision_cfg": TIMM},
    "sig": SIGLIP,
    "hf-text": {
        **CLIP,
        "vision_cfg": TIMM,
        "text_cfg": {"hf_proj_type": "linear", "context_length": 12},
    },
}
NO_HF = (
    "transformers needs CLIP's text tower, CLIP's or timm's image tower with a linear projection, "
    "and no logit bias"
)
# Formats that a model has, and why it has no others.
MATRIX: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "run": ({"open_clip": "CLIP", "hf": "VisionTextDualEncoderModel", "timm": "test_resnet"}, {}),
    "run-vit": (
        {"hf": "VisionTextDualEncoderModel", "timm": "test_vit"},
        {"open_clip": "it builds test_vit for images of 160 pixels alone, not 32"},
    ),
    "clip": ({"open_clip": "CLIP", "hf": "CLIPModel", "timm": "vit_base_patch32_clip_224"}, {}),
    "clip-quickgelu": (
        {"open_clip": "CLIP", "hf": "CLIPModel", "timm": "vit_base_patch32_clip_quickgelu_224"},
        {},
    ),
    "resnet": (
        {"open_clip": "CLIP"},
        {
            "hf": NO_HF,
            "timm": "timm has no CLIP ResNet of (1, 1, 1, 1) blocks",
        },
    ),
    "timm": ({"open_clip": "CLIP", "hf": "VisionTextDualEncoderModel", "timm": "test_vit"}, {}),
    "sig": (
        {"open_clip": "CustomTextCLIP", "timm": "test_vit"},
        {"hf": NO_HF},
    ),
    "hf-text": (
        {"open_clip": "CustomTextCLIP", "timm": "test_vit"},
        {"hf": NO_HF},
    ),
}


@pytest.fixture
def reference(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], str]]:
    """Makes a tiny model of a kind, whose tokenizer knows few words, and returns its reference."""
    base = tmp_path_factory.mktemp("models")
    build = open_clip.SimpleTokenizer.__init__
    with gzip.open(build.__defaults__[0]) as file:
        lines = file.read().split(b"\n")[: MERGES + 1]
    with gzip.open(base / "merges.gz", "w") as file:
        file.write(b"\n".join(lines))
    for name, config in NAMED.items():
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)

    def make(kind: str) -> str:
        if kind == "run":
            return str(save_run(base / kind, tiny_model()))
        if kind == "run-vit":
            image = ImageTowerConfig(name="test_vit", size=32)
            return str(save_run(base / kind, replace(tiny_model(), image=image)))
        monkeypatch.setattr(build, "__defaults__", (base / "merges.gz", *build.__defaults__[1:]))
        clip_tokenizer.cache_clear()  # of all words
        if kind == "hf-text":
            bert = str(save_bert(base / "bert"))
            text = {**NAMED[kind]["text_cfg"], "hf_model_name": bert, "hf_tokenizer_name": bert}
            config = {**NAMED[kind], "text_cfg": text}
            monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, kind, config)
        return f"open_clip:{kind}"

    clip_tokenizer.cache_clear()
    yield make
    clip_tokenizer.cache_clear()  # of few words


def expected(
    reference: str, normalize: bool = False, pixels_of: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of `IMAGES` and `TEXTS`. An exported model crops as open_clip does, a run does not
    quite; `pixels_of` names the model whose transform is used."""
    model, transform, tokenizer = protoclip.load(reference)
    if pixels_of is not None:
        _, transform, _ = protoclip.load(pixels_of)
    images = torch.stack([transform(image) for image in IMAGES])
    with torch.no_grad():
        return (
            model.encode_image(images, normalize=normalize),
            model.encode_text(tokenizer(TEXTS), normalize=normalize),
        )


@pytest.mark.parametrize("kind", MATRIX)
def test_a_model_has_the_formats_that_compute_the_same(kind, reference, tmp_path):
    """Each library was asked for the features; `protoclip.load` is asked here."""
    formats, reasons = MATRIX[kind]
    model, folder = reference(kind), tmp_path / "out"
    facts = protoclip.export(model, folder, ALL)
    assert facts["formats"] == formats
    assert facts["left_out"] == reasons
    if "open_clip" in formats:  # which looks by this path for a text encoder that is on no hub
        text = read_json(folder / "open_clip_config.json")["model_cfg"]["text_cfg"]
        assert facts["names_its_path"] == (text.get("hf_model_name") == str(folder))
        card = (folder / "README.md").read_text()
        assert facts["names_its_path"] == ("change both there if the folder moves" in card)
    assert facts["differences"].keys() == {*formats, "protoclip"}
    for name, found in facts["differences"].items():
        assert found["image"] < 1e-5
        assert (found["text"] is None) == (name == "timm")
        assert name == "timm" or found["text"] < 1e-5
    again = expected(str(folder), pixels_of=model)
    for found, wanted in zip(again, expected(model), strict=True):
        assert_close(found, wanted)
    files = sorted(path.name for path in folder.rglob("*.safetensors"))
    names = {"open_clip": "open_clip_model.safetensors"}
    assert files == sorted(names.get(name, "model.safetensors") for name in formats)
    assert not [path for path in folder.rglob("*") if path.suffix in PICKLED]


@pytest.mark.parametrize("kind", ["run", "clip-quickgelu"])
def test_each_library_prepares_images_and_captions_alike(kind, reference, tmp_path):
    """Their resizing rounds otherwise, by a few of 255 steps."""
    model, folder = reference(kind), tmp_path / "out"
    protoclip.export(model, folder, ALL)
    image, text = expected(model)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    inputs = processor(
        text=TEXTS, images=IMAGES, padding="max_length", truncation=True, return_tensors="pt"
    )
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    library, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    tower = timm.create_model(f"local-dir:{folder}/timm", pretrained=True).eval()
    settings = timm.data.resolve_model_data_config(tower)
    prepare = timm.data.create_transform(**settings, is_training=False)
    with torch.no_grad():
        outputs = theirs(**inputs)
        unit = torch.nn.functional.normalize
        assert_close(unit(outputs.image_embeds), unit(image), 0.01)
        assert_close(unit(outputs.text_embeds), unit(text))
        library.eval()
        pixels = torch.stack([preprocess(image) for image in IMAGES])
        assert_close(library.encode_image(pixels), image, 0.01)
        assert_close(library.encode_text(tokens), text)
        pixels = torch.stack([prepare(image) for image in IMAGES])
        assert_close(tower(pixels), image, 0.01)
    assert theirs.logit_scale.item() == pytest.approx(library.logit_scale.item())


@pytest.mark.parametrize(
    ("preprocessing", "why_not"),
    [
        ({"resize_mode": "squash", "interpolation": "bilinear", "mean": [0.1, 0.2, 0.3]}, ""),
        ({"resize_mode": "squash"}, ""),
        ({"resize_mode": "longest"}, "no image processor resizes images as it does (longest, bi"),
    ],
)
def test_other_ways_to_prepare_images(preprocessing, why_not, reference, tmp_path):
    protoclip.export(reference("clip"), tmp_path / "clip", ["open_clip"])
    file = tmp_path / "clip" / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["preprocess_cfg"] |= preprocessing
    file.write_text(json.dumps(config))
    facts = protoclip.export(tmp_path / "clip", tmp_path / "out", ["open_clip", "hf", "timm"])
    assert facts["left_out"].get("hf", "").startswith(why_not)
    assert ("timm" in facts["left_out"]) is bool(why_not)
    image = IMAGES[0].resize((64, 40))
    _, transform, _ = protoclip.load(tmp_path / "clip")
    assert repr(protoclip.load(tmp_path / "out")[1]) == repr(transform)
    if not why_not:
        assert not facts["left_out"]
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
        pixels = processor(images=image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(pixels, transform(image), atol=0.05, rtol=0)


def test_what_transformers_js_reads(reference, tmp_path):
    """Names of files, inputs and outputs; batches of any size; the tokenizer's own padding."""
    onnxruntime = pytest.importorskip("onnxruntime")
    folder = tmp_path / "out"
    facts = protoclip.export(reference("run"), folder, ["hf", "onnx"])
    assert facts["formats"]["onnx"] == "opset 18"
    names = run_examples(folder)
    # The card of a folder without `transformers`' format prepares images and captions by open_clip.
    protoclip.export(reference("run"), tmp_path / "plain", ["open_clip"])
    shutil.copytree(folder / "onnx", tmp_path / "plain" / "onnx")
    *_, block = blocks_of("".join(write_examples(["open_clip", "onnx"], 'folder = "plain"')))
    for left in (names["onnx"], run_code(tmp_path / "plain", block)):
        images, texts = (torch.from_numpy(left[f"{side}_features"]) for side in ("image", "text"))
        assert_close(torch.nn.functional.normalize(images), names["hf"]["outputs"].image_embeds)
        assert_close(torch.nn.functional.normalize(texts), names["hf"]["outputs"].text_embeds)
    assert max(facts["differences"]["onnx"].values()) < 1e-5
    image, text = expected(reference("run"))
    sessions = {
        name: onnxruntime.InferenceSession(folder / "onnx" / f"{name}_model.onnx")
        for name in ("vision", "text")
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    _, transform, _ = protoclip.load(folder)
    for count in (1, 2):
        pixels = torch.stack([transform(image) for image in IMAGES[:count]])
        (found,) = sessions["vision"].run(["image_embeds"], {"pixel_values": pixels.numpy()})
        assert_close(torch.from_numpy(found), image[:count])
        tokens = tokenizer(
            TEXTS[:count], padding="max_length", truncation=True, return_tensors="np"
        )
        (found,) = sessions["text"].run(["text_embeds"], {"input_ids": tokens["input_ids"]})
        assert_close(torch.from_numpy(found), text[:count])
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    assert settings["image_processor_type"] == "CLIPImageProcessor"
    assert settings["size"] == {"shortest_edge": 32}
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    assert ids == {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    assert tokenizer.model_max_length == 8


@pytest.mark.parametrize(
    ("save", "formats"), [(save_siglip, ["hf"]), (save_dual_encoder, ["hf", "onnx"])]
)
def test_a_hugging_face_model_comes_out_again(save, formats, tmp_path):
    """Its tokenizer returns a mask only where the text tower must not read padding.

    ONNX has one there too, and takes one caption as well.
    """
    save(tmp_path / "in")
    facts = protoclip.export(f"hf:{tmp_path / 'in'}", tmp_path / "out", formats)
    assert [*facts["differences"]] == [*formats, "protoclip"]
    for found in facts["differences"].values():
        assert max(found.values()) < 1e-5
    model, transform, tokenizer = protoclip.load(tmp_path / "out")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    process = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    inputs = process(text=TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        text = theirs.get_text_features(**inputs).pooler_output
        assert_close(text, model.encode_text(tokenizer(TEXTS)))
    if "onnx" in formats:
        images = torch.stack([transform(image) for image in IMAGES[:2]])
        tokens = tokenizer(TEXTS[:2])
        both = huggingface.embed_graph_samples(tmp_path / "out", images, tokens)
        one = huggingface.embed_graph_samples(tmp_path / "out", images[:1], tokens[:1])
        assert_close(one["image"], both["image"][:1])
        assert_close(one["text"], both["text"][:1])
    with pytest.raises(ValueError, match="not as open_clip: its towers are Hugging Face's"):
        protoclip.export(f"hf:{tmp_path / 'in'}", tmp_path / "other", ["open_clip"])


def spoil_features(source: Any, folder: Path) -> str:
    with torch.no_grad():
        source.towers.visual.proj.mul_(1.001)
    try:
        return huggingface.write_model(source, folder)
    finally:
        with torch.no_grad():
            source.towers.visual.proj.div_(1.001)


def fail(source: Any, folder: Path) -> str:
    (folder / "half.json").write_text("{}")
    raise RuntimeError("no room\nleft")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (spoil_features, r"not exported: the image features of hf differ by \d\.\de-04, more than"),
        (fail, r"cannot be exported as hf \(no room left\)"),
    ],
)
def test_a_library_that_computes_something_else_leaves_nothing(
    write, message, reference, monkeypatch, tmp_path
):
    monkeypatch.setitem(run.FORMATS, "hf", write)
    with pytest.raises(ValueError, match=message) as error:
        protoclip.export(reference("clip"), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_export_is_replaced_only_when_the_new_one_is_complete(reference, tmp_path):
    """One that fails leaves the old one, and nothing beside.

    It is not the model itself, which would go with it. A folder without a card of ours stays, and
    so does a Git clone.
    """
    out, written = tmp_path / "out", "open_clip_config.json"
    protoclip.export(reference("run"), out, ["open_clip"])
    with pytest.raises(ValueError, match=r"out: exists; choose another folder, or give --over"):
        protoclip.export(reference("run"), out, ["timm"])
    with pytest.raises(OSError, match="full"), run.stage_folder(out, overwrite=True):
        raise OSError("full")
    assert [*tmp_path.iterdir()] == [out]
    assert (out / written).is_file()
    for model in (out, f"hf:{out}", out / "open_clip_model.safetensors"):
        with pytest.raises(ValueError, match=r"out: the model to export is in this folder"):
            protoclip.export(model, out, ["timm"], overwrite=True)
    (out / ".git").mkdir()
    with pytest.raises(ValueError, match=r"out: exists; choose another folder, or remove it$"):
        protoclip.export(reference("run"), out, ["timm"], overwrite=True)
    (out / ".git").rmdir()
    (tmp_path / ".out.protoclip").mkdir()  # of a process that was killed
    main(["export", str(reference("run")), str(out), "--formats", "timm", "--overwrite"])
    assert [*tmp_path.iterdir()] == [out]
    assert (out / "timm").is_dir()
    assert not (out / written).exists()
    (out / "README.md").write_text("mine")
    with pytest.raises(ValueError, match=r"out: exists; choose another folder, or remove it$"):
        protoclip.export(reference("run"), out, ["timm"], overwrite=True)


def test_the_command_prints_the_differences(reference, capsys, tmp_path):
    out = tmp_path / "out"
    main(["export", reference("resnet"), str(out), "--license", "mit"])
    said = capsys.readouterr()
    rows = [line.split() for line in said.out.splitlines()]
    assert rows[1:] == [
        ["open_clip", "0.0e+00", "0.0e+00", "CLIP"],
        ["protoclip", "0.0e+00", "0.0e+00", "protoclip.load"],
    ]
    assert said.err.splitlines()[-1] == f"written to {out}"
    assert "note: not as hf: transformers needs" in said.err
    assert "license: mit\n" in (out / "README.md").read_text()


def test_who_may_read_the_card_may_read_the_weights(reference, tmp_path):
    protoclip.export(reference("run"), tmp_path / "out", ["open_clip", "timm"])
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"model.safetensors", "open_clip_model.safetensors"}
    assert len({path.stat().st_mode for path in files}) == 1
