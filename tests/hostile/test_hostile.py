"""What the command line answers to hostile input; `cases.toml` is the table, and explains itself.

Every case runs in one process, in one folder (`world.py`), of which nothing may change or appear
that the case does not name.
"""

import contextlib
import functools
import hashlib
import io
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tomllib
import warnings
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import world
from audited import ERROR, PAGE, SECONDS, within
from filelock import FileLock

from protoclip.cli import main

TABLE = tomllib.loads(Path(__file__).with_name("cases.toml").read_text(encoding="utf-8"))
# Lines on standard error that may come before an error: notes, and progress.
BESIDE = re.compile(r"(note|warning|computing): |training on |going on from |opening |.*: \d+%, ")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row of the table."""

    group: str
    line: str
    says: list[str]  # patterns of the last line, or if all went well of some lines
    code: int = 2
    given: str = ""  # shell commands that prepare the folder
    makes: list[str] = field(default_factory=list)  # patterns of paths that may be new or changed
    held: str | None = None  # a lock that another process holds meanwhile

    @property
    def name(self) -> str:
        said = f"{self.line} | {self.given}" if self.given else self.line
        return f"{self.group}: {re.sub(r'[^ -~]', '?', said)[:90]}"


def cases() -> list[Case]:
    found = []
    for group, rows in TABLE.items():
        for line, says, *more in rows:
            lines = [says] if isinstance(says, str) else says
            found.append(Case(group=group, line=line, says=lines, **dict(*more)))
    return found


@functools.cache
def digest(path: str, inode: int, changed: int) -> str:
    """Of the content of a file, which is read anew when it has changed."""
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()


def contents(folder: Path, below: str = "") -> dict[str, str]:
    """What each path below a folder is, and the digest of each file.

    Names are strings: `Path.rglob` took three times as long, for each of many cases.
    """
    found = {}
    with os.scandir(folder / below) as entries:
        for entry in entries:
            name, status = below + entry.name, entry.stat(follow_symlinks=False)
            kind = stat.S_IFMT(status.st_mode)
            found[name] = oct(kind)
            if kind == stat.S_IFREG:
                found[name] += digest(entry.path, status.st_ino, status.st_ctime_ns)
            elif kind == stat.S_IFLNK:
                found[name] += os.readlink(entry.path)  # noqa: PTH115
            elif kind == stat.S_IFDIR:
                found |= contents(folder, f"{name}/")
    return found


@pytest.fixture(scope="module")
def as_built(folder: Path) -> dict[str, str]:
    return contents(folder)


def restore(folder: Path, now: dict[str, str], as_built: dict[str, str]) -> None:
    """Make the world what it was."""
    for name in sorted(now.keys() | as_built.keys()):
        if now.get(name) == as_built.get(name):
            continue
        path, original = folder / name, folder.with_name("pristine") / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        if name in as_built and not os.path.lexists(path):
            if original.is_dir() and not original.is_symlink():
                path.mkdir()
            else:
                world.copy(str(original), str(path))


@dataclass(frozen=True, kw_only=True)
class Answer:
    code: int
    out: list[str]
    err: list[str]


def answer(case: Case) -> Answer:
    """Run a case."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.nullcontext() if case.held is None else FileLock(case.held),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(record=True) as warned,
        within(SECONDS),
    ):
        warnings.simplefilter("default")
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning):
            warnings.simplefilter("ignore", category)
        try:
            main(shlex.split(case.line))
        except SystemExit as end:
            code = int(str(end.code or 0))
    shown = err.getvalue().split("\n") + [f"{w.category.__name__}: {w.message}" for w in warned]
    return Answer(
        code=code,
        out=[line for line in out.getvalue().split("\n") if line.strip()],
        err=[line for line in shown if line.strip()],
    )


def fits(line: str, pattern: str) -> bool:
    """Whether a line is as a pattern says, in which `...` stands for anything."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("..."))), line) is not None


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in cases()])
def test_the_answer_is_one_clear_line_and_nothing_is_lost(case, folder, as_built):
    before = as_built
    if case.given:
        subprocess.run(["sh", "-ec", case.given], check=True, cwd=folder, timeout=20)
        before = contents(folder)
    try:
        got = answer(case)
    finally:
        after = contents(folder)
        restore(folder, after, as_built)
    assert got.code == case.code, got
    lines = [*got.err, *got.out]
    if case.code:
        assert got.err, got
        *beside, last = got.err
        assert last.startswith(ERROR), last
        assert all(map(BESIDE.match, beside)), beside
        lines = [PAGE.sub("", last.removeprefix(ERROR))]
    for pattern in case.says:
        assert any(fits(line, pattern) for line in lines), "\n".join([pattern, *lines])
    unclean = [line for line in lines if not line.isprintable()]
    assert not unclean, unclean
    changed = {name for name, _ in before.items() ^ after.items()} - {case.held}
    made = sorted(n for n in changed if not any(fnmatchcase(n, p) for p in case.makes))
    assert not made, made


# Typos in paths that each command reads or writes; cases.toml has those of settings.
TYPOS = """\
train --data.train gone.tsv
train --data.validation gone.tsv --data.train test_hostile.py
train --run.out test_hostile.py/new
train --config gone.toml
align --data.train gone.tsv
finetune gone
evaluate gone
evaluate . --data gone.tsv
evaluate . --compare_to gone
evaluate . --out test_hostile.py/new
compare gone
analyze gone
report gone
report . --out .
explore gone
explore . --data gone.tsv
explore . --atlas .
export gone new
export . test_hostile.py/new
embed gone --data test_hostile.py --out new.parquet
embed . --data gone.tsv --out new.parquet
embed . --data test_hostile.py --out .
match --images gone --texts minilm --data test_hostile.py
match --images timm:resnet10t --texts minilm --data gone.tsv
embed-teacher --teacher gone --out new
embed-teacher --teacher . --out new --data.train gone.tsv
data inspect gone.tsv
data pack gone.tsv new
data pack test_hostile.py test_hostile.py
data index gone.tsv
"""


@pytest.mark.parametrize("kind", ["missing", "pipes"])
def test_typos_in_paths_are_found_before_anything_slow_is_imported(kind, tmp_path):
    """Pipes are refused as early; whoever opens one waits for somebody to write into it."""
    if kind == "pipes":
        for name in {*re.findall(r"gone[.a-z]*", TYPOS)}:
            os.mkfifo(tmp_path / name)
    shutil.copy(__file__, tmp_path)
    program = f"""
import sys
from protoclip.cli import main
for line in {TYPOS.splitlines()}:
    try:
        main(line.split())
    except SystemExit as end:
        assert end.code == 2, line
    else:
        raise AssertionError(line)
    slow = sys.modules.keys() & {{"torch", "torchvision", "open_clip", "datasets", "pyarrow"}}
    assert not slow, (line, slow)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for line, said in zip(TYPOS.splitlines(), done.stderr.splitlines(), strict=True):
        words = line.split()
        wrong = next((word for word in words if word.startswith("gone")), words[-1])
        assert f" {wrong}: " in said, line
