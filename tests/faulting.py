"""Commands that are killed or find the disk full, at a chosen moment, and what must be left.

A call of a command is a forked process. A fault strikes when the call opens, renames, makes or
removes a file or folder for the n-th time, as Python's audit events tell. A full disk is a limit of
the system, so it also meets what libraries write by themselves.
"""

import importlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tarfile
import time
import tomllib
import traceback
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from safetensors import safe_open

from interrupting import MEASURED, quick_config
from protoclip import cli
from protoclip.config import Config, EpisodeConfig, LossConfig, OptimConfig
from protoclip.data.tables import ArrowIndex, read_table
from protoclip.encode import run as encode
from protoclip.models.checkpoint import checkpoints, damage
from protoclip.training import folder as run_folder
from protoclip.training.folder import to_toml
from testing import tiny_pairs
from tiny_starts import save_encoders

PATIENCE = 600.0  # seconds for one call, on a busy machine
PROCESSOR_SECONDS = 60  # that a call may compute: one that hangs in a loop is ended
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir")
KINDS = ("full disk", "killed")
COMMANDS = ("train", "embed-teacher", "data pack", "evaluate", "export", "report")  # `draw`'s


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong: `share` of a call's file events have passed by then, in [0, 1]."""

    seed: int
    command: str
    kind: str
    share: float

    def __str__(self) -> str:
        return f"{self.command}, {self.kind} at {self.share:.2f}"

    @property
    def fresh(self) -> bool:
        """Whether training begins with this call, rather than goes on."""
        return self.seed % 2 == 0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a call ended: its exit code, negative for a signal, and what it said."""

    code: int
    said: str
    events: int
    struck: bool = False
    modules: Sequence[str] = ()

    @property
    def last(self) -> str:
        return (self.said.strip().splitlines() or [""])[-1]

    @property
    def problem(self) -> str:
        """What is wrong with the end; empty if it is a success or one line."""
        if "Traceback" in self.said:
            return f"a traceback: {self.last}"
        if self.code == 0:
            return ""
        if self.code in (1, 2) and self.last.startswith("protoclip: error: "):
            return ""
        return f"exit code {self.code}: {self.last}"


def draw(number: int, seed: int = 0) -> list[Fault]:
    """Faults at random moments; commands and kinds come in turn."""
    generator = random.Random(seed)
    cells = [(command, kind) for kind in KINDS for command in COMMANDS]
    return [
        Fault(
            seed=generator.randrange(10**6),
            command=cells[place % len(cells)][0],
            kind=cells[place % len(cells)][1],
            share=generator.random(),
        )
        for place in range(number)
    ]


@dataclass
class Injector:
    """Counts a process's file events below a folder, and lets a fault strike at one of them."""

    folder: str
    kind: str = ""
    at: int = -1
    count: int = 0
    struck: bool = False
    process: int = field(default_factory=os.getpid)
    inherited: Container[int | None] = ()  # processes that a fork only seems to have

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or os.getpid() != self.process:
            return
        paths = [os.fsdecode(a) for a in arguments[:2] if isinstance(a, str | bytes | os.PathLike)]
        if not any(path.startswith(self.folder) for path in paths):
            return
        self.count += 1
        if self.struck or not 0 < self.at <= self.count:
            return
        self.struck = True
        if self.kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        limit(resource.RLIMIT_FSIZE, 0)


def limit(which: int, value: int) -> None:
    resource.setrlimit(which, (value, resource.getrlimit(which)[1]))


def call(words: Sequence[str], injector: Injector) -> Outcome:
    """Run a command in a forked process, with a fault if the injector has one."""
    heard, said = os.pipe()
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        os.close(heard)
        os.close(reading)
        in_child(words, injector, said, writing)
    os.close(said)
    os.close(writing)
    for pipe in (heard, reading):
        os.set_blocking(pipe, False)
    ends, text, status = time.monotonic() + PATIENCE, b"", 0
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        text += read_all(heard)
        if done:
            break
        if time.monotonic() > ends:
            os.kill(process, signal.SIGKILL)
            ends = float("inf")
            text += b"\nhangs"
        time.sleep(0.01)
    text += read_all(heard)
    facts = json.loads(read_all(reading) or b"{}")
    os.close(heard)
    os.close(reading)
    code = os.waitstatus_to_exitcode(status)
    return Outcome(
        code=code,
        said=text.decode(errors="replace"),
        events=facts.get("events", 0),
        struck=code < 0 or facts["struck"],
        modules=facts.get("modules", "").split(),
    )


def read_all(pipe: int) -> bytes:
    found = b""
    with suppress(BlockingIOError):
        while part := os.read(pipe, 1 << 16):
            found += part
    return found


def own_workers(inherited: Container[int | None]) -> list[multiprocessing.process.BaseProcess]:
    """The workers of a forked process, without those of the process that it was forked from."""
    return [w for w in multiprocessing.active_children() if w.pid not in inherited]


def in_child(words: Sequence[str], injector: Injector, said: int, tell: int) -> None:
    """Run a command in this process, which it ends."""
    code = 70
    try:
        for stream in (1, 2):
            os.dup2(said, stream)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        run_folder.LAST_RETRIES, encode.BLOCK_ROWS, encode.TEXTS_AT_ONCE = (0.0,), 8, 8
        os.environ["PROTOCLIP_CACHE"] = f"{injector.folder}/cache"
        limit(resource.RLIMIT_CPU, PROCESSOR_SECONDS)
        injector.process = os.getpid()
        injector.inherited = {worker.pid for worker in multiprocessing.active_children()}
        sys.addaudithook(injector)
        cli.main([*words])
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for worker in own_workers(injector.inherited):
            worker.kill()
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
            # A pipe holds 64 KB: names of the largest libraries' parts would not fit.
            names = [name for name in sys.modules if name.count(".") < 2 and name != "__main__"]
            facts = {"events": injector.count, "struck": injector.struck}
            modules = " ".join(names)[:60_000]
            os.write(tell, json.dumps({**facts, "modules": modules}).encode())
        os._exit(code)


class Scene:
    """A folder with pairs, a finished run, an unfinished one, and a command to call in it.

    It is put back before each fault. `expected` has the files that each command makes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.kept = folder / "scene", folder / "kept"
        self.expected: dict[tuple[str, bool], dict[str, object]] = {}
        self.events: dict[tuple[str, bool], int] = {}
        (self.folder / "images").mkdir(parents=True)
        table = tiny_pairs(24)
        lines = ["filepath\ttitle\tkey"]
        for row in table.to_pylist():
            image = f"images/{row['sample_id'][5:]}.png"
            (self.folder / image).write_bytes(row["image"])
            lines.append(f"{image}\t{row['caption']}\t{row['sample_id']}")
        (self.folder / "pairs.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        for out in ("run", "stopped", "fresh"):
            changes = {"run": {"save_steps": 2}}
            config = quick_config(f"{self.folder}/pairs.tsv", self.folder / out, **changes)
            text = to_toml(config)
            (self.folder / f"{out}.toml").write_text(text, encoding="utf-8")
        (self.folder / "align.toml").write_text(self.alignment(), encoding="utf-8")
        self.must("train", "--config", f"{self.folder}/run.toml")
        shutil.copytree(self.folder / "run", self.folder / "stopped")
        self.start, *newer = checkpoints(self.folder / "stopped")  # of the unfinished run
        for checkpoint_folder in newer:
            shutil.rmtree(checkpoint_folder)
        (self.folder / "stopped" / "results.json").unlink()
        shutil.rmtree(self.folder / "cache")
        shutil.copytree(self.folder, self.kept)

    def alignment(self) -> str:
        """A recipe of a short run between tiny encoders, which are made."""
        model = save_encoders(self.folder / "encoders", "test_resnet", size=32)
        quick = quick_config(f"{self.folder}/pairs.tsv", self.folder / "aligned")
        config = replace(
            Config(model=model, run=replace(quick.run, evaluate=False), data=quick.data),
            episodes=EpisodeConfig(size=24, count=2, batch_size=12, warm_up=0, locked_image=0),
            loss=LossConfig(prototypical=0.0, teacher=0.0),
            optim=OptimConfig(learning_rate=1e-3),
        )
        return to_toml(config)

    def must(self, *words: str) -> Outcome:
        """Call a command that nothing disturbs, and import here what it imported."""
        outcome = call(words, Injector(str(self.folder)))
        assert outcome.code == 0, outcome.said
        for name in outcome.modules:
            with suppress(Exception):
                importlib.import_module(name)
        return outcome

    def words(self, command: str, *, fresh: bool) -> list[str]:
        here = str(self.folder)
        given = {
            "train": ["--config", f"{here}/{'fresh' if fresh else 'stopped'}.toml"],
            "embed-teacher": ["--teacher", f"{here}/run", "--data.train", f"{here}/pairs.tsv"],
            "data pack": [f"{here}/pairs.tsv", f"{here}/shards", "--samples_per_shard", "8"],
            "evaluate": [f"{here}/run", "--data", f"{here}/pairs.tsv"],
            "export": [f"{here}/run", f"{here}/exported", "--formats", "open_clip"],
            "report": [f"{here}/run", "--out", f"{here}/report.html"],
            "align": ["--config", f"{here}/align.toml", "--resume", "auto"],
            "embed": [f"{here}/run", "--data", f"{here}/pairs.tsv"],
        }[command]
        more = {
            "train": ["--resume", "auto", "--data.workers", "0"],
            "embed-teacher": ["--out", f"{here}/teacher", "--modality", "text"],
            "evaluate": ["--out", f"{here}/records", "--workers", "0"],
            "embed": ["--out", f"{here}/vectors.parquet"],
        }
        return [*command.split(), *given, *more.get(command, [])]

    def reset(self) -> None:
        shutil.rmtree(self.folder)
        shutil.copytree(self.kept, self.folder)

    def made(self, command: str, *, fresh: bool) -> dict[str, object]:
        """The content of what a command makes, by name, without times; and what else is there."""
        out = {
            "train": ["fresh" if fresh else "stopped"],
            "embed-teacher": ["teacher"],
            "data pack": ["shards"],
            "evaluate": ["records", "run/results"],
            "export": ["exported"],
            "report": ["report.html"],
            "align": ["aligned"],
            "embed": ["vectors.parquet"],
        }
        found: dict[str, object] = {
            path.name: None for path in self.folder.iterdir() if not path.name.startswith(".")
        }
        for top in (self.folder / name for name in out[command]):
            for path in [top, *sorted(top.rglob("*"))]:
                name = path.relative_to(self.folder).as_posix()
                # These hold times; `invalid` reads the checksums.
                timed = path.name == "checksums.json" or "/tensorboard/" in name
                if path.is_file() and not timed and not is_hidden(path, self.folder):
                    found[name] = without_times(path)
        return found

    def prepare(self, command: str, *, fresh: bool) -> None:
        """Learn what a command makes, and how many file events that takes."""
        if (command, fresh) in self.events:
            return
        self.reset()
        self.events[command, fresh] = self.must(*self.words(command, fresh=fresh)).events
        self.expected[command, fresh] = self.made(command, fresh=fresh)

    def suffer(self, fault: Fault) -> tuple[Outcome, Outcome, list[str]]:
        """How a call ends under a fault, and the next one without; and all that is wrong then."""
        command, fresh = fault.command, fault.fresh and fault.command == "train"
        self.prepare(command, fresh=fresh)
        words = self.words(command, fresh=fresh)
        at = 1 + int(fault.share * self.events[command, fresh])
        self.reset()
        before = snapshot(self.folder)
        first = call(words, Injector(str(self.folder), kind=fault.kind, at=at))
        wrong = [] if first.struck else ["the fault did not strike"]
        wrong += [self.end_of(fault, first), *self.lost(before, fault), *invalid(self.folder)]
        if first.code == 0:
            differ = self.differences(command, fresh=fresh)
            # What is not needed any more, and cannot be removed, the next call removes.
            wrong += [f"success, but {text}" for text in differ if "/parts/" not in text]
        second = call(words, Injector(str(self.folder)))
        if (command, first.code) != ("export", 0):  # that folder exists by then
            wrong += [second.problem, f"the next call: {second.last}" if second.code else ""]
        differ = self.differences(command, fresh=fresh)
        wrong += [f"the next call: {text}" for text in differ]
        wrong += invalid(self.folder, torn=False)
        wrong += [f"left behind: {n}" for n in leftovers(self.folder, killed=first.code < 0)]
        return first, second, [text for text in wrong if text]

    def end_of(self, fault: Fault, ended: Outcome) -> str:
        """What is wrong with the end of a call under a fault."""
        if fault.kind == "killed" and ended.code == -signal.SIGKILL:
            return ""
        if ended.code and str(self.folder) not in ended.last:
            return f"names no path: {ended.last}"
        return ended.problem

    def differences(self, command: str, *, fresh: bool) -> list[str]:
        """Between what a command made and what it makes undisturbed."""
        found, expected = self.made(command, fresh=fresh), self.expected[command, fresh]
        names = sorted(found.keys() | expected.keys())
        return [f"another {n}" for n in names if found.get(n, b"") != expected.get(n, b"")][:3]

    def lost(self, before: dict[str, bytes], fault: Fault) -> list[str]:
        """What was whole and is not there any more."""
        now = snapshot(self.folder)
        # A run goes on: older checkpoints are removed, logs grow. Evaluation replaces results.
        changes = {"train": "stopped/", "evaluate": "run/results/"}.get(fault.command, "/")
        lost = [
            f"lost: {name}"
            for name, content in before.items()
            if now.get(name) != content
            and not (name.startswith(changes) and name in now)
            and not name.startswith("stopped/checkpoints")
        ]
        if fault.command == "train" and not fault.fresh:
            intact = [p.name for p in checkpoints(self.folder / "stopped") if damage(p) is None]
            if max(intact, default="") < self.start.name:
                lost.append("lost: the checkpoint")
        return lost


def snapshot(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def without_times(path: Path) -> object:
    """The content of a file, but for how long something took, and on which day."""
    if path.suffix == ".json":
        return untimed(json.loads(path.read_bytes()))
    if path.suffix == ".jsonl":
        return [untimed(json.loads(line)) for line in path.read_bytes().splitlines()]
    return re.sub(rb"\d{4}-\d\d-\d\d", b"", path.read_bytes())


def untimed(tree: Any) -> Any:
    """A tree of JSON without durations, and without checksums and sizes of what holds them."""
    if isinstance(tree, list):
        return [untimed(part) for part in tree]
    if not isinstance(tree, dict):
        return tree
    timed = rf"{MEASURED}|checksum|metrics_bytes"
    return {k: untimed(v) for k, v in tree.items() if not re.search(timed, k)}


def is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def leftovers(folder: Path, *, killed: bool) -> list[str]:
    """Hidden files but locks, after a call that went well.

    What a process had begun that was killed, or could not remove it, stays where another process
    may be writing at the same time.
    """
    hidden = (path for path in folder.rglob(".*") if not path.name.endswith(".lock"))
    names = (path.relative_to(folder).as_posix() for path in hidden)
    shared = ("records/", "cache/features/", "run/results/", ".report.html")
    return [name for name in names if not (killed and name.startswith(shared))]


def invalid(folder: Path, *, torn: bool = True) -> list[str]:
    """Files that are not whole, and what is wrong; hidden ones are on their way.

    The last line of a log may be torn until the next call continues after it.
    """
    wrong = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or is_hidden(path, folder) or path.suffix not in READERS:
            continue
        name = path.relative_to(folder).as_posix()
        try:
            READERS[path.suffix](path)
            if path.suffix == ".jsonl" and not torn and path.read_bytes()[-1:] not in (b"", b"\n"):
                raise ValueError("its last line is torn")
        except Exception as error:
            wrong.append(f"not valid: {name}: {error!r}"[:200])
    for out in ("run", "stopped", "fresh"):
        for found in checkpoints(folder / out):
            if (what := damage(found)) is not None:
                wrong.append(f"not valid: {found.name}: {what}")
    return wrong


def read_lines(path: Path) -> None:
    """JSON lines; the last may be torn, since the next call continues after it."""
    for line in path.read_bytes().split(b"\n")[:-1]:
        json.loads(line)


def read_tensors(path: Path) -> None:
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            file.get_tensor(name)


def read_arrays(path: Path) -> None:
    with np.load(path) as arrays:
        assert [arrays[name].shape for name in arrays]


def read_tar(path: Path) -> None:
    with tarfile.open(path) as tar:
        assert tar.getmembers()


def read_index(path: Path) -> None:
    """Its facts are written after it, and are looked for before it is used."""
    if path.with_suffix(".json").exists():
        ArrowIndex(path).check()
    else:
        assert read_table(path).num_rows


def read_page(path: Path) -> None:
    assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")


READERS: dict[str, Callable[[Path], object]] = {
    ".json": lambda path: json.loads(path.read_bytes()),
    ".toml": lambda path: tomllib.loads(path.read_text(encoding="utf-8")),
    ".jsonl": read_lines,
    ".safetensors": read_tensors,
    ".npy": np.load,
    ".npz": read_arrays,
    ".parquet": pq.read_table,
    ".arrow": read_index,
    ".tar": read_tar,
    ".html": read_page,
}
