"""What a person sees: streams that stop nothing, and texts that are safe to print.

Such a text holds no secret of a URL, and nothing that a terminal obeys.
"""

import io
import re
import sys
from contextlib import suppress
from typing import Any

# Controls, ends of lines, what turns the direction of text, and halves of characters.
OBEYED = re.compile(r"[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

is_quiet = False  # as `-q` says, for the whole process
REMOVED = "***"
URL = re.compile(r"(?<=://)[^\s\"<>`]+")
# Behind the query of a URL may stand options of the data set, or punctuation of the sentence.
OPTIONS, PUNCTUATION = re.compile(r",(?:[a-z]+_column|root)=.*"), "]'):;,.}"


def without_secrets(text: str) -> str:
    """A text whose URLs have lost user, password and query, which may be secrets.

    Settings as they are written down go through here, and, by `visible`, all messages.

    >>> without_secrets("https://me:word@host/{0..9}.tar?token=abc: no such file")
    'https://***@host/{0..9}.tar?***: no such file'
    """
    return URL.sub(_without_secrets, text)


def _without_secrets(url: re.Match[str]) -> str:
    address = url[0]
    host = re.split("[/?#]", address, maxsplit=1)[0]
    port = "" if host.startswith("[") else host.partition(":")[2]
    if "@" in host:
        address = f"{REMOVED}@{address[host.rindex('@') + 1 :]}"
    elif port and not port.isdecimal() and "@" in address:  # a password that holds a slash
        address = f"{REMOVED}@{address.rpartition('@')[2]}"
    before = re.split("[?#]", address, maxsplit=1)[0]
    query = address[len(before) :]
    if not query.strip(f"?#{PUNCTUATION}"):
        return address
    options = OPTIONS.search(query)
    behind = options[0] if options else query[len(query.rstrip(PUNCTUATION)) :]
    return f"{before}?{REMOVED}{behind}"


def visible(text: str) -> str:
    """`without_secrets`, with those characters escaped that a terminal obeys or that end a line."""
    text = without_secrets(text)
    if text.isascii() and text.isprintable():
        return text
    return OBEYED.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def line(text: str, limit: int = 200) -> str:
    """A text on one line that any terminal can show, cut to a length."""
    text = visible(" ".join(text.split()))
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def counted(number: int, noun: str) -> str:
    """`1 episode`, `2,000 episodes`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def say(text: str, *, is_question: bool = False) -> None:
    """Print one line to standard error, whatever paths and names are in it, if that is possible.

    Of a quiet command this is warnings, errors and questions alone.
    """
    heard = is_question or not is_quiet or text.startswith(("warning: ", "  ", "protoclip: "))
    if heard and sys.stderr is not None:  # `print` would take standard output
        with suppress(OSError):
            print(visible(text), file=sys.stderr, flush=True)


class Stream(io.FileIO):
    """A standard stream that drops what it cannot write; `error` is the first reason.

    So whatever prints (we, Python at its exit, a library's warning, a thread's traceback) can end
    no work, when the reader has left, the disk is full or the terminal is gone.
    """

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = self.error or error
            return memoryview(data).nbytes


def protect_streams() -> Stream | None:
    """Make `sys.stdout` and `sys.stderr` streams that raise nothing; returns the first one's.

    They escape characters that their encoding lacks. What a caller put in their place stays.
    """
    streams: dict[str, Stream] = {}
    for name, number in (("stdout", 1), ("stderr", 2)):
        before = getattr(sys, name)
        if before is None or before is not getattr(sys, f"__{name}__"):
            continue
        streams[name] = Stream(number, "w", closefd=False)
        text = io.TextIOWrapper(
            io.BufferedWriter(streams[name]),
            encoding=before.encoding,
            errors="backslashreplace",
            line_buffering=before.line_buffering or before.write_through,
        )
        setattr(sys, name, text)
    return streams.get("stdout")
