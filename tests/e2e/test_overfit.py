"""Few pairs are learned by heart, and the last line says whether that worked."""

from dataclasses import replace

import pyarrow.parquet as pq
import pytest

import protoclip
from interrupting import with_changes
from protoclip.training import presets
from protoclip.training.run import align, train
from testing import tiny_config, tiny_pairs
from tiny_align import changed, tiny_alignment


@pytest.mark.parametrize(
    ("rate", "steps", "says"), [(3e-3, 80, "this can learn"), (1e-12, 12, "does not learn")]
)
def test_a_run_says_whether_it_can_learn(rate, steps, says, tmp_path, monkeypatch, capsys):
    """It ends when all pairs are known, though equal captions belong to several images."""
    monkeypatch.setattr(presets, "OVERFIT_STEPS", steps)
    pq.write_table(tiny_pairs(), tmp_path / "pairs.parquet")
    config = tiny_config(str(tmp_path / "pairs.parquet"), out=str(tmp_path / "run"))
    config = with_changes(config, {"optim": {"learning_rate": rate}, "run": {"save_minutes": 0.0}})
    results = train(replace(config, run=replace(config.run, overfit=8)))
    facts = results["overfit"]
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert (facts["recall"] == 1) == (facts["steps"] < steps) == (rate > 1e-3)
    assert (results["samples_seen"], results["metrics"]) == (8 * facts["steps"], {})
    # Killed before the results were written, it trains no further step.
    (tmp_path / "run" / "results.json").unlink()
    again = replace(config, run=replace(config.run, overfit=8))
    assert train(again, resume="auto")["overfit"] == facts


def test_align_and_finetune_learn_few_pairs_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(presets, "OVERFIT_STEPS", 3)
    given = tiny_alignment(tmp_path)
    align(changed(given, tmp_path / "aligned", run={"overfit": 8}))
    tuned = {
        "model": {"start": str(tmp_path / "aligned")},
        "data": {"train": given["data"]["train"], "workers": 0},
        "run": {"device": "cpu", "out": str(tmp_path / "tuned"), "overfit": 8},
    }
    facts = protoclip.finetune(tuned)
    assert facts["overfit"]["pairs"] == 8
    said = capsys.readouterr().err
    assert len([line for line in said.splitlines() if "run.overfit: " in line]) == 2
    assert "align.*: no effect" not in said
    # An earlier version kept what `align` decides in the settings of such a run.
    kept = tmp_path / "tuned" / "config.toml"
    kept.write_text(kept.read_text().replace("dropout = 0.2", "dropout = 0.0"))
    assert "dropout = 0.2" not in kept.read_text()
    (tmp_path / "tuned" / "results.json").unlink()
    again = protoclip.finetune(tuned, resume="auto")
    assert again["overfit"] == facts["overfit"]


def test_align_that_cannot_learn_says_so(tmp_path, monkeypatch):
    """From the closed form it would know most pairs before the first step."""
    monkeypatch.setattr(presets, "OVERFIT_STEPS", 2)
    still = {"learning_rate": 1e-12}
    given = changed(tiny_alignment(tmp_path), tmp_path / "run", run={"overfit": 8}, optim=still)
    assert align(given)["overfit"]["recall"] < 0.4
