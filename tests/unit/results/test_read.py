"""What is read from run folders, whole or not."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from protoclip.cli import COMMANDS, main
from protoclip.cli.spec import parse
from protoclip.config import PrototypeConfig, TeacherConfig
from protoclip.models.saved import STATE
from protoclip.results.page import (
    FOLLOWS,
    compare_settings,
    describe_run,
    list_commands,
    list_times,
)
from protoclip.results.read import read_run, read_runs
from protoclip.training.run_folder import to_toml
from testing import tiny_config


def begun(folder, **settings):
    """A run folder as it is right after its start."""
    folder.mkdir()
    text = to_toml(tiny_config(out=str(folder)))
    for old, new in settings.items():
        text = text.replace(f"{old} = ", f"{old} = {new} # ", 1)
    (folder / "config.toml").write_text(text)
    return folder


def test_a_run_that_has_just_begun_has_its_settings_and_nothing_else(tmp_path):
    run = read_run(begun(tmp_path / "run"))
    assert (run.name, run.seed, run.steps, run.last_step) == ("tiny", 0, 16, 0)
    assert (run.results, run.analysis, run.curves, run.skipped) == (None, None, {}, [])
    assert (run.problem, run.environment, list(run.checkpoints)) == ("", {}, [])


def test_curves_are_the_finite_values_of_whole_lines(tmp_path):
    """A repeated step counts once, with its last value."""
    folder = begun(tmp_path / "run")
    values = [(1, 3.0), (2, None), (2, float("inf")), (3, 1.0), (3, 2.0), (4, True), (5, "x")]
    written = [json.dumps({"step": step, "episode": 0, "train/a": value}) for step, value in values]
    damaged = ["[1]", '{"step": "x", "train/a": 1}', "[" * 100_000, '{"step": 6, "train/a"']
    (folder / "metrics.jsonl").write_text("\n".join([*written, *damaged]))
    run = read_run(folder)
    steps, found = run.curves["train/a"]
    np.testing.assert_array_equal(steps, [1, 3])
    np.testing.assert_array_equal(found, [3, 2])
    assert run.last_step == 3


def test_a_run_of_another_version_is_read_as_far_as_it_goes(tmp_path):
    run = read_run(begun(tmp_path / "run", log_every="1\nshuffled = 3"))
    assert run.config is None
    assert (
        "another version of protoclip wrote this run (run.shuffled: no such setting" in run.problem
    )
    assert run.settings["episodes.batch_size"] == 16


def test_runs_do_not_differ_by_what_earlier_versions_left_open(tmp_path):
    """The features to cluster, which a plan fills by rule."""
    runs = []
    for name, source in (("1", "auto"), ("2", "queue")):
        config = replace(
            tiny_config(out=str(tmp_path / name)),
            prototypes=PrototypeConfig(source=source, number=8),
            teacher=TeacherConfig(features="seen", number=8),
        )
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").write_text(to_toml(config))
        runs.append(read_run(tmp_path / name))
    found = compare_settings(runs)
    assert found["differ"] == {}
    assert found["shared"]["prototypes.source"] == ("queue", FOLLOWS)
    clip = read_run(begun(tmp_path / "clip"))
    assert compare_settings([runs[0], clip])["differ"]["prototypes.source"] == ["queue", "extract"]


def test_damaged_files_beside_the_settings_are_left_out(tmp_path):
    folder = begun(tmp_path / "run")
    (folder / "skipped.jsonl").write_text('{"sample_id": "a"}\n{"sam')
    (folder / "analysis.json").write_text('{"checkpoints": []}')
    run = read_run(folder)
    assert ([line["sample_id"] for line in run.skipped], run.analysis) == (["a"], None)


@pytest.mark.parametrize(
    ("file", "content", "command"),
    [
        ("wise_ft.json", '{"alpha": 0.5, "best_alpha": 0.5}', "finetune"),
        ("wise_ft.json", "[", "finetune"),
        (STATE, '{"content": {"sources": [{"rows": 3, "encoded": ""}]}}', "align"),
        (STATE, '{"content": {"sources": [{"rows": 3}]}}', "train"),
        (STATE, '{"content": {}}', "train"),
    ],
)
def test_the_command_of_a_run_follows_from_its_files(file, content, command, tmp_path):
    folder = begun(tmp_path / "run")
    (folder / "checkpoints" / "step-000000001").mkdir(parents=True)
    path = folder / ("checkpoints/step-000000001" if file == STATE else ".") / file
    path.write_text(content)
    assert read_run(folder).command == command


def test_what_fine_tuning_has_not_ended_is_fine_tuned_again(tmp_path):
    """It leaves no file of its own before its end, but freezes BatchNorm. And the command of a run
    that was copied to a store does not go on with that copy."""
    folder = begun(tmp_path / "run", frozen_batch_norm="true")
    text = (folder / "config.toml").read_text()
    assert read_run(folder).command == "train"
    text = text.replace("[model]", '[model]\nstart = "x"').replace(
        "[run]", '[run]\nsync = "s3://a"'
    )
    (folder / "config.toml").write_text(text)
    again, *_ = list_commands([read_run(folder)])
    assert again == f"protoclip finetune --config {folder}/config.toml --run.out FOLDER " + (
        "--run.sync none"
    )
    assert parse(COMMANDS["train"], again.split()[2:]).run.sync is None


@pytest.mark.parametrize(
    ("environment", "start"),
    [
        ({}, "protoclip train"),
        ({"hosts": None, "ranks": 1}, "protoclip train"),
        ({"hosts": 1, "ranks": 8}, "torchrun --nproc-per-node 8 -m protoclip train"),
        (
            {"hosts": 4, "ranks": 32},
            "torchrun --nnodes 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 "
            "--nproc-per-node 8 -m protoclip train",
        ),
    ],
)
def test_a_run_of_several_ranks_is_started_with_as_many(environment, start, tmp_path):
    folder = begun(tmp_path / "run")
    results = {"name": "tiny", "seed": 0, "samples_seen": 1, "train_seconds": 1.0, "metrics": {}}
    (folder / "results.json").write_text(json.dumps({**results, "environment": environment}))
    again, *others = list_commands([read_run(folder)])
    assert again.startswith(f"{start} --config ")
    assert all(command.startswith("protoclip ") for command in others)


def test_times_of_unfinished_runs_are_at_least_those_of_the_checkpoint(tmp_path):
    """Parts are logged at an episode's end, so what an episode lost is in none of them."""
    folder = begun(tmp_path / "run")
    parts = {f"train/seconds/{part}": 6.0 for part in ("data", "train")}
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 4, **parts}))
    run = read_run(folder)
    assert describe_run(run)["time"] == "at least 12s"
    kept = folder / "checkpoints" / "step-000000006"
    kept.mkdir(parents=True)
    (kept / STATE).write_text('{"seconds": 75.0}')
    run = read_run(folder)
    assert describe_run(run)["time"] == "at least 1m 15s"
    (row,) = list_times([run])
    assert (row["total"], row["at_least"]) == (75.0, True)
    assert ("other", 63.0, 0.84) in row["parts"]
    assert describe_run(read_run(begun(tmp_path / "new")))["time"] == "not known"


def test_a_mixture_is_named_by_its_sources(tmp_path):
    folder = begun(tmp_path / "run")
    text = (folder / "config.toml").read_text()
    sources = '[[data.sources]]\npath = "a.tsv"\n[[data.sources]]\npath = "hf:b"\n'
    assert describe_run(read_run(folder))["data"] == "emoji"
    assert describe_run(read_run(folder))["positives"] == "pair"
    text = re.sub("^sources = .*$", "", text, flags=re.M)
    (folder / "config.toml").write_text(text + sources)
    assert describe_run(read_run(folder))["data"] == "a.tsv, hf:b"


def test_labels_tell_runs_apart(tmp_path):
    one, two, three, four = (tmp_path / name for name in "abcd")
    begun(one)
    begun(two, seed=1)
    begun(three, seed=1)
    begun(four, name='"other"')
    found = read_runs([one, two, three, four])
    assert [run.label for run in found] == [
        f"tiny ({one})",
        f"tiny ({two})",
        f"tiny ({three})",
        "other",
    ]
    found = read_runs([one, two, four, one])
    assert [run.label for run in found] == ["tiny, seed 0", "tiny, seed 1", "other"]


def test_missing_libraries_are_named(monkeypatch, capsys):
    monkeypatch.setattr("protoclip.cli.report.NEEDED", ("jinja2", "no_such_library"))
    with pytest.raises(SystemExit):
        main(["report", "run"])
    said = capsys.readouterr().err
    assert said == (
        "protoclip: error: report: needs no_such_library; pip install 'protoclip[report]' "
        "(docs/report.md)\n"
    )
