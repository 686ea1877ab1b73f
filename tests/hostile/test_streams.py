"""Standard streams that cannot be written: the reader has left, or the disk is full."""

import json
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
from audited import Ended

from protoclip.cli import main
from protoclip.models import checkpoint as saved

LOST = "protoclip: error: standard output: No space left on device; what is printed was lost"


@pytest.fixture
def home(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of a run as the current folder."""
    monkeypatch.chdir(trained)


def redirected(streams: str) -> dict[int, str]:
    """What a shell makes of `2>/dev/full` and the like; `2|` is a reader that left."""
    return {int(number or 1): what for number, what in re.findall(r"(2?)(>/dev/full|\|)", streams)}


def ended(words: str, streams: str, folder: Path) -> Ended:
    """How a command ends in a process of its own, which is forked: importing takes seconds."""
    paths = [folder / "out.txt", folder / "err.txt"]
    child = os.fork()
    if child == 0:
        code: Any = 70
        try:
            code = in_child(words.split(), redirected(streams), paths)
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    out, err = (path.read_text(encoding="utf-8") for path in paths)
    return Ended(code=code, out=out, err=err)


def in_child(words: list[str], streams: dict[int, str], paths: list[Path]) -> Any:
    """Make the streams as Python does when it starts, run a command, and flush as Python does."""
    for number, path in enumerate(paths, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    for number, what in streams.items():
        read, file = os.pipe() if what == "|" else (None, os.open("/dev/full", os.O_WRONLY))
        os.dup2(file, number)
        if read is not None:
            os.close(read)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = open(number, "r" if number == 0 else "w", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    code: Any = 0
    try:
        main(words)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except Exception:
        return 120
    return code


@pytest.mark.parametrize(
    ("words", "streams", "code"),
    [
        ("--help", "|", 0),
        ("--help", ">/dev/full", 2),
        ("compare run run", "|", 0),
        ("data index pairs.parquet", ">/dev/full", 0),
        ("data inspect pairs.parquet --data.workers 1", "2|", 0),
        ("data inspect pairs.parquet --data.workers 1 --json", ">/dev/full", 2),
        ("analyze run --samples 16", "2|", 0),
    ],
)
def test_only_a_result_that_is_lost_is_an_error(words, streams, code, home, tmp_path):
    """Messages never are. A reader that leaves has what it wanted."""
    end = ended(words.replace("{}", str(tmp_path)), streams, tmp_path)
    assert end.code == code, end
    if code:
        assert end.err.splitlines()[-1].startswith(LOST), end
    assert "Traceback" not in end.err


def test_a_run_goes_on_without_its_reader(home, tmp_path):
    """With a worker process: it saves, evaluates, and writes nothing into its files that was meant
    for a stream."""
    words = f"train --config recipe.toml --run.out {tmp_path}/run --data.workers 1"
    end = ended(words, "2|", tmp_path)
    assert end.code == 0, end
    assert "Traceback" not in end.err
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 16
    assert saved.damage(saved.checkpoints(tmp_path / "run")[-1]) is None
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        assert "step" in json.loads(line)


@pytest.mark.parametrize(("streams", "code"), [("2>/dev/full", 0), (">/dev/full", 2)])
def test_evaluate_writes_its_files_whatever_its_streams(streams, code, home, tmp_path):
    words = f"evaluate run --data pairs.parquet --workers 0 --out {tmp_path}/out"
    end = ended(words, streams, tmp_path)
    assert end.code == code, end
    assert len([*(tmp_path / "out").glob("*.json")]) == 2
    assert ("retrieval" in end.out) == (code == 0)
    assert ("protoclip: error: standard output: " in end.err) == (code == 2)
