"""Few pairs are learned by heart, and the last line says whether that worked."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import protoclip
from interrupting import with_changes
from protoclip.cli import COMMANDS
from protoclip.cli.parsing import parse
from protoclip.config import Config, SourceConfig
from protoclip.data.loader import Batch
from protoclip.data.pairs import ImageTextPairs
from protoclip.data.sampler import episodes
from protoclip.data.view import PairsView
from protoclip.models.protoclip import Embeddings
from protoclip.training import presets, trainer
from protoclip.training.run import align, train
from testing import tiny_config, tiny_pairs
from tiny_align import changed, tiny_alignment


@pytest.mark.parametrize(("rate", "says"), [(3e-3, "this can learn"), (1e-12, "does not learn")])
def test_a_run_says_whether_it_can_learn(rate, says, tmp_path, monkeypatch, capsys):
    """It ends when all pairs are known, though equal captions belong to several images."""
    monkeypatch.setattr(presets, "OVERFIT_STEPS", 80)
    pq.write_table(tiny_pairs(), tmp_path / "pairs.parquet")
    config = tiny_config(str(tmp_path / "pairs.parquet"), out=str(tmp_path / "run"))
    config = with_changes(config, {"optim": {"learning_rate": rate}, "run": {"save_minutes": 0.0}})
    results = train(replace(config, run=replace(config.run, overfit=8)))
    facts = results["overfit"]
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert (facts["recall"] == 1) == (facts["steps"] < 80) == (rate > 1e-3)
    assert (results["samples_seen"], results["metrics"]) == (8 * facts["steps"], {})
    # Killed before the results were written, it trains no further step.
    (tmp_path / "run" / "results.json").unlink()
    again = replace(config, run=replace(config.run, overfit=8))
    assert train(again, resume="auto")["overfit"] == facts


@pytest.mark.parametrize("command", ["train", "align", "finetune"])
def test_a_short_option_stands_for_the_setting(command):
    given = parse(COMMANDS[command], ["--run.seed", "3", "--overfit", "64"]).settings()
    assert given["run"] == {"seed": 3, "overfit": 64}


def test_an_image_of_two_rows_is_one_image():
    """Perfect features know all pairs: no row is nearer to its own text than to the other one's."""
    image = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 0, 1]])
    text = torch.tensor([[1, 0.1, 0], [1, -0.1, 0], [0, 0, 1]])
    features = Embeddings(
        image_features=image,
        text_features=text,
        image_projections=None,
        text_projections=None,
        logit_scale=torch.tensor(1.0),
        prototype_logit_scale=torch.tensor(1.0),
    )
    batch = Batch(
        position=torch.arange(3), sample_id=["a", "b", "c"], image=image[:, None, None], text=text
    )
    names = trainer.names_of_images(batch, {})
    assert trainer.recall(features, names, [b"1", b"2", b"3"]) == 1
    assert trainer.recall(features, batch.sample_id, [b"1", b"2", b"3"]) < 1


def test_it_takes_no_teachers_and_no_weights_of_sources():
    """Each pair is in each batch once, and nothing else is learned."""
    sources = [SourceConfig(path=name, weight=1.0) for name in ("a", "b")]
    parts = [(ImageTextPairs(tiny_pairs(n), name=f"{n}"), np.arange(n)) for n in (3, 5)]
    config = tiny_config("a", out="run", teacher="emoji")
    config = with_changes(
        config,
        {"teacher": {"distil": 1.0}, "data": {"sources": sources}, "run": {"overfit": 8}},
    )
    config = Config.from_dict(presets.read_given("train", config))
    assert config.external_teachers == {}
    assert sorted(episodes(config, PairsView(parts))(3).rows.tolist()) == [*range(8)]


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


def test_align_goes_on_where_it_left_pairs_out(tmp_path, monkeypatch):
    """A bad image, so that seven of eight pairs are one batch."""
    monkeypatch.setattr(presets, "OVERFIT_STEPS", 2)
    given, table = tiny_alignment(tmp_path), tiny_pairs(8)
    images = pa.array([b"bad", *table["image"].to_pylist()[1:]])
    pq.write_table(table.set_column(0, "image", images), tmp_path / "few.parquet")
    data = {"train": str(tmp_path / "few.parquet"), "max_bad_share": 0.5}
    given = changed(given, data=data, run={**given["run"], "overfit": 8})
    facts = align(changed(given, tmp_path / "run"))["overfit"]
    assert facts["pairs"] == 7
    assert align(changed(given, tmp_path / "run"), resume="auto")["overfit"] == facts
    (tmp_path / "run" / "results.json").unlink()
    assert align(changed(given, tmp_path / "run"), resume="auto")["overfit"] == facts
