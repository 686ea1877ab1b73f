"""Which settings may change when a run goes on: they change no batch, and others are refused."""

import io
import tomllib
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w
import torch
from PIL import Image

from interrupting import with_changes
from protoclip.cli.spec import merge_trees
from protoclip.config import Config, ImageTowerConfig, ModelConfig, SourceConfig, flatten
from protoclip.data import loader as data_loader
from protoclip.data import sampler, sources
from protoclip.data.loader import Batch, Pass
from protoclip.data.transforms import EvaluationTransform, Transform, light_transform
from protoclip.models import checkpoint as saved
from protoclip.models.open_clip import open_clip_tokenizer
from protoclip.models.start import resolve_start
from protoclip.training.folder import (
    FREE,
    ROUNDING,
    check_settings,
    keep_chosen,
    keep_resizing,
    list_settings,
    parse_begun,
    to_toml,
)
from testing import tiny_config

# Another value for each setting that is free; `{}` is a folder.
OTHER: dict[str, Any] = {
    "run.name": "another",
    "run.out": "elsewhere",
    "run.sync": "s3://bucket/run",
    "run.log_every": 3,
    "run.save_steps": 3,
    "run.save_minutes": 0.5,
    "run.keep_checkpoints": 7,
    "run.loggers": ("mlflow",),
    "run.keep_best": "eval/emoji/knn/acc1",
    "run.evaluate": False,
    "run.evaluate_every": 2,
    "run.guard": ["emoji"],
    "data.workers": 2,
    "data.cache_gb": 0.0,
    "data.max_bad_share": 0.9,
    "align.features": "elsewhere",
}


def changed(config: Config, setting: str, value: Any) -> Config:
    section, name = setting.split(".")
    return with_changes(config, {section: {name: value}})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run over JPEG files of several sizes, one of them bad."""
    draw, images = np.random.default_rng(0), []
    for _ in range(24):
        width, height = (int(side) for side in draw.integers(20, 400, 2))
        pixels = draw.integers(0, 256, (height // 4, width // 4, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((width, height)).save(buffer, "JPEG")
        images.append(buffer.getvalue())
    images[5] = b"nonsense"
    captions = [f"image {row}" for row in range(24)]
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    pq.write_table(pa.table({"image": pa.array(images, pa.binary()), "caption": captions}), path)
    return with_changes(tiny_config(str(path), out="run"), {"episodes": {"size": 32}})


def batches(config: Config) -> list[Batch]:
    """The batches of an episode for extraction and for training, each twice (cold and cached)."""
    samples = sources.open_samples(config)
    plain: dict[str, Any] = {"size": 32, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    transforms: list[Transform] = [EvaluationTransform(**plain), light_transform(**plain)]
    loader = data_loader.loader(
        config,
        samples,
        tokenizer=open_clip_tokenizer({}, context_length=8),
        transform=transforms[0],
        device=torch.device("cpu"),
        on_read=lambda number, bad: None,
    )
    episode = sampler.episodes(config, samples)(0)
    return [
        batch
        for transform in transforms * 2
        for batch in replace(loader, transform=transform).batches(Pass(episode))
    ]


@pytest.fixture(scope="module")
def expected(base: Config) -> list[Batch]:
    return batches(base)


def equal(one: Batch, other: Batch) -> bool:
    tensors = ((one.image, other.image), (one.text, other.text), (one.position, other.position))
    return one.sample_id == other.sample_id and all(torch.equal(a, b) for a, b in tensors)


@pytest.mark.parametrize("section", ["run", "data.workers", "data.cache_gb"])
def test_a_free_setting_changes_no_batch(section, base, expected):
    """Pixels, tokens, ids and order are equal bit for bit."""
    assert OTHER.keys() == {*FREE}
    other = base
    for setting, value in OTHER.items():
        others = section == "run" and setting in ("data.max_bad_share", "align.features")
        if setting.startswith(section) or others:
            other = changed(other, setting, value)
            assert flatten(asdict(other))[setting] != flatten(asdict(base))[setting]
    assert all(equal(a, b) for a, b in zip(expected, batches(other), strict=True))


def test_settings_that_change_batches_are_not_free(base, expected):
    """The comparison above notices them."""
    assert "run.seed" not in FREE
    found = batches(changed(base, "run.seed", 1))
    assert not all(equal(a, b) for a, b in zip(expected, found, strict=True))


def check(before: Config, now: Config, **more: Any) -> list[str]:
    return check_settings("run", list_settings(before), list_settings(now), **more)


def test_all_other_settings_are_refused():
    """Each in one line that names it."""
    before = list_settings(Config())
    for setting in flatten(asdict(Config())).keys() - {"data.allow_links"}:  # which is not kept
        refused = pytest.raises(ValueError, match=f"other settings: {setting} \\([^\n]*$")
        taken = setting in (*FREE, *ROUNDING, "data.root", "data.read")
        with nullcontext() if taken else refused:
            notes = check_settings("run", before, {**before, setting: "another"})
        if taken:
            assert ([setting in note for note in notes] == [True]) == (setting in ROUNDING)
    assert not {"data.augmentation", "run.seed"} & {*FREE, *ROUNDING}


@pytest.mark.parametrize(
    ("given", "idle"),
    [
        ({"model": {"text": {"name": "minilm"}}}, {"model": {"text": {"width": 128, "layers": 2}}}),
        ({"data": {"sources": [{"path": "a.tsv"}]}}, {"data": {"train": "emoji"}}),
        ({"model": {"start": "hf:siglip"}}, {"model": {"image": {"name": "resnet10t"}}}),
        ({"model": {"name": "RN50"}}, {"model": {"embed_dim": 256, "text": {"width": 128}}}),
    ],
    ids=["a text model", "a mixture", "a start", "a whole model"],
)
def test_what_a_run_has_no_use_for_is_no_setting_of_it(given, idle):
    """Earlier versions kept these too, at their defaults. What is given is kept."""
    config = Config.from_dict(given)
    text = to_toml(config)
    assert not flatten(idle).keys() & flatten(tomllib.loads(text)).keys()
    assert {} not in tomllib.loads(text)["model"].values()
    earlier = tomli_w.dumps(merge_trees(tomllib.loads(text), idle))
    for content in (text, earlier):
        assert check(parse_begun(content, "config.toml"), config) == []
    wide = replace(config, model=replace(config.model, embed_dim=64))
    with pytest.raises(ValueError, match=r"model.embed_dim \(256 before, 64 now\)"):
        check(config, wide)


def test_data_may_move_until_the_run_is_finished():
    """What is there then is compared; of a finished run nobody opens it. What no source named
    before is another setting, and so is a share."""
    config = with_changes(tiny_config("a.tsv", out="run"), {"data": {"validation": "b.tsv"}})
    moved = {"train": "c/a.tsv", "validation": "c/b.tsv", "root": "c", "read": "streaming"}
    check(config, with_changes(config, {"data": moved}))
    for name, value in moved.items():
        with pytest.raises(ValueError, match=f"other settings: data.{name}"):
            check(config, changed(config, f"data.{name}", value), finished=True)
    for name, value in {"only": "ids.csv", "validation": 0.1, "train": "emoji"}.items():
        with pytest.raises(ValueError, match=f"other settings: data.{name}"):
            check(config, changed(config, f"data.{name}", value))
    taught = with_changes(config, {"teacher": {"features": "a.npy"}})
    check(taught, changed(taught, "teacher.features", "c/a.npy"))
    with pytest.raises(ValueError, match=r"other settings: teacher\.features"):
        check(taught, changed(taught, "teacher.features", "start"))
    mixed = [SourceConfig(path="a.tsv", weight=1.0), SourceConfig(path="b.tsv", weight=2.0)]
    config = with_changes(config, {"data": {"train": "emoji", "sources": mixed}})
    mixed = [replace(mixed[0], path="c/a.tsv"), mixed[1]]
    check(config, changed(config, "data.sources", mixed))
    with pytest.raises(ValueError, match=r"other settings: data\.sources"):
        check(config, changed(config, "data.sources", mixed[::-1]))


def test_what_decides_when_a_run_ends_stays():
    stopping = {"run": {"evaluate_every": 1, "stop_by": "eval/emoji/knn/acc1"}}
    config = with_changes(tiny_config(out="run"), stopping)
    with pytest.raises(ValueError, match=r"other settings: run\.evaluate_every"):
        check(config, changed(config, "run.evaluate_every", 2))


def test_the_pooling_of_an_image_encoder_stays_what_it_was():
    """That of versions up to 1.0.0, which had no such setting, was the mean for all weights."""
    image = ImageTowerConfig(name="test_vit", weights="vit.safetensors")
    begun = Config(model=ModelConfig(image=image))
    given = {"model": {"image": {"name": "test_vit", "weights": "vit.safetensors"}}}
    for pooling, expected in ((None, "avg"), ("own", "own")):
        model = replace(begun.model, image=replace(image, pooling=pooling))
        tree = keep_chosen("train", given, replace(begun, model=model))
        assert tree["model"]["image"] == {**given["model"]["image"], "pooling": expected}
    for other in (ModelConfig(name="RN50"), ModelConfig(start="runs/a")):
        assert keep_chosen("train", {}, Config(model=other)) == {}


def test_images_stay_squashed_or_cropped_as_the_newest_readable_checkpoint_has_them(tmp_path):
    """Versions up to 1.0.0 cropped them for a start that squashes too, and said nothing of it."""
    starts = [ModelConfig(name="ViT-B-16-SigLIP", pretrained="webli"), ModelConfig(name="RN50")]
    for start in map(resolve_start, starts):
        assert keep_resizing(start, tmp_path / "new") is start
    for step, facts in enumerate(({}, {"resize_mode": "squash"}, {})):
        checkpoint = tmp_path / "checkpoints" / f"step-{step:09}"
        saved.write_checkpoint(checkpoint, {}, {saved.MODEL: facts})
        for start in map(resolve_start, starts):
            begun = keep_resizing(start, tmp_path)
            assert begun.squashes is bool(facts)
            assert ("resize_mode" in begun.description) is bool(facts)
    (checkpoint / saved.MODEL).write_text("{")
    assert keep_resizing(start, tmp_path).squashes
