"""Single values of an Arrow file, by reading their few bytes.

Through a memory map a random read costs a page fault, for which the system may map some hundred
kilobytes, and after an epoch the whole file lies in resident memory. Reading the same bytes with a
system call leaves nothing behind and takes no longer than through pages that are mapped already.
"""

import os
import struct
from bisect import bisect_right
from itertools import accumulate
from typing import Any

import pyarrow as pa

OFFSETS, WHOLE = struct.Struct("<ii"), struct.Struct("<q")
TEXTS = (pa.string(), pa.binary())


def is_readable(type_: pa.DataType) -> bool:
    """Whether `Values` reads a type on this system: text, lists of text, 64-bit whole numbers."""
    inner = type_.value_type if pa.types.is_list(type_) else type_
    return hasattr(os, "pread") and (inner in TEXTS or type_ == pa.int64())


class Values:
    """A column of an uncompressed Arrow file, by row.

    Args:
        column: As mapped from the file, of a type that `is_readable`.
        file: The open file's descriptor.
        base: Address that the file is mapped at.
    """

    def __init__(self, column: pa.ChunkedArray, *, file: int, base: int) -> None:
        assert all(chunk.offset == 0 for chunk in column.chunks), "arrays of a file start at 0"
        self.type, self.file = column.type, file
        self.starts = [0, *accumulate(len(chunk) for chunk in column.chunks)]
        # Of each batch, where its buffers lie in the file; nothing stands for "all values valid".
        self.buffers = [
            [None if buffer is None else buffer.address - base for buffer in chunk.buffers()]
            for chunk in column.chunks
        ]

    def __getitem__(self, row: int) -> Any:
        if not 0 <= row < self.starts[-1]:
            raise IndexError(f"row {row} of {self.starts[-1]}")
        batch = bisect_right(self.starts, row) - 1
        row, buffers = row - self.starts[batch], self.buffers[batch]
        if self.type in TEXTS:
            return self._text(self.type, buffers, row)
        if not self._is_valid(buffers[0], row):
            return None
        if self.type == pa.int64():
            return WHOLE.unpack(self._read(buffers[1], 8 * row, 8))[0]
        first, last = self._span(buffers[1], row)
        return [self._text(self.type.value_type, buffers[2:], one) for one in range(first, last)]

    def _read(self, buffer: int | None, offset: int, size: int) -> bytes:
        assert buffer is not None, "only validity may be missing"
        return os.pread(self.file, size, buffer + offset)

    def _is_valid(self, buffer: int | None, row: int) -> bool:
        return buffer is None or bool(self._read(buffer, row // 8, 1)[0] >> row % 8 & 1)

    def _span(self, buffer: int | None, row: int) -> tuple[int, int]:
        first, last = OFFSETS.unpack(self._read(buffer, 4 * row, 8))
        return first, last

    def _text(self, type_: pa.DataType, buffers: list[int | None], row: int) -> str | bytes | None:
        if not self._is_valid(buffers[0], row):
            return None
        first, last = self._span(buffers[1], row)
        found = self._read(buffers[2], first, last - first) if last > first else b""
        return found.decode() if type_ == pa.string() else found
