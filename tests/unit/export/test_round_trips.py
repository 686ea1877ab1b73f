"""Out and in again: an exported folder starts a run, which trains on and is exported again."""

import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import timm
import torch
import transformers
from exported import assert_close, save_run
from PIL import Image, ImageFilter, ImageOps
from safetensors.torch import load_file

import protoclip
from interrupting import train_until
from protoclip.config import (
    Config,
    EpisodeConfig,
    ImageTowerConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TextTowerConfig,
)
from protoclip.data.transforms import EvaluationTransform, SquashTransform
from protoclip.encode.encoder import image_encoder, prepare_image
from protoclip.export.card import project
from protoclip.export.open_clip import open_source
from protoclip.files import file_checksum
from protoclip.models.checkpoint import CHECKSUMS, MODEL, find_checkpoint
from protoclip.models.protoclip import ProtoCLIP
from protoclip.models.start import resolve_start
from protoclip.training import run
from protoclip.training.plan import resolve_settings
from testing import build_model, save_to_bytes, tiny_config, tiny_model, tiny_pairs
from tiny_hugging_face import save_bert, save_dual_encoder, save_siglip
from tiny_starts import CLIP, HEADS, RESNET, TEXT, save_open_clip

TIMM = {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "avg"}
SIGLIP = {
    "embed_dim": 64,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {**TIMM, "timm_proj": "none"},
    "text_cfg": {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
}
TEXTS = ["a red square", "a photo of two green corners on a very long blue stripe"]
PIXELS = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
IMAGES = [Image.fromarray(PIXELS), Image.new("RGB", (40, 40), "gold")]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    pq.write_table(tiny_pairs(32), file)
    return str(file)


def training(train: str, out: Path, model: ModelConfig, count: int = 3, **changes: Any) -> Config:
    """A run of a warm-up, a prototypical and a locked episode, each of two steps."""
    config = tiny_config(train, out=str(out))
    return replace(
        config,
        run=replace(config.run, evaluate=False),
        data=replace(config.data, validation=0.0),
        model=model,
        episodes=EpisodeConfig(
            size=16, count=count, batch_size=8, warm_up=1, locked_image=int(count > 2)
        ),
        optim=OptimConfig(learning_rate=1e-3),
        **changes,
    )


def with_text_tower(folder: Path, train: str) -> str:
    """A run of two encoders, whose text tower is a BERT."""
    given = ModelConfig(
        embed_dim=16,
        image=ImageTowerConfig(name="test_resnet", size=32),
        text=TextTowerConfig(name=str(save_bert(folder.with_name("bert"))), context_length=20),
        heads=HEADS,
    )
    run.train(training(train, folder, given))
    return str(folder)


KINDS: dict[str, tuple[Callable[[Path, str], str], list[str]]] = {
    "small timm pair": (
        lambda folder, _: str(save_run(folder, tiny_model())),
        ["open_clip", "hf"],
    ),
    "RN50": (
        lambda folder, _: str(save_open_clip(folder, {**CLIP, "vision_cfg": RESNET})),
        ["open_clip"],
    ),
    "SigLIP-shaped": (
        lambda folder, _: str(save_open_clip(folder, SIGLIP, resize_mode="squash")),
        ["open_clip"],
    ),
    "HF text tower": (with_text_tower, ["open_clip"]),
    "SiglipModel": (lambda folder, _: f"hf:{save_siglip(folder)}", ["hf"]),
    "dual encoder": (lambda folder, _: f"hf:{save_dual_encoder(folder)}", ["hf"]),
}
EVERY_LIBRARY = ("open_clip", "hf", "timm")
SPACES, PARTS = ("image", "text"), ("centroids", "assignments")
SIGMOID = SQUASHING = ("SigLIP-shaped", "SiglipModel")


def features(loaded: Any, pixels: torch.Tensor) -> list[torch.Tensor]:
    model, _, tokenizer = loaded
    with torch.no_grad():
        return [model.encode_image(pixels), model.encode_text(tokenizer(TEXTS))]


def pixels_of(loaded: Any) -> torch.Tensor:
    return torch.stack([loaded[1](image) for image in IMAGES])


def forget_resizing(checkpoint: Path) -> None:
    """Make a checkpoint as versions did that cropped all images, and said nothing of it."""
    facts = json.loads((checkpoint / MODEL).read_text())
    assert facts.pop("resize_mode") == "squash"
    (checkpoint / MODEL).write_text(json.dumps(facts))
    checksums = json.loads((checkpoint / CHECKSUMS).read_text())
    checksums[MODEL] = file_checksum(checkpoint / MODEL)
    (checkpoint / CHECKSUMS).write_text(json.dumps(checksums))


@pytest.mark.parametrize("kind", KINDS)
def test_out_in_on_and_out(kind, pairs, tmp_path):
    """Exact where nothing was trained. The folder stands alone, and the trained model comes out in
    the same formats and classes. What squashes images goes on to."""
    make, formats = KINDS[kind]
    source = make(tmp_path / "source", pairs)
    original = protoclip.load(source)
    pixels = pixels_of(original)
    expected = features(original, pixels)
    first = protoclip.export(source, tmp_path / "first", formats)
    for path in tmp_path.iterdir():
        if path.name != "first":
            shutil.rmtree(path)
    if "open_clip" in formats:
        library = open_clip.create_model(f"local-dir:{tmp_path / 'first'}").eval()
        tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'first'}")(TEXTS)
        with torch.no_grad():
            found = [library.encode_image(pixels), library.encode_text(tokens)]
        assert all(map(torch.equal, found, expected))
    (tmp_path / "first").rename(tmp_path / "moved")
    loaded = protoclip.load(tmp_path / "moved")
    assert all(map(torch.equal, features(loaded, pixels), expected))

    given = ModelConfig(start=str(tmp_path / "moved"), heads=HEADS)
    config = training(pairs, tmp_path / "run", given, count=1)
    planned = resolve_settings(config)
    assert planned.config.loss.instance == ("sigmoid" if kind in SIGMOID else "info_nce")
    assert not [note for note in planned.notes if "resizes images" in note]
    built = build_model(planned.config.model, seed=0).eval()
    reads = resolve_start(planned.config.model).tokenizer()
    assert all(map(torch.equal, features((built, None, reads), pixels), expected))
    run.train(config)
    shutil.rmtree(tmp_path / "moved")
    trained = protoclip.load(tmp_path / "run")
    assert isinstance(trained[0], ProtoCLIP)
    squashes = kind in SQUASHING
    assert type(trained[1]) is (SquashTransform if squashes else EvaluationTransform)
    after = features(trained, pixels)
    for now, before in zip(after, expected, strict=True):
        assert (now - before).abs().max() > 1e-4

    second = protoclip.export(tmp_path / "run", tmp_path / "second", formats)
    assert second["formats"] == first["formats"]
    again = features(protoclip.load(tmp_path / "second"), pixels)
    for found, wanted in zip(again, after, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    if squashes:  # by the library's own preprocessing of an image that is not square
        for loaded in (trained, protoclip.load(tmp_path / "second")):
            found = features(loaded, pixels_of(loaded))[0]
            torch.testing.assert_close(found, after[0], atol=5e-3, rtol=5e-3)
        forget_resizing(find_checkpoint(tmp_path / "run"))
        assert type(protoclip.load(tmp_path / "run")[1]) is EvaluationTransform
    if "hf" in formats:
        library = transformers.AutoModel.from_pretrained(tmp_path / "second")
        assert type(library).__name__ == first["formats"]["hf"]
        scale = trained[0].towers.logit_scale.detach()
        assert torch.equal(library.logit_scale.detach().reshape(()), scale)


def test_a_run_of_transformers_towers_goes_on_bit_for_bit(pairs, tmp_path):
    """With prototypes, micro-batches and activations that are computed again.

    One that an earlier version began with crops ends with them, though its start squashes.
    """
    given = ModelConfig(start=f"hf:{save_siglip(tmp_path / 'start')}", heads=HEADS)

    def config(out: str) -> Config:
        usual = training(
            pairs, tmp_path / out, given, parallel=ParallelConfig(activation_checkpointing=True)
        )
        return replace(usual, episodes=replace(usual.episodes, micro_batch_size=4))

    run.train(config("whole"))
    assert train_until(3, config("parts"))["stopped"] == "SIGTERM"
    forget_resizing(find_checkpoint(tmp_path / "parts"))
    assert "stopped" not in run.train(config("parts"), resume="auto")
    assert type(protoclip.load(tmp_path / "parts")[1]) is EvaluationTransform
    whole, parts = (
        load_file(find_checkpoint(tmp_path / out) / "model.safetensors")
        for out in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())
    states = [
        load_file(find_checkpoint(tmp_path / out) / "resume.safetensors")
        for out in ("whole", "parts")
    ]
    names = [f"clusters/{space}/{part}" for space in SPACES for part in PARTS]
    assert all(torch.equal(states[0][name], states[1][name]) for name in names)
    # The checkpoint itself starts a run, with its heads. It was trained on cropped images.
    outlined = resolve_settings(Config(model=ModelConfig(start=str(tmp_path / "parts"))))
    assert not any("resizes images by" in note for note in outlined.notes)
    again = build_model(outlined.config.model, seed=1)
    assert all(torch.equal(value, whole[key]) for key, value in again.state_dict().items())


def test_the_prototypes_of_a_finished_run_go_out(pairs, tmp_path, monkeypatch):
    """Those of its last episode that had any, with the nearest captions of its data."""
    data = tmp_path / "pairs.parquet"
    shutil.copy(pairs, data)
    finished = training(str(data), tmp_path / "finished", tiny_model())
    run.train(finished)
    # Two steps into the prototypical episode, and then stopped.
    train_until(4, replace(finished, run=replace(finished.run, out=str(tmp_path / "within"))))
    found, within = (
        load_file(find_checkpoint(tmp_path / out) / "resume.safetensors")
        for out in ("finished", "within")
    )
    for space in SPACES:
        name = f"clusters/{space}/centroids"
        assert torch.equal(found[name], within[name])

    facts = protoclip.export(tmp_path / "finished", tmp_path / "out", ["open_clip"])
    assert (facts["prototypes"], facts["captions"]) == (None, None)
    written = load_file(tmp_path / "out" / "prototypes.safetensors")
    spaces = json.loads((tmp_path / "out" / "prototypes.json").read_text())["spaces"]
    model, _, tokenizer = protoclip.load(tmp_path / "finished")
    captions = list(dict.fromkeys(pq.read_table(data)["caption"].to_pylist()))
    with torch.no_grad():
        projections = model.text_head(model.encode_text(tokenizer(captions))).double()
    projections /= projections.norm(dim=1, keepdim=True)
    with monkeypatch.context() as patch:  # the next export encodes none of them
        patch.setattr("protoclip.encode.features.encode_numbers", Mock(side_effect=AssertionError))
        kept = project(open_source(str(tmp_path / "finished")), captions)
    torch.testing.assert_close(kept.double(), projections)
    # Those of image prototypes, whose space is another, are by the text prototypes of the members.
    image, text = (found[f"clusters/{space}/assignments"] for space in SPACES)
    texts = written["text.centroids"].double()
    means = [
        texts[text[image == number]].mean(0) for number in range(len(spaces["image"]["sizes"]))
    ]
    for space, centroids in (("text", texts), ("image", means)):
        for centroid, names, size in zip(
            centroids, spaces[space]["nearest_captions"], spaces[space]["sizes"], strict=True
        ):
            distances = (projections - centroid).norm(dim=1)
            ranked = [captions[number] for number in distances.argsort().tolist()]
            assert names == (ranked[:5] if size else [])

    data.unlink()
    facts = protoclip.export(tmp_path / "finished", tmp_path / "without", ["open_clip"])
    assert facts["prototypes"] is None
    assert "the run's data cannot be opened (" in facts["captions"]


@pytest.fixture(scope="module")
def run_and_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, and with what it is exported as."""
    folder = tmp_path_factory.mktemp("doors")
    protoclip.export(save_run(folder / "run", tiny_model()), folder / "out", EVERY_LIBRARY)
    return folder


def files_and_images() -> dict[str, tuple[bytes, Image.Image]]:
    """Encoded images, and each as RGB, upright and on white."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(4))
    grey, palette, exif = photo.convert("L"), photo.quantize(8), Image.Exif()
    mask, exif[0x112] = Image.new("L", photo.size), 6
    mask.paste(255, (20, 10, 60, 40))
    white = Image.new("RGB", photo.size, "white")
    clear = palette.point(lambda index: 255 * (index != 3), "L")
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    narrow, cmyk = photo.crop((0, 0, 64, 7)), photo.convert("CMYK")
    made = {
        "RGBA": (Image.merge("RGBA", [*photo.split(), mask]), Image.composite(photo, white, mask)),
        "LA": (Image.merge("LA", [grey, mask]), Image.composite(grey.convert("RGB"), white, mask)),
        "16 bit": (sixteen, grey.convert("RGB")),
        "palette": (palette, Image.composite(palette.convert("RGB"), white, clear)),
        "CMYK": (cmyk, cmyk.convert("RGB")),
        "EXIF": (photo, photo.transpose(Image.Transpose.ROTATE_270)),
        "narrow": (narrow, narrow),
    }
    more = {"CMYK": {"kind": "TIFF"}, "EXIF": {"exif": exif}, "palette": {"transparency": 3}}
    return {
        name: (save_to_bytes(image, **more.get(name, {})), plain)
        for name, (image, plain) in made.items()
    }


@pytest.mark.parametrize("door", ["run", "export", "hf export", "open_clip", "SigLIP", "hf SigLIP"])
def test_every_door_makes_one_tensor_of_an_image(door, run_and_export, tmp_path):
    """The same that `embed` makes of its file: upright, and on white where it is transparent."""
    folder = run_and_export
    references: dict[str, Callable[[], str]] = {
        "run": lambda: str(folder / "run"),
        "export": lambda: str(folder / "out"),
        "hf export": lambda: f"hf:{folder / 'out'}",
        "open_clip": lambda: str(save_open_clip(tmp_path / "model")),
        "SigLIP": lambda: str(save_open_clip(tmp_path / "model", SIGLIP, resize_mode="squash")),
        "hf SigLIP": lambda: f"hf:{save_siglip(tmp_path / 'model')}",
    }
    _, transform, _ = protoclip.load(references[door]())
    encoder = image_encoder(torch.nn.Identity(), torch.device("cpu"), lambda x: x, transform)
    for name, (file, plain) in files_and_images().items():
        tensor = transform(Image.open(io.BytesIO(file)))
        embedded = encoder.collate([prepare_image(file, transform)])[0]
        assert torch.equal(tensor, embedded), name
        # What is turned after it was resized may differ by a step of 255.
        torch.testing.assert_close(tensor, transform(plain), atol=0.016, rtol=0, msg=name)


def test_the_lines_of_the_card_bring_other_libraries_to_the_same_tensor(run_and_export):
    """To their own rounding."""
    folder = run_and_export / "out"
    card = (folder / "README.md").read_text()
    lines = dict(re.findall(r"^\| (.*) \| `(image = .*)` \|$", card, re.MULTILINE))
    assert len(lines) == 3
    model, transform, tokenizer = protoclip.load(folder)
    _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tower = timm.create_model(f"local-dir:{folder}/timm", pretrained=True)
    settings = timm.data.resolve_model_data_config(tower)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    libraries: dict[str, Callable[[Image.Image], torch.Tensor]] = {
        "open_clip": preprocess,
        "timm": timm.data.create_transform(**settings, is_training=False),
        "transformers": lambda image: processor(images=image, return_tensors="pt")["pixel_values"][
            0
        ],
    }
    mended, wanted = [], []
    for name, (file, plain) in files_and_images().items():
        names = {"image": Image.open(io.BytesIO(file)), "np": np}
        for what, line in lines.items():
            if "16 bits" not in what or name == "16 bit":
                exec(line, {"Image": Image, "ImageOps": ImageOps}, names)
        mended.append(names["image"])
        wanted.append(transform(plain))
        for library, prepare in libraries.items():
            steps = (prepare(names["image"]) - wanted[-1]).abs().max() * 255 * 0.26
            assert steps < 4, (name, library, steps)
    sentences = pytest.importorskip("sentence_transformers")
    library = sentences.SentenceTransformer(str(folder), device="cpu")
    images, texts = (torch.from_numpy(library.encode(given)) for given in (mended, TEXTS))
    with torch.no_grad():
        assert_close(images, model.encode_image(torch.stack(wanted)), 0.02)
        assert_close(texts, model.encode_text(tokenizer(TEXTS)))
