"""The checkpoints of a tiny run, measured by `protoclip analyze`."""

import json
import math
import shutil

import pyarrow.parquet as pq
import pytest
import torch

from interrupting import with_changes
from protoclip.cli import main
from protoclip.config import DataConfig
from protoclip.data.pairs import ImageTextPairs
from protoclip.evaluation import datasets
from protoclip.evaluation.datasets import EvaluationData, Split
from protoclip.results.examples import analyze_run
from protoclip.training.folder import to_toml
from protoclip.training.run import train
from testing import tiny_config, tiny_pairs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with three checkpoints, the last one called a CLIP run, and held-out pairs."""
    folder = tmp_path_factory.mktemp("analyze")
    pq.write_table(tiny_pairs(seed=1), folder / "train.parquet")
    pq.write_table(tiny_pairs(80, seed=2), folder / "held_out.parquet")
    config = tiny_config(str(folder / "train.parquet"), out=str(folder / "proto"))
    often = {"run": {"save_steps": 4, "keep_checkpoints": 9}, "episodes": {"count": 3}}
    train(with_changes(config, often))
    old = shutil.ignore_patterns("step-000000004", "step-000000008")
    shutil.copytree(folder / "proto", folder / "clip", ignore=old)
    clip = with_changes(config, {"run": {"name": "CLIP"}, "loss": {"prototypical": 0.0}})
    (folder / "clip" / "config.toml").write_text(to_toml(clip))
    return folder


def test_analysis_of_a_run(runs, monkeypatch):
    """Every checkpoint is measured, and the run's own prototypes where it has some."""
    pairs = ImageTextPairs(tiny_pairs(80, seed=2), name="tiny")
    captions = [pairs.sample_captions(row) for row in range(80)]
    names = sorted({texts[0] for texts in captions})
    labels = datasets.find_positions((texts[0] for texts in captions), names)
    split = Split(images=pairs, captions=captions, labels=labels)
    emoji = EvaluationData(name="emoji", splits={"validation": split}, class_names=names)
    monkeypatch.setattr(datasets, "emoji", lambda: emoji)
    found = analyze_run(runs / "proto", data=DataConfig(train="emoji"), device=torch.device("cpu"))
    assert {name: found[name] for name in ("name", "pairs", "groups", "skipped")} == {
        "name": "tiny",
        "pairs": 80,
        "groups": 8,
        "skipped": 0,
    }
    assert [entry["step"] for entry in found["checkpoints"]] == [4, 8, 12]
    assert [entry["samples"] for entry in found["checkpoints"]] == [64, 128, 192]
    for number, entry in enumerate(found["checkpoints"]):
        assert entry.keys() == {"step", "samples", "features", "projections"}
        for values in (entry["features"], entry["projections"]):
            assert all(math.isfinite(value) for value in values.values())
            assert ("stability/image" in values) == (number > 0)
            assert {"classes/image", "alignment", "gap"} <= values.keys()
        own = {name for name in entry["projections"] if name.startswith("prototypes/")}
        assert len(own) == (10 if number > 0 else 0)  # the warm-up has none


def test_the_command_writes_a_file_for_each_run(runs, capsys):
    folders, data = [str(runs / "proto"), str(runs / "clip")], str(runs / "held_out.parquet")
    main(["analyze", *folders, "--data", data, "--json"])
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert [analysis["name"] for analysis in found] == ["tiny", "CLIP"]
    assert json.loads((runs / "clip" / "analysis.json").read_text()) == found[1]
    assert "projections" not in found[1]["checkpoints"][0]  # CLIP's heads are not trained
    assert f"{runs / 'clip'}: a single checkpoint" in shown.err
    assert f"{runs / 'clip'}: only {found[1]['pairs']} pairs" in shown.err
