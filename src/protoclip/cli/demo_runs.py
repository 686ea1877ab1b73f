"""What both demonstrations, `demo.py` and `quick.py`, ask of their runs.

Neither trains here: `training/run.py` does.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from protoclip.config import Config
from protoclip.terminal import say


def is_finished(config: Config) -> bool:
    """Whether the folder of a run holds it, finished.

    Raises:
        ValueError: It holds another run, or something else.
    """
    from protoclip.training.plan import resolve_settings
    from protoclip.training.run_folder import folder_of, look, pooled_as_begun

    try:
        outlined = resolve_settings(pooled_as_begun(config, folder_of(config)))
        return look(outlined, resume=True).results is not None
    except ValueError as error:
        way_out = "remove it, or choose another folder with --out"
        told = re.sub(
            "(restore them, or )?choose another( folder)? with --run.out", way_out, str(error)
        )
        raise ValueError(told) from error


def write_report(folders: Iterable[Path], path: Path, *, samples: int) -> bool:
    """Write the report of runs; whether it could be."""
    from protoclip.cli.report import require

    try:
        require()
    except ValueError as error:
        say(f"note: no report.html: {error}")
        return False
    from protoclip.results import page

    page.write_report(list(folders), path, samples=samples)
    return True
