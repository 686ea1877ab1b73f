"""Copies of a run folder in a bucket: whole or absent, the newest first, no harm to the run."""

import os
import re
import sys
from pathlib import Path
from threading import Event
from typing import Any

import fsspec
import pytest
import torch

from interrupting import with_changes, with_out
from protoclip.models.checkpoint import CHECKSUMS, checkpoints, damage
from protoclip.training.folder import (
    CheckpointWriter,
    Copies,
    ask_store,
    fetch_run,
    open_store,
    to_toml,
)
from protoclip.training.plan import resolve_settings
from testing import tiny_config


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
        settings: dict[str, Any] = {"every_steps": 0, "every_minutes": 0.0, "keep": 2}
        self.writer = CheckpointWriter(folder, description={}, copies=self.copies, **settings)

    def save(self, step: int) -> None:
        few = {"w": torch.full((9,), float(step))}
        self.writer.save(step, {"model": few, "optimizer": few, "source": few})
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
    """Training saves on while a store is slow, and the end waits for so long only."""
    put_names, begun, go_on = slowed(monkeypatch)
    saving.save(1)
    assert begun.wait(60)
    for step in (2, 3, 4):
        saving.save(step)
    saving.finish(0.01)
    assert "not done within 0.01 s" in capsys.readouterr().err
    assert len(put_names) == 1
    go_on.set()
    saving.finish()
    assert complete() == [1, 3, 4]  # the first goes when the next is saved
    put_steps = [int(found[1]) for name in put_names if (found := re.search(r"step-(\d+)", name))]
    others = [step for step in put_steps if step > 1]  # what is under way comes to its end first
    assert others == sorted(others, reverse=True)
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


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("reference://a/b", r"is no folder of a store \(s3, gs, hf, az, abfs, file\); name one"),
        ("file://mnt/nas/run", "there is no folder "),
        ("file://a::reference://b", "URLs chained with '::' are not read"),
        ("AZ://container/run", "Install adlfs to access Azure"),
    ],
)
def test_a_place_that_takes_no_copies_is_refused(url, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(ValueError, match=rf"^run\.sync: {url}: {message}[^\n]*$"):
        open_store(url)


def test_a_checkpoint_stays_until_it_is_copied(saving, monkeypatch):
    """However long that takes, or no copy would ever be whole; then it goes."""
    _, begun, go_on = slowed(monkeypatch)
    saving.save(1)
    assert begun.wait(60)
    for step in (2, 3, 4, 5):
        saving.save(step)
    steps = [int(path.name[-1]) for path in checkpoints(saving.folder)]
    assert steps == [1, 4, 5]
    go_on.set()
    saving.finish()
    assert whole()
    saving.save(6)
    assert [int(path.name[-1]) for path in checkpoints(saving.folder)] == [5, 6]


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
    with pytest.raises(ValueError, match=r"other: run folder exists; choose another with --run"):
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
