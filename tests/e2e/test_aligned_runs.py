"""Finished runs of `protoclip align` in other commands: exports, fine-tuning, reports."""

import shutil
from contextlib import redirect_stderr
from pathlib import Path

import pytest

import protoclip
from protoclip import cli
from protoclip.models.start import find_start
from protoclip.training.align import align
from tiny_align import of_source


@pytest.fixture(scope="module")
def ended(given, sources, tmp_path_factory) -> dict[str, Path]:
    """Finished runs, by their head. What each said is in a file beside it."""
    folder = tmp_path_factory.mktemp("ended")
    for head in ("linear", "mlp"):
        more = {"align": {"head": head}, "run": {"out": str(folder / head)}}
        with (folder / f"{head}.txt").open("w") as said, redirect_stderr(said):
            align(of_source(given, sources["shared"], episodes={"size": 16, "count": 2}, **more))
    return {head: folder / head for head in ("linear", "mlp")}


def test_fine_tuning_goes_on_with_the_same_data(ended, sources, tmp_path, capsys):
    """By LoRA. Rows with one image are no other data."""
    assert not find_start(str(ended["mlp"])).heads_are_new
    results = protoclip.finetune(
        {
            "model": {"start": str(ended["mlp"]), "lora": 2},
            "data": {**sources["shared"], "workers": 0},
            "run": {"device": "cpu", "precision": "fp32", "out": str(tmp_path / "tuned")},
            "episodes": {"size": 16, "count": 1, "batch_size": 8},
        },
        alpha=1.0,
    )
    assert results["steps"] == 2
    said = capsys.readouterr().err
    assert "the data of" not in said
    assert "15 of 96 pairs are held out" in said


def test_what_an_mlp_closes_is_said_before_training(ended, tmp_path):
    """And it is true; test_export has the other formats of a tower that ends in an MLP."""
    said = ended["mlp"].with_suffix(".txt").read_text()
    note = "note: model.projection = mlp: its image tower cannot be exported as timm"
    assert said.index(note) < said.index("training on")
    formats = {"linear": ("open_clip", "timm"), "mlp": ("open_clip", "timm", "onnx")}
    made = {
        head: {*protoclip.export(ended[head], tmp_path / head, formats=of)["formats"]}
        for head, of in formats.items()
    }
    assert made == {"linear": {"open_clip", "timm"}, "mlp": {"open_clip", "onnx"}}


@pytest.mark.parametrize(
    "line",
    [
        "evaluate {run} --data {pairs}",
        "report {run} --out {out}.html",
        "analyze {run} --data {pairs} --samples 60",
        "embed {run} --data {pairs} --out {out}.parquet",
        "explore {run} --data {pairs} --static {out}",
        "embed-teacher --teacher {run} --data.train {pairs} --out {out}",
    ],
)
def test_commands_take_an_aligned_run(line, given, ended, tmp_path):
    run = shutil.copytree(ended["linear"], tmp_path / "run")
    words = line.format(run=run, pairs=given["data"]["validation"], out=tmp_path / "out").split()
    cli.main(words)
    if "{out}" in line:
        assert list(tmp_path.glob("out*"))
