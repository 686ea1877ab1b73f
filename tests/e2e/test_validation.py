"""A run on one's own pairs is evaluated by pairs that were held out of them."""

import io
import json
import re
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import protoclip
from interrupting import read_metrics, train_until, with_changes
from protoclip.cli import main
from protoclip.config import Config, ImageTowerConfig, ModelConfig, TextTowerConfig
from protoclip.data import sources
from protoclip.data.pairs import Pairs
from protoclip.data.split import SHARE
from protoclip.evaluation import validation
from protoclip.evaluation.metrics import METRICS, TASKS
from protoclip.evaluation.paired import read_results
from protoclip.evaluation.suite import RECORD_TASKS
from protoclip.evaluation.validation import note_trained_guards, split_validation
from protoclip.models.checkpoint import read_config
from protoclip.results.compare import compare_runs
from protoclip.results.table import TRAINED_ON, compare_headlines, print_table, table_of_runs
from protoclip.training import plan
from protoclip.training.run import train
from testing import noisy_pairs, run_distributed, tiny_config

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tables of 200 pairs whose images and captions all differ, with their colour as class."""
    top = tmp_path_factory.mktemp("own")
    for number, name in enumerate("ab"):
        table = noisy_pairs(200, seed=number, more=f" {name}")
        pq.write_table(table, top / f"{name}.parquet")
    return top


# Three steps, of which the last one has prototypes, without an evaluation.
SHORT: dict[str, Any] = {
    "run": {"evaluate_every": 0, "evaluate": False},
    "episodes": {"size": 16, "count": 3, "locked_image": 0},
}

AT_THE_END = {**SHORT, "run": {"evaluate_every": 0}}


def config_for(folder: Path, out: Path, **data: object) -> Config:
    sections = {
        "run": {"evaluate_every": 2, "save_minutes": 0.0},
        "data": {"validation": 0.1, **data},
    }
    return with_changes(tiny_config(str(folder / "a.parquet"), out=str(out)), sections)


def test_a_run_ends_with_held_out_numbers(folder, tmp_path, capsys):
    """Twenty pairs are held out; with a class column all tasks are there. The best checkpoint is
    kept, and `compare` pairs runs by sample."""
    best = {"run": {"keep_best": "eval/validation/retrieval/image_to_text@5"}}
    config = with_changes(config_for(folder, tmp_path / "one", class_column="kind"), best)
    metrics = train(config)["metrics"]
    said = capsys.readouterr().err
    few = "held out to evaluate the run on, so values move in steps of 5 points; data.validation"
    assert f"20 of 200 pairs are {few}" in said
    assert "training on 180 pairs" in said
    tasks = {key.removeprefix("eval/validation/").split("/")[0] for key in metrics}
    assert tasks == {
        *("zero_shot", "retrieval", "linear_probe", "knn", "clustering", "modality_gap")
    }
    assert all(np.isfinite(value) for value in metrics.values())
    shown = re.findall(r"^(eval/validation/\S+) ", PAGE.read_text(encoding="utf-8"), re.M)
    assert shown == [name for name in metrics if name in shown]
    assert len(shown) == 3
    assert "eval/validation/zero_shot/acc5" not in metrics  # of three classes
    events = EventAccumulator(str(tmp_path / "one" / "tensorboard"))
    events.Reload()
    assert metrics.keys() <= {*events.Tags()["scalars"]}
    results = read_results(tmp_path / "one")
    assert results.metrics == metrics
    assert pq.read_table(results.samples["validation"]).num_rows == 40
    assert len(read_metrics(tmp_path / "one", "eval/validation/knn/acc1")) == 2
    assert "best_checkpoint" in json.loads((tmp_path / "one/results.json").read_text())


def stop_at_2(config: Config) -> None:
    assert train_until(2, config)["stopped"] == "SIGTERM"


def goes_on(config: Config) -> str:
    """What a rank says that goes on: an error, or nothing."""
    try:
        train(config, resume="auto")
    except ValueError as error:
        return str(error)
    return ""


def test_a_tenth_of_few_pairs_is_held_out_also_of_a_run_that_goes_on(folder, tmp_path):
    config = with_changes(config_for(folder, tmp_path / "run", validation=None), SHORT)
    stop_at_2(config)
    assert goes_on(config) == ""
    assert read_config(tmp_path / "run").data.validation == 0.1
    data = validation.open_data(str(tmp_path / "run"))
    assert len(data.splits["test"].images) == 20


def test_a_run_that_began_with_fewer_held_out_goes_on_so(folder, tmp_path):
    """Up to version 1.0 they were 2%, or none of 200, and no file says so."""
    config = with_changes(config_for(folder, tmp_path / "run", validation=None), SHORT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "choose_share", lambda _: SHARE)
        stop_at_2(config)
    assert goes_on(config) == ""
    assert read_config(tmp_path / "run").data.validation is None


def test_other_data_at_the_same_path_are_noticed(folder, tmp_path):
    """In another order, with fewer rows and with more; all ranks say so. The same pairs, saved in
    another way or moved, are taken."""
    table, path = pq.read_table(folder / "a.parquet"), tmp_path / "a.parquet"
    pq.write_table(table, path)
    config = config_for(folder, tmp_path / "run", train=str(path))
    config = with_changes(config, SHORT)
    run_distributed(stop_at_2, 2, config)
    grown = pa.concat_tables([table, pq.read_table(folder / "b.parquet")])
    for other, words in [
        (table.take(list(range(200))[::-1]), "other captions"),
        (table[:160], "number of rows: 200 before, 160 now"),
        (grown, "number of rows: 200 before, 400 now"),
    ]:
        pq.write_table(other, path)
        for said in run_distributed(goes_on, 2, config):
            assert f"a.parquet: not the data that the run began with ({words})" in said
    path.unlink()
    (tmp_path / "moved").mkdir()
    pq.write_table(table, tmp_path / "moved" / "a.parquet", row_group_size=30)
    moved = with_changes(config, {"data": {"train": str(tmp_path / "moved" / "a.parquet")}})
    assert run_distributed(goes_on, 2, moved) == ["", ""]
    message = goes_on(config)
    assert "run was started with other settings: data.train" in message
    assert "; data move until a run is finished, as this one is: restore them" in message


def test_a_run_that_was_trained_on_what_evaluates_it_is_not_called_better(folder, tmp_path, capsys):
    """Its results keep how many pairs these are; `compare`, the report and `evaluate` say so, and
    test no difference of it. Of a run on other pairs they know that there are none."""
    one, two = (pq.read_table(folder / f"{name}.parquet") for name in "ab")
    measured, leaky = tmp_path / "measured.parquet", tmp_path / "leaky.parquet"
    pq.write_table(two.slice(0, 60), measured)
    pq.write_table(pa.concat_tables([one.slice(0, 100), two.slice(5, 100)]), leaky)
    runs = {"clean": folder / "a.parquet", "leaky": leaky}
    for name, path in runs.items():
        config = config_for(folder, tmp_path / name, train=str(path), validation=str(measured))
        train(with_changes(config, {**AT_THE_END, "run": {"evaluate_every": 0, "name": name}}))
    clean, other = (read_results(tmp_path / name) for name in runs)
    assert clean.trained_on == {"validation": {"pairs": 60, "images": 0}}
    assert other.trained_on == {"validation": {"pairs": 60, "images": 55}}
    entries = compare_runs([clean, other])
    differences = [value.get("difference") for value in entries[1]["metrics"].values()]
    assert any(difference["interval"] is not None for difference in differences)
    assert not any(
        difference["p"] is not None or difference["beyond"] for difference in differences
    )
    message = "trained on 55 of 60 pairs of"
    assert all(
        f"leaky was {message} validation." in headline.rest
        for headline in compare_headlines(entries)
    )
    capsys.readouterr()
    print_table(table_of_runs(entries))
    shown = capsys.readouterr().out
    assert shown.count(f"{message} validation") == 1
    assert TRAINED_ON in " ".join(shown.split())
    words = [str(tmp_path / "leaky"), "--compare-to", str(tmp_path / "clean")]
    main(["evaluate", *words, "--data", str(measured), "--workers", "0"])
    said = capsys.readouterr()
    assert said.out.count(f"{message} measured") == 1
    warning = f"{measured}: {tmp_path / 'leaky'} was trained on 55 of these 60 pairs"
    assert warning in said.err
    assert not any("*" in line for line in said.out.splitlines() if "│" in line)
    for name, images in (("clean", 0), ("leaky", 55)):  # the function counts and warns alike
        loaded = protoclip.load(tmp_path / name)
        (record,) = protoclip.evaluate(*loaded, measured, "retrieval", workers=0)
        assert record["trained_on"] == {"pairs": 60, "images": images}
        assert (warning in capsys.readouterr().err) == (images > 0)


def records_on(data: Path, *words: str) -> dict[str, float]:
    """The metrics of a model on data, as `evaluate --json` gives them, by their names in runs."""
    output = io.StringIO()
    with redirect_stdout(output):
        main(["evaluate", *words, "--data", str(data), "--json", "--workers", "0", "--no-cache"])
    records = json.loads(output.getvalue())
    return {
        name: record["metrics"][metric.key]
        for record in records
        for name, metric in METRICS.items()
        if RECORD_TASKS.get(metric.task, metric.task) == record["task"]
        and metric.in_runs
        and metric.key in record["metrics"]
    }


def test_models_are_evaluated_by_the_pairs_that_a_run_held_out(folder, tmp_path, monkeypatch):
    """Its own numbers are those of its results. So it is with a table that evaluated it."""
    monkeypatch.chdir(tmp_path)
    for name, share in (("held", 0.1), ("table", str(folder / "b.parquet"))):
        config = config_for(folder, tmp_path / name, class_column="kind", validation=share)
        metrics = train(with_changes(config, AT_THE_END))["metrics"]
        records = records_on(Path(name), name, "--tasks", *TASKS)
        assert {f"eval/validation/{key}": value for key, value in records.items()} == metrics
    (note, *_) = validation.open_data("table").notes
    assert note.startswith("table: the ")
    assert note.endswith(f"of its validation set, {folder / 'b.parquet'}, are the test set")
    data = validation.open_data("held")
    assert (data.name, len(data.splits["test"].images)) == ("held-validation", 20)
    assert data.notes == ["held: the 20 images that it held out are the test set"]
    (guard,) = validation.open_guards(with_changes(config, {"run": {"guard": ["held"]}}), [])
    assert guard.name == "held-validation"
    with pytest.raises(ValueError, match=r"^held: stands for the pairs that it held out; ask"):
        validation.open_data("held", split="train")
    (checkpoint, *_) = Path("held", "checkpoints").iterdir()
    assert validation.open_data(str(checkpoint)).name == data.name


def test_pairs_that_a_run_held_out_are_none_that_it_was_trained_on(folder, tmp_path, capsys):
    """One that held out fewer was trained on the rest."""
    runs = {"held": 0.1, "others": 0.05}
    for name, share in runs.items():
        train(with_changes(config_for(folder, tmp_path / name, validation=share), AT_THE_END))
    for name in runs:
        capsys.readouterr()
        main(["evaluate", str(tmp_path / name), "--data", str(tmp_path / "held")])
        warned = "was trained on 10 of these 20 pairs" in capsys.readouterr().err
        assert warned == (name == "others")
        config = config_for(folder, tmp_path / "new", validation=runs[name])
        config = with_changes(config, {"run": {"guard": [str(tmp_path / "held")]}})
        divided = split_validation(config, sources.open_samples(config))
        notes = note_trained_guards(
            config, validation.open_guards(config, divided.data), divided.training
        )
        assert bool(notes) == (name == "others")


def held_out_of(config: Config) -> tuple[set[str], set[str], list[str]]:
    """The captions that evaluate a run, those that it trains on, and what it is told."""
    training, data, notes = split_validation(config, sources.open_samples(config))
    assert isinstance(training, Pairs)
    rows = range(len(training))
    captions = {text for row in rows for text in training.sample_captions(row)}
    return (
        {text for texts in data[0].splits["validation"].captions for text in texts},
        captions,
        notes,
    )


def test_a_run_is_not_evaluated_by_what_its_start_was_trained_on(folder, tmp_path):
    """Neither with a larger share of the same pairs, nor after others were added, nor by a start's
    start; what these held out stays held out. A source to evaluate by says what it shares."""
    one, both = tmp_path / "one.parquet", tmp_path / "both.parquet"
    tables = [pq.read_table(folder / f"{name}.parquet") for name in "ab"]
    pq.write_table(tables[0], one)
    pq.write_table(pa.concat_tables(tables), both)
    first = with_changes(
        config_for(folder, tmp_path / "first", train=str(one)),
        SHORT,
    )
    train(first)
    held, trained, _ = held_out_of(first)
    assert (len(held), len(trained)) == (20, 180)

    def after(start: str, **data: object) -> Config:
        config = with_changes(first, {"run": {"out": str(tmp_path / "next")}, "data": data})
        return replace(config, model=ModelConfig(start=str(tmp_path / start)))

    more = held_out_of(after("first", validation=0.25))
    assert more[:2] == (held, trained)
    assert "20 pairs are held out, not 50, since model.start learned from the others" in more[2][0]
    for model in (
        ModelConfig(image=ImageTowerConfig(name=str(tmp_path / "first"))),
        ModelConfig(text=TextTowerConfig(name=str(tmp_path / "first"))),
    ):
        aligned = held_out_of(replace(after("first", validation=0.25), model=model))
        assert aligned[:2] == more[:2]
        assert re.search(r"since model\.(image|text)\.name learned from", aligned[2][0])
    measured, training, _ = held_out_of(after("first", validation=0.25, train=str(both)))
    assert held < measured
    assert not measured & (trained | training)
    train(after("first", validation=0.25, train=str(both)))
    checkpoint = "next/checkpoints/step-000000003"
    again, training, _ = held_out_of(after(checkpoint, validation=0.02, train=str(both)))
    assert (again, training & measured) == (measured, set())
    other = {"train": str(folder / "b.parquet"), "validation": str(one)}
    (note,) = held_out_of(after("first", **other))[2]
    assert "of 200 pairs, the image of 180 is trained on, and a caption of 180" in note
    with pytest.raises(ValueError, match=r"one\.parquet: every image of it is trained on"):
        held_out_of(with_changes(first, {"data": {"validation": str(one)}}))
    pq.write_table(tables[1], one)
    notes = held_out_of(after("first", train=str(both)))[2]
    assert "have changed since it was trained (other captions)" in notes[0]
