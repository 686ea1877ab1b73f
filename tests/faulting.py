"""Commands under which something breaks: one fault, at a chosen moment, and what must be left.

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
import time
import traceback
from collections.abc import Container, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import Any

from interrupting import quick_config
from protoclip import cli
from protoclip.config import Config, EpisodeConfig, LossConfig, OptimConfig
from protoclip.encode import run as encode
from protoclip.models.checkpoint import checkpoints, damage
from protoclip.training import checkpoint, run_folder
from remains import invalid, is_hidden, leftovers, packed_in, snapshot, without_times
from testing import tiny_pairs
from tiny_starts import halves

PATIENCE = 600.0  # seconds for one call, on a busy machine
PROCESSOR_SECONDS = 60  # that a call may compute: one that hangs in a loop is ended
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir")
# What goes wrong from the moment on, or once.
KINDS = {
    "full disk": "nothing more can be written",
    "permission": "the folder cannot be entered",
    "file vanishes": "a file is gone before it is read",
    "worker killed": "SIGKILL to a process that reads images",
    "killed": "SIGKILL",
}
COMMANDS = ("train", "embed-teacher", "data pack", "evaluate", "export", "report")  # `drawn`'s
NAMED = ("full disk", "permission")  # the line has the path
# Images may not be there for these, so that a call may leave pairs out, and say how many.
WITHOUT_IMAGES = ("permission", "file vanishes")
NO_CAPTIONS = "note: no captions of prototypes"  # an export without the run's data says so
LISTS_OF_BAD = ("/skipped.jsonl", "/results.json")
HAS_WORKERS = ("train", "evaluate")


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
    gone: str = ""  # the file that vanished, below the folder
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

    @property
    def left_out(self) -> int:
        """How many pairs it said it left out."""
        found = re.findall(r"(\d+) (?:samples )?skipped|(\d+) of \d+ images cannot", self.said)
        return max((int(one or other) for one, other in found), default=0)


def drawn(number: int, seed: int = 0) -> list[Fault]:
    """Faults at random moments; kinds and commands come in turn, until all have met."""
    generator = random.Random(seed)
    found: list[Fault] = []
    while len(found) < number:
        kinds, commands = (generator.sample([*of], len(of)) for of in (KINDS, COMMANDS))
        cells = [
            (commands[(place + turn) % len(commands)], kind)
            for turn in range(len(commands))
            for place, kind in enumerate(kinds)
        ]
        cells = [(of, kind) for of, kind in cells if kind != "worker killed" or of in HAS_WORKERS]
        for command, kind in cells[: number - len(found)]:
            own, share = generator.randrange(10**6), generator.random()
            found.append(Fault(seed=own, command=command, kind=kind, share=share))
    return found


@dataclass
class Injector:
    """Counts a process's file events below a folder, and lets a fault strike at one of them."""

    folder: str
    kind: str = ""
    at: int = -1
    seed: int = 0
    count: int = 0
    struck: bool = False
    gone: str = ""
    hunts: bool = False
    busy: bool = False
    process: int = field(default_factory=os.getpid)
    inherited: Container[int | None] = ()  # processes that a fork only seems to have

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or self.busy:
            return
        paths = [os.fsdecode(a) for a in arguments[:2] if isinstance(a, str | bytes | os.PathLike)]
        paths = [path for path in paths if path.startswith(self.folder)]
        if not paths:
            return
        self.busy = True
        try:
            self.meet(paths[0], reads=event == "open" and is_reading(arguments))
        finally:
            self.busy = False

    def meet(self, path: str, *, reads: bool) -> None:
        own = os.getpid() == self.process
        self.count += own
        if own and not self.struck and 0 < self.at <= self.count:
            self.struck = self.strike(path, reads=reads)
        if not self.struck:
            return
        if self.kind == "permission":
            raise PermissionError(13, "Permission denied", path)

    def strike(self, path: str, *, reads: bool) -> bool:
        """Do what the kind says; returns False to wait for a moment at which it can be done."""
        generator = random.Random(self.seed)
        match self.kind:
            case "full disk":
                limit(resource.RLIMIT_FSIZE, 0)
            case "file vanishes":
                if not reads or not Path(path).is_file():
                    return False
                Path(path).unlink()
                self.gone = Path(path).relative_to(self.folder).as_posix()
            case "worker killed":
                # Workers open files, and this process may open none while they do.
                if not self.hunts:
                    self.hunts = True
                    pause = generator.uniform(0, 0.05)
                    Thread(target=self.kill_worker, args=(pause,), daemon=True).start()
                return False
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
        return True

    def kill_worker(self, pause: float) -> None:
        """Wait for a worker, then for so many seconds, and kill it."""
        while not self.struck:
            if own_workers(self.inherited):
                time.sleep(pause)
                for worker in own_workers(self.inherited)[:1]:
                    os.kill(worker.pid or 0, signal.SIGKILL)
                    self.struck = True
            time.sleep(0.001)


def is_reading(arguments: tuple[Any, ...]) -> bool:
    """Whether an `open` event is that of a file to be read."""
    flags = arguments[2] if len(arguments) > 2 else 0
    return isinstance(flags, int) and flags & os.O_ACCMODE == os.O_RDONLY


def limit(which: int, value: int) -> None:
    resource.setrlimit(which, (value, resource.getrlimit(which)[1]))


def call(words: Sequence[str], injector: Injector) -> Outcome:
    """Run a command in a forked process, with a fault if the injector has one."""
    heard, said = os.pipe()
    told, tell = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        os.close(heard)
        os.close(told)
        in_child(words, injector, said, tell)
    os.close(said)
    os.close(tell)
    for pipe in (heard, told):
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
    facts = json.loads(read_all(told) or b"{}")
    os.close(heard)
    os.close(told)
    code = os.waitstatus_to_exitcode(status)
    return Outcome(
        code=code,
        said=text.decode(errors="replace"),
        events=facts.get("events", 0),
        struck=code < 0 or facts["struck"],
        gone=facts.get("gone", ""),
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
        checkpoint.LAST_RETRIES, encode.BLOCK_ROWS, encode.TEXTS_AT_ONCE = (0.0,), 8, 8
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
            known = {"events": injector.count, "struck": injector.struck, "gone": injector.gone}
            modules = " ".join(names)[:60_000]
            os.write(tell, json.dumps({**known, "modules": modules}).encode())
        os._exit(code)


def with_workers(content: object, number: int) -> object:
    """A `config.toml` with so many workers instead of none; what other files hold as it is."""
    if not isinstance(content, bytes):
        return content
    return content.replace(b"\nworkers = 0\n", b"\nworkers = %d\n" % number)


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
            text = run_folder.to_toml(config)
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
        """A recipe of a short run between tiny halves, which are made."""
        model = halves(self.folder / "halves", "test_resnet", size=32)
        quick = quick_config(f"{self.folder}/pairs.tsv", self.folder / "aligned")
        config = replace(
            Config(model=model, run=replace(quick.run, evaluate=False), data=quick.data),
            episodes=EpisodeConfig(size=24, count=2, batch_size=12, warm_up=0, locked_image=0),
            loss=LossConfig(prototypical=0.0, teacher=0.0),
            optim=OptimConfig(learning_rate=1e-3),
        )
        return run_folder.to_toml(config)

    def must(self, *words: str) -> Outcome:
        """Call a command that nothing disturbs, and import here what it imported."""
        outcome = call(words, Injector(str(self.folder)))
        assert outcome.code == 0, outcome.said
        for name in outcome.modules:
            with suppress(Exception):
                importlib.import_module(name)
        return outcome

    def words(self, command: str, *, fresh: bool, workers: int = 0) -> list[str]:
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
            "train": ["--resume", "auto", "--data.workers", str(workers)],
            "embed-teacher": ["--out", f"{here}/teacher", "--modality", "text"],
            "evaluate": ["--out", f"{here}/records", "--workers", str(workers)],
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
        workers = 1 if fault.kind == "worker killed" else 0
        words = self.words(command, fresh=fresh, workers=workers)
        at = 1 + int(fault.share * self.events[command, fresh])
        while True:
            self.reset()
            before = snapshot(self.folder)
            first = call(words, Injector(str(self.folder), kind=fault.kind, at=at, seed=fault.seed))
            if first.struck or at == 1:
                break
            at = (at + 1) // 2  # so late no worker is left, or no file is read
        wrong = [] if first.struck else ["the fault did not strike"]
        wrong += [self.end_of(fault, first), *self.lost(before, fault, first)]
        wrong += [what for path, what in invalid(self.folder) if path != first.gone]
        # A page says itself which examples it cannot show.
        shows_less = command == "report" and fault.kind in WITHOUT_IMAGES
        no_captions = NO_CAPTIONS in first.said and first.code == 0
        without = ("exported/prototypes.json",) if no_captions else ()
        # A worker that is killed after its last batch ends nothing, and a finished run stays.
        kept = workers if first.code == 0 else 0
        if first.code == 0 and not first.left_out and not shows_less:
            differ = self.differences(command, fresh=fresh, without=without, workers=kept)
            # What is not needed any more, and cannot be removed, the next call removes.
            wrong += [f"success, but {text}" for text in differ if "/parts/" not in text]
        if first.gone in before and not (self.folder / first.gone).exists():
            (self.folder / first.gone).write_bytes(before[first.gone])
        second = call(self.words(command, fresh=fresh), Injector(str(self.folder)))
        if (command, first.code) != ("export", 0):  # that folder exists by then
            wrong += [second.problem, f"the next call: {second.last}" if second.code else ""]
        if first.code == 0 and first.left_out and command in ("train", "data pack"):
            wrong += self.without_some(command, fault, first)  # what is left out stays so
        else:
            differ = self.differences(command, fresh=fresh, without=without, workers=kept)
            if command == "train" and "samples read are bad" in first.last:  # the run keeps that
                differ = [text for text in differ if not text.endswith(LISTS_OF_BAD)]
            wrong += [f"the next call: {text}" for text in differ]
        wrong += [what for _, what in invalid(self.folder, torn=False)]
        killed = first.code < 0 or fault.kind == "permission"  # cannot remove it
        wrong += [f"left behind: {name}" for name in leftovers(self.folder, killed=killed)]
        return first, second, [text for text in wrong if text]

    def end_of(self, fault: Fault, ended: Outcome) -> str:
        """What is wrong with the end of a call under a fault."""
        if fault.kind == "killed" and ended.code == -signal.SIGKILL:
            return ""
        if ended.left_out and fault.kind not in WITHOUT_IMAGES:
            return f"leaves out {ended.left_out} pairs"
        if ended.code and fault.kind in NAMED and str(self.folder) not in ended.last:
            return f"names no path: {ended.last}"
        return ended.problem

    def differences(
        self, command: str, *, fresh: bool, without: Sequence[str] = (), workers: int = 0
    ) -> list[str]:
        """Between what a command made and what it makes undisturbed with so many workers."""
        found = self.made(command, fresh=fresh)
        expected = {
            name: with_workers(content, workers)
            for name, content in self.expected[command, fresh].items()
        }
        names = sorted((found.keys() | expected.keys()) - {*without})
        return [f"another {n}" for n in names if found.get(n, b"") != expected.get(n, b"")][:3]

    def without_some(self, command: str, fault: Fault, ended: Outcome) -> list[str]:
        """What is wrong with what was made of all pairs but those that a call left out."""
        fresh = fault.fresh and command == "train"
        found, expected = self.made(command, fresh=fresh), self.expected[command, fresh]
        folder = "shards" if command == "data pack" else "fresh" if fresh else "stopped"
        skipped = {line["sample_id"] for line in found.get(f"{folder}/skipped.jsonl", [])}
        wrong = [f"lists {len(skipped)} skipped"] if len(skipped) != ended.left_out else []
        if ended.gone and (not ended.gone.startswith("images/") or ended.left_out != 1):
            wrong.append(f"leaves out {ended.left_out} pairs without {ended.gone}")
        if command == "data pack":
            packed, whole = packed_in(found), packed_in(expected)
            if packed != {name: pair for name, pair in whole.items() if name not in skipped}:
                wrong.append("packed other pairs")
        elif names := (found.keys() ^ expected.keys()) - {f"{folder}/skipped.jsonl"}:
            wrong.append(f"made, or did not make, {min(names)}")
        return wrong

    def lost(self, before: dict[str, bytes], fault: Fault, ended: Outcome) -> list[str]:
        """What was whole and is not there any more."""
        now, gone = snapshot(self.folder), []
        for name, content in before.items():
            if now.get(name) == content or (name == ended.gone and name not in now):
                continue
            # A run goes on: older checkpoints are removed, logs grow. Evaluation replaces results.
            if fault.command == "train" and name.startswith("stopped/"):
                continue
            if fault.command == "evaluate" and name.startswith("run/results/") and name in now:
                continue
            gone.append(f"lost: {name}")
        if fault.command == "train" and not fault.fresh:
            top = self.folder / "stopped"
            intact = [p.name for p in checkpoints(top) if damage(p) is None]
            if max(intact, default="") < self.start.name and not ended.gone.startswith(
                "stopped/checkpoints"
            ):
                gone.append("lost: the checkpoint")
            facts = json.loads(before[f"stopped/checkpoints/{self.start.name}/state.json"])
            for name, size in (("config.toml", None), ("metrics.jsonl", facts["metrics_bytes"])):
                name = f"stopped/{name}"
                ended_as = self.expected["train", False].get(name, before[name])
                known = (before[name], ended_as, with_workers(ended_as, 1))
                left = now.get(name, b"")[:size]
                kept = any(left == whole[:size] for whole in known if isinstance(whole, bytes))
                if not kept and name != ended.gone:
                    gone.append(f"lost: what {name} held")
        return gone
