"""Files in one script, for pages that no server answers: they may run scripts, but read no file."""

import json
import zlib
from collections.abc import Mapping
from itertools import groupby
from typing import Any

import numpy as np

LAST_BLOCK = b"\x03\x00"  # which ends what DEFLATE has packed
ESCAPE, OTHER_HALF = 0x2022, 0x8000
# Characters that would end the text or a line, are half of another one, or tell the order of bytes.
ESCAPED = np.zeros(1 << 16, bool)
ESCAPED[[0, *map(ord, "\n\r'\\\u2028\u2029\ufeff\ufffe\uffff"), ESCAPE]] = True
ESCAPED[0xD800:0xE000] = True


def pack_script(settings: Mapping[str, Any], files: Mapping[str, bytes]) -> bytes:
    """A script in UTF-16 that hands `settings` and files to `openPacked` of `explore.js`.

    A character holds 16 bits of them; what may not stand in a text has an escape before it.
    """
    # Those of one kind, which have much in common, together.
    kinds = groupby(files, key=lambda name: name.partition("-")[0])
    parts = (b"".join(files[name] for name in names) for _, names in kinds)
    packed = b"".join(map(deflate, parts)) + LAST_BLOCK
    units = np.frombuffer(packed + b"\0" * (len(packed) % 2), "<u2")
    is_escaped = ESCAPED[units]
    last = np.cumsum(1 + is_escaped) - 1
    text = np.full(last[-1] + 1, ESCAPE, "<u2")
    text[last] = units ^ np.uint16(OTHER_HALF) * is_escaped
    sizes = {name: len(content) for name, content in files.items()}
    facts = json.dumps({**settings, "size": len(packed), "files": sizes})
    return f"openPacked({facts}, '{text.tobytes().decode('utf-16-le')}')".encode("utf-16")


def deflate(content: bytes) -> bytes:
    """Blocks of DEFLATE, by the shortest of three ways: nothing repeats in weights."""
    ways = []
    for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_FILTERED, zlib.Z_HUFFMAN_ONLY):
        packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS, memLevel=9, strategy=strategy)
        ways.append(packer.compress(content) + packer.flush(zlib.Z_FULL_FLUSH))
    return min(ways, key=len)
