"""The command line: it finds the command, runs it, and tells an error in one line.

Commands import what they need when they run, so that `--help` is fast. Each has a file of its own,
and `spec.py` turns words into its settings.
"""

import errno
import inspect
import os
import signal
import sys
import time
from dataclasses import fields
from difflib import get_close_matches
from itertools import takewhile
from typing import Any, NoReturn

from protoclip import __version__, signals
from protoclip.cli.align import Align
from protoclip.cli.analyze import Analyze
from protoclip.cli.compare import Compare
from protoclip.cli.data import Index, Inspect, Pack
from protoclip.cli.demo import Demo
from protoclip.cli.embed import Embed
from protoclip.cli.embed_teacher import EmbedTeacher
from protoclip.cli.evaluate import Evaluate
from protoclip.cli.explore import Explore
from protoclip.cli.export import Export
from protoclip.cli.finetune import Finetune
from protoclip.cli.match import Match
from protoclip.cli.pages import with_page
from protoclip.cli.report import Report
from protoclip.cli.spec import aligned, help_text, parse
from protoclip.cli.train import Train
from protoclip.terminal import Stream, protect_streams, say

COMMANDS: dict[str, type[Any]] = {
    "train": Train,
    "align": Align,
    "finetune": Finetune,
    "evaluate": Evaluate,
    "compare": Compare,
    "analyze": Analyze,
    "report": Report,
    "explore": Explore,
    "export": Export,
    "embed": Embed,
    "demo": Demo,
    "match": Match,
    "embed-teacher": EmbedTeacher,
    "data inspect": Inspect,
    "data pack": Pack,
    "data index": Index,
}
WAYS_OUT = {
    errno.ENOSPC: "make room, and give the command again",
    errno.EDQUOT: "make room, and give the command again",
    errno.EFBIG: "the limit on the size of files (ulimit -f) is too low",
    errno.EMFILE: "the limit on open files (ulimit -n) is too low",
    errno.EACCES: "check its permissions, or choose another place",
    errno.EPERM: "check its permissions, or choose another place",
    errno.EROFS: "choose another place",
    errno.EEXIST: "choose another place",
    errno.ENOTDIR: "a file is in the way; choose another place",
    errno.EISDIR: "name a file",
    errno.ENOENT: "check the path",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "choose another place",
}
# Commands whose result is what they print, as that of any command with --json.
PRINT_RESULTS = ("evaluate", "compare", "match", "data inspect")
# Seconds that other ranks wait for rank 0 to report the same error.
PATIENCE = 5.0


@signals.handled(signals.end, [number for number in signals.STOPPING if number != signal.SIGINT])
def main(arguments: list[str] | None = None) -> None:
    """Entry point. A user's mistake ends in one line on standard error and exit code 2."""
    output = protect_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    # The command may stand behind options: `protoclip --json compare a b`.
    starts = {
        start: name
        for name in COMMANDS
        for start in range(len(words))
        if words[start : start + len(name.split())] == name.split()
    }
    name = starts[min(starts)] if starts else ""
    for part in name.split():
        words.remove(part)
    try:
        if sys.flags.optimize > 1:
            raise ValueError("PYTHONOPTIMIZE: 2, or -OO, removes what libraries read; set it to 1")
        try:
            os.getcwd()  # noqa: PTH109
        except FileNotFoundError:  # or libraries would end the process
            raise OSError("the current folder was deleted; cd to another one") from None
        if not {"-h", "--help"}.isdisjoint(words) and (name or words[0].startswith("-")):
            print(help_text(name, COMMANDS[name]) if name else overview(), flush=True)
            require_printed(output)
            sys.exit(0)
        if words in (["--version"], ["-V"]) and not name:
            print(f"protoclip {__version__}", flush=True)
            require_printed(output)
            sys.exit(0)
        if not name:
            said = " ".join(takewhile(lambda word: not word.startswith("-"), words))
            family = [known for known in COMMANDS if known.split()[0] == said and known != said]
            if family:
                raise ValueError(f"{said}: choose one of {', '.join(family)}")
            raise ValueError(f"no command{f' {said!r};' if said else ':'} {meant(words)}")
        command = parse(COMMANDS[name], words)
        command()
        sys.stdout.flush()
        if name in PRINT_RESULTS or getattr(command, "json", False):
            require_printed(output)
    except KeyboardInterrupt:
        say("protoclip: interrupted")
        leave(128 + signal.SIGINT)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        fail(error, name)


def meant(words: list[str]) -> str:
    """What to say to words that begin with no command, but perhaps with nearly one."""
    for length in (2, 1):
        known = [name for name in COMMANDS if len(name.split()) == length]
        if close := get_close_matches(" ".join(words[:length]), known, n=1):
            return f"did you mean {close[0]}?"
    return f"choose one of {', '.join(COMMANDS)}"


def overview() -> str:
    rows = {name: (inspect.getdoc(kind) or "").splitlines()[0] for name, kind in COMMANDS.items()}
    hint = "protoclip COMMAND --help lists its options, protoclip --version the version."
    return "\n".join(["usage: protoclip COMMAND [OPTIONS]", "", *aligned(rows), "", hint])


def require_printed(output: Stream | None) -> None:
    """Refuse to end well if standard output, a command's result, was not written.

    A reader that leaves, as `head -1` does, has what it wanted.
    """
    error = output.error if output is not None else None
    if error is not None and not isinstance(error, BrokenPipeError):
        raise OSError(
            f"standard output: {error.strerror}; what is printed was lost, so give the command "
            "again with one that can be written"
        )


def described(error: OSError) -> str:
    """An error of the system, with the file and a way out."""
    if error.filename is None or error.errno not in WAYS_OUT:
        return str(error)
    return f"{error.filename}: {error.strerror}; {WAYS_OUT[error.errno]}"


def fail(error: Exception, command: str) -> NoReturn:
    """End with one line for an error that a user can do something about; raise others again.

    The line names the page that explains the setting, or the command. Of several ranks with the
    same error, rank 0 reports it.
    """
    rank, together, silent, code = 0, False, False, 2
    if "torch" in sys.modules or {"RANK", "SLURM_PROCID"} & os.environ.keys():
        from protoclip.distributed import collectives

        rank, together = collectives.launched()[0], collectives.is_distributed()
        silent = isinstance(error, collectives.RaisedOnAnotherRank)
    message: str | None = str(error).strip()
    if isinstance(error, ValueError):
        # A worker process puts a traceback before the message.
        message = with_page(str(error).strip().rpartition("\nValueError: ")[2], command)
    elif isinstance(error, OSError):
        message = described(error)
    else:
        from protoclip.data.loader import describe_killed_worker
        from protoclip.training.guard import out_of_memory

        message, code = out_of_memory(error, less_memory(command)), 1
        if message is None and isinstance(error, RuntimeError):
            message = describe_killed_worker(error)
        if message is None and not together:
            raise error
        if message is None:
            why = collectives.reason(error)
            message = f"another rank has ended or does not answer ({why})"
    if silent or (rank and not together):
        # The launcher ends this process when rank 0 ends; the code stays that of the failure.
        with signals.handled(lambda _: os._exit(code)):
            time.sleep(PATIENCE)
    if not silent:
        say(f"protoclip: error: {f'rank {rank}: ' if rank else ''}{message}")
    leave(code)


def less_memory(command: str) -> str | None:
    """How a command that does not train takes less memory."""
    if command not in COMMANDS or command in ("train", "align", "finetune"):
        return None
    options = {option.name for option in fields(COMMANDS[command])}
    lower = [f"lower --{name}" for name in ("batch_size", "samples") if name in options]
    return f"{' or '.join(lower) or 'end other programs'}, and give the command again"


def leave(code: int) -> NoReturn:
    """Exit before the end of the work."""
    if "torch" in sys.modules:
        from protoclip.distributed import collectives

        if collectives.is_distributed():  # the usual way waits for other ranks, which may be gone
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    sys.exit(code)
