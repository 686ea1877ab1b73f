"""What may change when a run goes on, and that it changes no batch; all else is refused."""

import copy
import io
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w
import torch
from PIL import Image

from protoclip.config import PERMISSIONS, Config
from protoclip.data import loader as data_loader
from protoclip.data import sampler, sources
from protoclip.data.loader import Batch
from protoclip.data.transforms import EvaluationTransform, Transform, light_transform
from protoclip.models.loading import STATE
from protoclip.models.towers import build_tokenizer
from protoclip.testing import tiny_config
from protoclip.training.run import to_toml
from protoclip.training.run_folder import (
    FREE,
    flat,
    require_same,
    require_same_arithmetic,
)

# Of each setting that is free another value than `base` has; `{}` is a folder.
OTHER: dict[str, Any] = {
    "run.out": "elsewhere",
    "run.save_steps": 3,
    "run.save_minutes": 0.5,
    "run.keep_checkpoints": 7,
    "run.wandb": "offline",
    "run.evaluate": False,
    "data.workers": 2,
    "data.cache": "disk",
    "data.cache_gb": 1e-9,
    "data.cache_folder": "{}",
    "data.max_bad_share": 0.9,
}


def changed(config: Config, setting: str, value: Any) -> Config:
    section, name = setting.split(".")
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run over JPEG files of several sizes, one of them bad, in memory."""
    draw, images = np.random.default_rng(0), []
    for _ in range(24):
        width, height = (int(side) for side in draw.integers(20, 400, 2))
        pixels = draw.integers(0, 256, (height // 4, width // 4, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((width, height)).save(buffer, "JPEG")
        images.append(buffer.getvalue())
    images[5] = b"nonsense"
    folder = tmp_path_factory.mktemp("pairs")
    captions = [f"picture {row}" for row in range(24)]
    pq.write_table(
        pa.table({"image": pa.array(images, pa.binary()), "caption": captions}),
        folder / "pairs.parquet",
    )
    config = tiny_config(str(folder / "pairs.parquet"), out="run")
    return replace(config, episodes=replace(config.episodes, size=32, batch_size=16))


def batches(config: Config) -> list[Batch]:
    """Of an episode as it is extracted and then trained, cold and warm."""
    samples = sources.pairs(config)
    plain: dict[str, Any] = {"size": 32, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    views: list[Transform] = [EvaluationTransform(**plain), light_transform(**plain)]
    loader = data_loader.loader(
        config,
        samples,
        tokenizer=build_tokenizer(None, context_length=8),
        transform=views[0],
        device=torch.device("cpu"),
        on_read=lambda number, bad: None,
    )
    episode = sampler.episodes(config, samples)(0)
    return [
        batch for view in views * 2 for batch in replace(loader, transform=view).batches(episode)
    ]


@pytest.fixture(scope="module")
def expected(base: Config) -> list[Batch]:
    return batches(base)


@pytest.mark.parametrize("setting", FREE)
def test_a_free_setting_changes_no_batch(
    setting: str, base: Config, expected: list[Batch], tmp_path: Path
) -> None:
    """To the bit: pixels, tokens, ids and order."""
    value = str(tmp_path) if OTHER[setting] == "{}" else OTHER[setting]
    other = changed(base, setting, value)
    assert other != base
    for a, b in zip(expected, batches(other), strict=True):
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.text, b.text)
        assert torch.equal(a.position, b.position)
        assert a.sample_id == b.sample_id


def test_settings_that_change_batches_are_not_free(base: Config, expected: list[Batch]) -> None:
    """The comparison above would show it."""
    for setting, value in [
        ("data.small_copies", True),
        ("data.max_image_pixels", 90_000),
        ("run.seed", 1),
    ]:
        assert setting not in FREE
        pairs = zip(expected, batches(changed(base, setting, value)), strict=True)
        assert not all(torch.equal(a.image, b.image) for a, b in pairs), setting


def present(tree: dict[str, Any]) -> dict[str, Any]:
    """Without what is unset, as TOML has it."""
    return {
        key: present(value) if isinstance(value, dict) else value
        for key, value in tree.items()
        if value is not None
    }


def test_all_other_settings_are_refused(tmp_path: Path) -> None:
    """Each in one line that names it."""
    (tmp_path / "config.toml").write_text(to_toml(Config()), encoding="utf-8")
    kept = asdict(Config())
    for permission in PERMISSIONS:
        del kept["data"][permission]
    for setting in flat(kept):
        tree = copy.deepcopy(kept)
        *sections, last = setting.split(".")
        branch = tree
        for section in sections:
            branch = branch[section]
        branch[last] = "another"
        if setting in FREE:
            require_same(tmp_path, tomli_w.dumps(present(tree)))
            continue
        with pytest.raises(ValueError, match=f"other settings: {setting} \\(") as error:
            require_same(tmp_path, tomli_w.dumps(present(tree)))
        assert "\n" not in str(error.value)
    assert not {"run.device", "run.precision", "data.small_copies"} & set(FREE)


def test_a_run_goes_on_with_the_arithmetic_it_began_with(tmp_path: Path) -> None:
    """Where `auto` means another device or precision than before, it says so in one line."""
    began = {"run.device": "cpu", "run.precision": "bf16"}
    (tmp_path / STATE).write_text(json.dumps({"arithmetic": began}))
    require_same_arithmetic(tmp_path, began)
    with pytest.raises(ValueError, match=r"run\.device: .* with cpu, and here it would be cuda"):
        require_same_arithmetic(tmp_path, {**began, "run.device": "cuda"})
    with pytest.raises(ValueError, match=r"run\.precision: .* with bf16, and here .* fp32"):
        require_same_arithmetic(tmp_path, {**began, "run.precision": "fp32"})
