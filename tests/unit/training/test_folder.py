"""Run folders: checkpoints, damaged files, copies in a bucket, and settings that may change."""

import errno
import os
import re
import time
import tomllib
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from threading import Event
from typing import Any
from unittest.mock import Mock

import fsspec
import pytest
import tomli_w
import torch

from interrupting import with_changes, with_out
from protoclip.cli.spec import merge_trees
from protoclip.config import Config, ImageTowerConfig, ModelConfig, SourceConfig, flatten
from protoclip.models import checkpoint as saved
from protoclip.models.checkpoint import CHECKSUMS, checkpoints, damage
from protoclip.training import folder as run_folder
from protoclip.training.folder import (
    FREE,
    ROUNDING,
    CheckpointWriter,
    Copies,
    ask_store,
    check_settings,
    fetch_run,
    keep_chosen,
    list_settings,
    parse_begun,
    to_toml,
)
from protoclip.training.plan import resolve_settings
from testing import build_model, tiny_config, tiny_model


def state(weights: dict[str, torch.Tensor] | None = None) -> dict[str, Any]:
    few = {"w": torch.ones(1000)}
    return {"model": weights or few, "optimizer": few, "source": {"queue": few}}


def writer_of(run: Path, **more: Any) -> CheckpointWriter:
    settings: dict[str, Any] = {"every_steps": 0, "every_minutes": 0.0, "keep": 2}
    return CheckpointWriter(run, **{"description": {}, **settings, **more})


def test_a_nested_state_comes_back_as_it_was(tmp_path, monkeypatch):
    """With keys in the same order, although training changes it while a thread writes."""
    model = build_model(tiny_model(), seed=0)
    rows, ids = torch.arange(3), ["a", "b"]
    nested = {"z": rows, "a": [1.5, None, ids, {"flag": torch.ones(2, dtype=torch.bool)}]}
    writer = writer_of(tmp_path)
    writer.save(3, {**state(dict(model.state_dict())), "source": nested, "empty": {}, "step": 3})
    rows += 1
    ids[0] = "c"
    writer.wait()
    found = saved.read_checkpoint(writer.folder(3), model)
    assert list(found) == ["format", "source", "empty", "step", "model", "optimizer"]
    assert list(found["source"]) == ["z", "a"]
    assert found["source"]["z"].tolist() == [0, 1, 2]
    assert found["source"]["a"][:3] == [1.5, None, ["a", "b"]]
    assert torch.equal(found["source"]["a"][3]["flag"], torch.ones(2, dtype=torch.bool))
    assert (found["empty"], found["step"]) == ({}, 3)
    assert found["model"].keys() == model.state_dict().keys()
    assert torch.equal(found["optimizer"]["w"], torch.ones(1000))
    monkeypatch.setattr(saved, "rank", lambda: 1)
    other = saved.read_checkpoint(writer.folder(3), model)
    assert (other["model"], other["optimizer"]) == ({}, {})


def test_training_tries_again_a_minute_after_it_could_not_save(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    writer = writer_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left")))
        writer.save(7, state())
        writer.wait()
    now[0] = run_folder.RETRY_AFTER - 1
    assert not writer.is_due(8, episode_end=False)
    now[0] = run_folder.RETRY_AFTER
    assert writer.is_due(8, episode_end=False)
    writer.save(8, state())
    writer.wait()
    now[0] = 3 * run_folder.RETRY_AFTER
    assert not writer.is_due(9, episode_end=False)


def test_new_checkpoints_outlive_later_ones_that_are_damaged(tmp_path):
    """A run that went on from before them must not remove what it writes now."""
    writer = writer_of(tmp_path)
    for step in (90, 100):
        writer.save(step, state())
        writer.wait()
        (writer.folder(step) / "model.safetensors").write_bytes(b"")
    for step in (81, 85):
        writer.save(step, state())
        writer.wait()
    whole = [int(found.name[-9:]) for found in checkpoints(tmp_path) if damage(found) is None]
    assert whole == [81, 85]


def objects() -> dict[str, Any]:
    return fsspec.get_filesystem_class("s3").store


def complete() -> list[int]:
    return sorted(int(f[1]) for n in objects() if (f := re.search(rf"-(\d+)/{CHECKSUMS}$", n)))


def whole() -> bool:
    """Whether each checkpoint with checksums has all files that it names."""
    folders = [name.rpartition("/")[0] for name in objects() if name.endswith(CHECKSUMS)]
    return all(
        f"{folder}/{name}" in objects()
        for folder in folders
        for name in ("model.safetensors", "model.json", "state.json")
    )


CONFIG = with_changes(tiny_config(out="run"), {"run": {"sync": "s3://bucket/run"}})


class Run:
    """A run that only saves; `copies` are those of its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        (folder / "config.toml").write_text(to_toml(resolve_settings(CONFIG).config))
        self.copies = Copies(CONFIG, folder)
        self.writer = writer_of(folder, copies=self.copies)

    def save(self, step: int) -> None:
        self.writer.save(step, state({"w": torch.full((9,), float(step))}))
        self.writer.wait()

    def finish(self, seconds: float = 60.0) -> None:
        self.copies.finish(seconds)


@pytest.fixture
def saving(bucket: str, tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def test_an_upload_that_is_cut_leaves_the_older_checkpoint(saving, tmp_path, monkeypatch, capsys):
    """Wherever it is cut; with one warning. The next one takes its place."""
    saving.save(1)
    saving.finish()
    files, put = fsspec.get_filesystem_class("s3"), fsspec.get_filesystem_class("s3").put_file
    for step, cut_at in ((2, "model.safetensors"), (3, "state.json")):

        def cut(self: Any, path: str, name: str, cut_at: str = cut_at) -> None:
            if name.endswith(cut_at):
                raise OSError("no room for s3://me:word@bucket/run")
            put(self, path, name)

        with monkeypatch.context() as patch:
            patch.setattr(files, "put_file", cut)
            saving.save(step)
            saving.finish()
        assert complete() == [1]
        assert whole()
        warnings = capsys.readouterr().err.splitlines()
        assert 1 <= len(warnings) <= 2  # the end may copy again
        for warning in warnings:
            assert "run.sync: s3://bucket/run: not copied (no room for s3://***@bucket/" in warning
    saving.save(4)
    saving.finish()
    assert complete() == [3, 4]
    assert whole()
    assert not [name for name in objects() if "step-000000001" in name or "step-000000002" in name]
    assert capsys.readouterr().err == ""


def slowed(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], Event, Event]:
    """What is put into the store by name, when the first is, and what all of it waits for."""
    files, put = fsspec.get_filesystem_class("s3"), fsspec.get_filesystem_class("s3").put_file
    names, begun, go_on = list[str](), Event(), Event()

    def slow(self: Any, path: str, name: str) -> None:
        names.append(name)
        begun.set()
        assert go_on.wait(60)
        put(self, path, name)

    monkeypatch.setattr(files, "put_file", slow)
    return names, begun, go_on


def test_one_copy_at_a_time_and_the_newest_next(saving, monkeypatch, capsys):
    """Training saves on while a store is slow, and the end waits for so long only. A checkpoint
    stays until it is copied, or no copy would ever be whole; then it goes."""
    put_names, begun, go_on = slowed(monkeypatch)
    saving.save(1)
    assert begun.wait(60)
    for step in (2, 3, 4):
        saving.save(step)
    saving.finish(0.01)
    assert "not done within 0.01 s" in capsys.readouterr().err
    assert len(put_names) == 1
    assert [int(path.name[-1]) for path in checkpoints(saving.folder)] == [1, 3, 4]
    go_on.set()
    saving.finish()
    assert complete() == [1, 3, 4]  # the first goes when the next is saved
    put_steps = [int(found[1]) for name in put_names if (found := re.search(r"step-(\d+)", name))]
    others = [step for step in put_steps if step > 1]  # what is under way comes to its end first
    assert others == sorted(others, reverse=True)
    saving.save(5)
    assert [int(path.name[-1]) for path in checkpoints(saving.folder)] == [4, 5]
    assert capsys.readouterr().err == ""


def test_a_folder_that_is_mounted_takes_copies(tmp_path, monkeypatch, capsys):
    """As a run folder, in one that exists: a mount that is not there would fill another disk."""
    place = tmp_path / "mounted" / "of runs"
    in_place = with_changes(CONFIG, {"run": {"sync": f"file://{place}"}})
    monkeypatch.setitem(globals(), "CONFIG", in_place)
    with pytest.raises(ValueError, match=f"there is no folder {place.parent}; mount it"):
        fetched(tmp_path / "other")
    place.parent.mkdir()
    saving = Run(tmp_path / "run")
    for step in (1, 2, 3, 4):
        saving.save(step)
        saving.finish()
    assert [(path.name[-1], damage(path)) for path in checkpoints(place)] == [
        ("3", None),
        ("4", None),
    ]
    assert fetched(tmp_path / "other") == [4]
    assert f"step-000000004 fetched from file://{place}" in capsys.readouterr().err


def fetched(folder: Path, *, resume: bool = True, **changes: Any) -> list[int]:
    """The steps of the intact checkpoints in a run folder after a fetch."""
    config = with_changes(with_out(CONFIG, str(folder)), {"run": changes})
    assert config.run.sync is not None
    fetch_run(resolve_settings(config), *ask_store(config.run.sync), resume=resume)
    return [int(path.name[-9:]) for path in checkpoints(folder) if damage(path) is None]


def test_the_newer_of_folder_and_bucket_wins(saving, tmp_path, capsys):
    """A damaged checkpoint of the bucket is passed over."""
    for step in (1, 2):
        saving.save(step)
    saving.finish()
    other = Run(tmp_path / "other")
    other.writer.then = lambda folder: None
    other.save(1)
    assert fetched(other.folder) == [1, 2]
    assert "step-000000002 fetched from s3://bucket/run" in capsys.readouterr().err
    before = (other.folder / "checkpoints" / "step-000000002").stat()
    assert fetched(other.folder) == [1, 2]
    assert (other.folder / "checkpoints" / "step-000000002").stat() == before
    assert capsys.readouterr().err == ""
    files = fsspec.filesystem("s3")
    files.pipe_file("/bucket/run/checkpoints/step-000000002/model.safetensors", b"")
    assert fetched(tmp_path / "third") == [1]
    err = capsys.readouterr().err
    assert "step-000000002 there is passed over: model.safetensors is not what was written" in err
    files.rm_file("/bucket/run/checkpoints/step-000000002/state.json")
    assert fetched(tmp_path / "fourth") == [1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"seed": 5}, r"run\.sync: s3://bucket/run: .*other settings: run\.seed "),
        ({"resume": False}, "holds a run; go on with --resume auto, or choose another folder$"),
        ({"sync": "s3://bucket"}, "s3://bucket: holds other files; choose another folder$"),
    ],
)
def test_another_run_in_the_bucket_is_refused(more, message, saving, tmp_path):
    saving.save(1)
    saving.finish()
    before = dict(objects())
    with pytest.raises(ValueError, match=message):
        fetched(tmp_path / "other", **more)
    assert not (tmp_path / "other").exists()
    assert all(name.endswith("/.protoclip") for name in objects().keys() - before.keys())


def test_a_name_that_leads_out_of_the_folder_is_left_alone(saving, tmp_path, monkeypatch):
    """Stores allow it, and a recipe may name a bucket of somebody else."""
    saving.save(1)
    saving.finish()
    files, find = fsspec.get_filesystem_class("s3"), fsspec.get_filesystem_class("s3").find
    step = "/bucket/run/checkpoints/step-000000001"
    odd = [f"{step}/../../../out", f"/bucket/run/{tmp_path}/out", "/bucket/run/a\\..\\out"]

    def with_odd_names(self: Any, path: str, *given: Any, **more: Any) -> list[str]:
        return [*find(self, path, *given, **more), *odd]

    monkeypatch.setattr(files, "find", with_odd_names)
    for name in odd:
        objects()[name] = objects()[f"{step}/model.json"]
    assert fetched(tmp_path / "deep" / "new") == [1]
    assert [path for path in tmp_path.rglob("*") if path.name.endswith("out")] == []


def test_a_folder_of_other_files_is_not_taken_for_the_run(saving, tmp_path):
    """Or they would be copied to the bucket, and hidden ones removed."""
    saving.save(1)
    saving.finish()
    (tmp_path / "other").mkdir()
    names = ["secret.txt", ".notes.txt.12.tmp"]
    for name in names:
        (tmp_path / "other" / name).write_text("mine")
    with pytest.raises(ValueError, match=r"other: folder exists; choose another --run"):
        fetched(tmp_path / "other")
    assert sorted(os.listdir(tmp_path / "other")) == sorted(names)  # noqa: PTH208


def test_a_bucket_of_damaged_checkpoints_is_no_new_run(saving, tmp_path):
    """Which would train all steps again."""
    saving.save(2)
    saving.finish()
    name = "/bucket/run/checkpoints/step-000000002/model.safetensors"
    fsspec.filesystem("s3").pipe_file(name, b"")
    with pytest.raises(ValueError, match=r"^run\.sync: s3://bucket/run: every checkpoint there is"):
        fetched(tmp_path / "new")


def changed(config: Config, setting: str, value: Any) -> Config:
    section, name = setting.split(".")
    return with_changes(config, {section: {name: value}})


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
