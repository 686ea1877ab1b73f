"""What tells stored features of frozen halves apart, and what a run between them insists on."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from protoclip.features import encode as encoding
from protoclip.features import parts
from protoclip.testing import run_distributed
from protoclip.training.align import align
from protoclip.training.trainer import Trainer
from tiny_align import changed, rows_of, tiny_alignment


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, Any]:
    return tiny_alignment(tmp_path_factory.mktemp("halves"))


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


def with_text(given: dict[str, Any], folder: Path) -> dict[str, Any]:
    text = {**given["model"]["text"], "name": str(folder)}
    return changed(given, model={"text": text})


def test_equal_weights_of_another_architecture_are_another_half(given, tmp_path, store):
    """Numbers of attention heads have no weights."""
    rows_of(given)
    before = {path.name for path in store.iterdir()}
    other = tmp_path / "bert"
    shutil.copytree(given["model"]["text"]["name"], other)
    config = json.loads((other / "config.json").read_text())
    config["num_attention_heads"] *= 2
    (other / "config.json").write_text(json.dumps(config))
    rows_of(with_text(given, other))
    assert len({path.name for path in store.iterdir() if path.is_dir()} - before) == 1


def test_interrupted_encoding_goes_on_with_rows_in_another_order(given, tmp_path, monkeypatch):
    table = pq.read_table(given["data"]["train"])
    folder = tmp_path / "images"
    folder.mkdir()
    names = [f"images/{row}.png" for row in range(len(table))]
    for name, image in zip(names, table["image"].to_pylist(), strict=True):
        (tmp_path / name).write_bytes(image)
    monkeypatch.setitem(encoding.PART_ROWS, "image", 16)
    write, left = parts.write_atomically, [2]

    def failing(path: Path, *rest: Any, **more: Any) -> None:
        if path.suffix == ".npz":
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, "No space left on device", str(path))
        write(path, *rest, **more)

    def settings(order: list[int]) -> dict[str, Any]:
        lines = [f"{names[row]}\tcaption {row}" for row in order]
        (tmp_path / "pairs.tsv").write_text("\n".join(["image\tcaption", *lines]))
        return changed(given, data={"train": str(tmp_path / "pairs.tsv")})

    order = list(range(len(names)))
    with monkeypatch.context() as patch:
        patch.setattr(parts, "write_atomically", failing)
        with pytest.raises(OSError, match="No space"):
            rows_of(settings(order))
    plan, rows, _ = rows_of(settings(order[::-1]))
    assert len(plan.samples) == len({*rows.images[:, 0].tolist()}) == len(names)


def resumed(settings: dict[str, Any], cache: str) -> str:
    """The message of a run that is not gone on with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROTOCLIP_CACHE", cache)
        with pytest.raises(ValueError, match="has other weights") as caught:
            align(settings, resume="auto")
    return str(caught.value)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_does_not_go_on_between_other_halves(ranks, given, tmp_path, monkeypatch):
    weights = tmp_path / "weights.safetensors"
    shutil.copy(given["model"]["image"]["weights"], weights)
    image = {**given["model"]["image"], "weights": str(weights)}
    settings = changed(given, tmp_path / "run", model={"image": image})

    step = Trainer.train_step

    def stopping(*batch: Any, **how: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return step(*batch, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stopping)
        assert align(settings)["stopped"] == "SIGTERM"
    save_file({name: value * 1.5 for name, value in load_file(weights).items()}, weights)
    cache = str(tmp_path / "cache")
    messages = run_distributed(resumed, ranks, settings, cache)
    assert all("model.image.weights: has other weights than" in text for text in messages)
