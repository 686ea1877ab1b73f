"""The command line: it finds the command, runs it, and tells an error in one line.

Commands import what they need when they run, so that `--help` is fast.
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

from protoclip import __version__, signals, terminal
from protoclip.cli.completion import ASKS, Completion, complete
from protoclip.cli.data import Index, Inspect, Pack, Score
from protoclip.cli.demo import Demo
from protoclip.cli.encode import Embed, EmbedTeacher, Match
from protoclip.cli.evaluate import Choose, Classify, Evaluate
from protoclip.cli.explore import Explore
from protoclip.cli.export import Export
from protoclip.cli.results import Analyze, Compare, Report
from protoclip.cli.spec import align_rows, help_text, parse
from protoclip.cli.train import Align, Finetune, Train
from protoclip.terminal import Stream, protect_streams, say

COMMANDS: dict[str, type[Any]] = {
    "choose": Choose,
    "train": Train,
    "align": Align,
    "finetune": Finetune,
    "evaluate": Evaluate,
    "classify": Classify,
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
    "data score": Score,
    "data pack": Pack,
    "data index": Index,
    "completion": Completion,
}
WAYS_OUT = {
    errno.ENOSPC: "make room, and give the command again",
    errno.EDQUOT: "make room, and give the command again",
    errno.EMFILE: "the limit on open files (ulimit -n) is too low",
    errno.EACCES: "check its permissions, or choose another place",
    errno.EPERM: "check its permissions, or choose another place",
    errno.EROFS: "choose another place",
    errno.ENOTDIR: "a file is in the way; choose another place",
    errno.ENOENT: "check the path",
}
# Commands whose result is what they print, as that of any command with --json.
PRINT_RESULTS = ("choose", "evaluate", "compare", "match", "data inspect")
# Seconds that other ranks wait for rank 0 to report the same error.
PATIENCE = 5.0


@signals.handle_signals(
    signals.end_process, [number for number in signals.STOPPING if number != signal.SIGINT]
)
def main(arguments: list[str] | None = None) -> None:
    """Entry point. A user's mistake ends in one line on standard error and exit code 2."""
    output = protect_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    terminal.is_quiet = bool({"-q", "--quiet"} & {*words})
    words = [word for word in words if word not in ("-q", "--quiet")]
    if ASKS in os.environ:
        print("\n".join(complete(COMMANDS, words)))
        return
    name = next((name for name in COMMANDS if words[: name.count(" ") + 1] == name.split()), "")
    words = words[len(name.split()) :]
    try:
        if {"-h", "--help"} & {*words} and (name or words[0].startswith("-")):
            text = help_text(name, COMMANDS[name], "all" in words) if name else overview()
            print(text, flush=True)
            require_printed(output)
            sys.exit(0)
        if words in (["--version"], ["-V"]) and not name:
            print(f"protoclip {__version__}", flush=True)
            sys.exit(0)
        if not name:
            raise ValueError(describe_unknown_command(words))
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


def describe_unknown_command(words: list[str]) -> str:
    """What to say of words that begin with no command, but perhaps with nearly one."""
    text = " ".join(takewhile(lambda word: not word.startswith("-"), words))
    if family := [name for name in COMMANDS if name.startswith(f"{text} ") and text]:
        return f"{text}: choose one of {', '.join(family)}"
    close = get_close_matches(text, COMMANDS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"name one of {', '.join(COMMANDS)}"
    return f"no command {text!r}; {hint}" if text else f"no command: {hint}"


def overview() -> str:
    rows = {name: (inspect.getdoc(kind) or "").splitlines()[0] for name, kind in COMMANDS.items()}
    hint = "protoclip COMMAND --help lists its options, protoclip --version the version."
    return "\n".join(["usage: protoclip COMMAND [OPTIONS]", "", *align_rows(rows), "", hint])


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


def fail(error: Exception, command: str) -> NoReturn:
    """End with one line for an error that a user can do something about; raise others again.

    If several ranks have the same error, rank 0 reports it.
    """
    rank, together, silent, code = 0, False, False, 2
    if "torch" in sys.modules or {"RANK", "SLURM_PROCID"} & os.environ.keys():
        from protoclip.distributed import collectives

        rank, together = collectives.read_launcher()[0], collectives.world_size() > 1
        silent = isinstance(error, collectives.RaisedOnAnotherRank)
    message: str | None = str(error).strip()
    if isinstance(error, ValueError):
        # A worker process puts a traceback before the message.
        message = str(error).strip().rpartition("\nValueError: ")[2]
    elif isinstance(error, OSError):
        if error.filename is not None and error.errno in WAYS_OUT:
            message = f"{error.filename}: {error.strerror}; {WAYS_OUT[error.errno]}"
    else:
        from protoclip.data.loader import describe_killed_worker
        from protoclip.training.watch import describe_out_of_memory

        message, code = describe_out_of_memory(error, less_memory(command)), 1
        if message is None and isinstance(error, RuntimeError):
            message = describe_killed_worker(error)
        if message is None and not together:
            raise error
        if message is None:
            why = collectives.describe_failure(error)
            message = f"another rank has ended or does not answer ({why})"
    if silent or (rank and not together):
        # The launcher ends this process when rank 0 ends; the code stays that of the failure.
        with signals.handle_signals(lambda _: os._exit(code)):
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

        if collectives.world_size() > 1:  # the usual way waits for other ranks, which may be gone
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    sys.exit(code)
