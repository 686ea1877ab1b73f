"""Reads what `protoclip.explore.pack` packs, as `explore.js` does."""

import json
import re
import zlib


def read_script(script: bytes) -> tuple[dict, dict[str, bytes]]:
    """The settings and the files of a script."""
    settings, text = re.fullmatch(
        r"openPacked\((\{.*\}), '([^'\n\r\\]*)'\)", script.decode("utf-16")
    ).groups()
    facts, units, characters = json.loads(settings), bytearray(), iter(text)
    for character in characters:
        code = ord(next(characters)) ^ 0x8000 if character == "\u2022" else ord(character)
        units += code.to_bytes(2, "little")
    packed, files, at = zlib.decompress(units[: facts["size"]], -zlib.MAX_WBITS), {}, 0
    for name, size in facts["files"].items():
        files[name] = packed[at : at + size]
        at += size
    return facts, files
