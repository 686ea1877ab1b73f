"""What a person sees: texts of others, with those characters escaped that a terminal obeys."""

import re
import sys

# Controls, ends of lines, what turns the direction of text, and halves of characters.
OBEYED = re.compile(r"[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """A text with those characters escaped that a terminal obeys or that end a line."""
    if text.isascii() and text.isprintable():
        return text
    return OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def say(text: str) -> None:
    """Print one line to standard error, whatever paths and names are in it."""
    print(visible(text), file=sys.stderr, flush=True)
