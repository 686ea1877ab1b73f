"""Whether any of some pairs can be used, asked before a run begins.

A run would learn it late, and leave a folder in the way of the next one.
"""

import time
from collections.abc import Callable

from protoclip.data import access
from protoclip.data.pairs import BadSample
from protoclip.data.sampler import evenly_spaced

TRIED = 64  # rows of which one has to be good


def require_readable(named: str, rows: int, read: Callable[[int], object]) -> None:
    """Refuse a source none of whose rows can be used; some are read until one is good.

    Args:
        named: The setting and the source, for the message.
        read: Reads a row; of a bad one it raises `ValueError`, such as `BadSample`.

    Raises:
        ValueError: None of some evenly spaced rows can be used, or they take too long.
    """
    bad, began = list[ValueError](), time.monotonic()
    for row in evenly_spaced(rows, min(rows, TRIED), seed=0):
        try:
            read(row)
            return
        except ValueError as error:
            bad.append(error)
        if time.monotonic() - began > access.PATIENCE_SECONDS:
            raise ValueError(f"{named}: {access.too_slow(f'{len(bad)} pairs', bad[-1])}")
    if bad:
        is_remote = isinstance(bad[0], BadSample) and access.is_url(bad[0].where)
        way_out = "mend them, or set data.root to the folder where the paths start"
        raise ValueError(
            f"{named}: of {len(bad)} pairs that were looked at none can be used, such as {bad[0]}; "
            f"{access.GO_ON if is_remote else way_out}"
        )
