"""Whether any of some pairs can be used, asked before a run begins.

A run would learn it late, and leave a folder in the way of the next one.
"""

from collections.abc import Callable

from protoclip.data.sampler import evenly_spaced

TRIED = 20  # rows of which one has to be good


def require_readable(named: str, rows: int, read: Callable[[int], object]) -> None:
    """Refuse a source none of whose rows can be used; some are read until one is good.

    Args:
        named: The setting and the source, for the message.
        read: Reads a row; of a bad one it raises `ValueError`.

    Raises:
        ValueError: None of some evenly spaced rows can be used.
    """
    reasons = list[str]()
    for row in evenly_spaced(rows, min(rows, TRIED), seed=0):
        try:
            read(row)
            return
        except ValueError as error:
            reasons.append(str(error))
    if reasons:
        raise ValueError(
            f"{named}: of {len(reasons)} pairs that were looked at none can be used, such as "
            f"{reasons[0]}; mend them, or set data.root to the folder where the paths start"
        )
