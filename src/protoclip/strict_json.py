"""JSON that every parser reads: what is not finite is null, since JSON has no NaN or infinity."""

import json
import math
from typing import Any


def finite(value: Any) -> Any:
    """The same tree of mappings, lists and values, with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def dumps(value: Any, **settings: Any) -> str:
    """`json.dumps` of `finite(value)`."""
    return json.dumps(finite(value), allow_nan=False, **settings)
