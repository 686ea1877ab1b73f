"""Runs of `protoclip align` between tiny encoders, small enough for tests."""

import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import protoclip
from protoclip.data.pairs import ImageTextPairs
from protoclip.data.tools import pack
from protoclip.models import loading
from protoclip.models.checkpoint import find_checkpoint, read_tensors
from protoclip.training.plan import Plan, encode_pairs, make_plan, resolve_settings
from protoclip.training.presets import choose_before_data, read_given
from protoclip.training.run import align
from protoclip.training.trainer import Trainer
from testing import tiny_pairs
from tiny_hugging_face import NO_DROPOUT, save_bert
from tiny_starts import save_encoders


def tiny_alignment(folder: Path) -> dict[str, Any]:
    """Settings of a short run between tiny encoders over 96 pairs, some with two captions."""
    torch.manual_seed(0)
    model = save_encoders(folder, "test_resnet", size=32)
    save_bert(folder / "bert", **NO_DROPOUT)
    table = tiny_pairs(96)
    captions = [
        [text, f"{text} again"] if row % 3 else [text]
        for row, text in enumerate(table["caption"].to_pylist())
    ]
    pq.write_table(table.set_column(1, "caption", pa.array(captions)), folder / "pairs.parquet")
    pq.write_table(tiny_pairs(16, seed=1), folder / "validation.parquet")
    return {
        "model": {
            "image": {"name": "timm:test_resnet", "weights": model.image.weights, "size": 32},
            "text": {"name": model.text.name, "context_length": 20},
            "embed_dim": 16,
            "heads": {"hidden_dim": 32, "projection_dim": 8},
        },
        "data": {
            "train": str(folder / "pairs.parquet"),
            "validation": str(folder / "validation.parquet"),
            "workers": 0,
        },
        "run": {"device": "cpu", "precision": "fp32", "log_every": 1},
        "episodes": {"size": 64, "count": 3, "batch_size": 16},
        # What is off by default, and off what ranks do each by themselves.
        "loss": {"prototypical": 1.0, "teacher": 2.0},
        "align": {"dropout": 0.0, "geometry": 0.0},
        # From the closed form some gradients are rounding, whose sign Adam's first steps follow.
        # A large epsilon keeps these steps small.
        "optim": {"eps": 1e-2},
        "prototypes": {"number": 4},
        "teacher": {"number": 4},
    }


def saved_sources(folder: Path) -> dict[str, Any]:
    """Settings of `data` for the same and other pairs, by what they are."""
    table = tiny_pairs(96)
    kinds = pa.array([caption.split()[1] for caption in table["caption"].to_pylist()])
    pq.write_table(table.append_column("kind", kinds), folder / "classes.parquet")
    pq.write_table(tiny_pairs(48, seed=2), folder / "more.parquet")
    (folder / "images").mkdir()
    rows = ["image\tcaption"]
    columns = zip(table["image"].to_pylist(), table["caption"].to_pylist(), strict=True)
    for number, (image, caption) in enumerate(columns):
        (folder / f"images/{number}.png").write_bytes(image)
        (folder / f"images/{number}.txt").write_text(caption)
        rows.append(f"images/{number // 3}.png\t{caption} {number}")
    (folder / "shared.tsv").write_text("\n".join(rows))
    pack(ImageTextPairs(table, name="tiny"), folder / "shards", samples_per_shard=40)
    (folder / "ids.csv").write_text("\n".join(["sample_id", *(f"tiny/{n}" for n in range(20))]))
    classes = {"path": str(folder / "classes.parquet"), "class_column": "kind", "weight": 0.7}
    mixture = [classes, {"path": str(folder / "more.parquet"), "weight": 0.3}]
    return {
        "mixture": {"sources": mixture, "validation": 0.4},
        "shared": {"train": str(folder / "shared.tsv"), "validation": 0.3},
        "shards": {"train": str(folder / "shards")},
        "folder": {"train": str(folder / "images")},
        "without": {"without": str(folder / "ids.csv")},
    }


def of_source(given: dict[str, Any], data: dict[str, Any], **more: Any) -> dict[str, Any]:
    rest = {"workers": 0, "validation": given["data"]["validation"]}
    if "sources" not in data:
        rest["train"] = given["data"]["train"]
    return changed({**given, "data": {**rest, **data}}, **more)


def changed(given: dict[str, Any], out: Path | None = None, **sections: Any) -> dict[str, Any]:
    if out is not None:
        sections["run"] = {**sections.get("run", {}), "out": str(out)}
    return {
        **given,
        **{name: {**given.get(name, {}), **values} for name, values in sections.items()},
    }


def align_on_a_rank(
    settings: dict[str, Any], cache: str, resume: Any = "never", stop: int = 0
) -> dict[str, Any]:
    """Align with what a cache holds, until a step if one is given."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROTOCLIP_CACHE", cache)
        if stop:
            stop_in_episode(patch, stop)
        return align(settings, resume=resume)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(find_checkpoint(folder) / "model.safetensors")


def assert_near(found: Path, wanted: Path) -> None:
    """Weights of two runs are equal up to rounding."""
    ours, theirs = weights_of(found), weights_of(wanted)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        # BatchNorm takes this bias out, so it moves by rounding, and the mean with it.
        if not name.endswith(("head.0.bias", "head.1.running_mean")):
            torch.testing.assert_close(ours[name], value, atol=2e-4, rtol=2e-3)


def find_moved(settings: dict[str, Any], run: Path, out: Path, parts: Sequence[str]) -> list[str]:
    """Fine-tune an aligned run for two steps; the parts of its towers whose weights moved."""
    protoclip.finetune(
        {
            "model": {"start": str(run)},
            "data": settings["data"],
            "run": {"device": "cpu", "precision": "fp32", "out": str(out)},
            "episodes": {"size": 16, "count": 1, "batch_size": 8},
        },
        alpha=1.0,
    )
    old, new = weights_of(run), weights_of(out)
    moved = [name for name in old if not new[name].equal(old[name])]
    return [part for part in parts if any(name.startswith(f"towers.{part}") for name in moved)]


def rows_of(settings: dict[str, Any]) -> tuple[Plan, Any, Any]:
    """The plan of aligning with the pairs that could be encoded, their rows, and the model."""
    choices = choose_before_data("align", read_given("align", settings))
    plan = make_plan(resolve_settings(choices.config, choices))
    model, _ = loading.training_model(plan.config, torch.device("cpu"), plan.start)
    return *encode_pairs(plan, model), model


def stop_in_episode(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    train_step, left = Trainer.train_step, [step]

    def stopping(self: Any, *batch: Any, **how: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            signal.raise_signal(signal.SIGTERM)
        return train_step(self, *batch, **how)

    monkeypatch.setattr(Trainer, "train_step", stopping)


def run_onnx_example(folder: Path, run: Path) -> dict[str, Any]:
    """What the code of the model card of an ONNX export leaves behind, run as it stands there."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = code.replace('"RUN"', repr(str(run)))
    left: dict[str, Any] = {}
    exec(code.replace(f'folder = "{folder.name}"', f"folder = {str(folder)!r}"), left)
    return left
