"""What both demonstrations, `demo.py` and `quick.py`, ask of their runs.

Neither trains here: `training/run.py` does.
"""

from collections.abc import Iterable
from pathlib import Path

from protoclip.config import Config
from protoclip.terminal import say


def is_finished(config: Config) -> bool:
    """Whether the folder of a run holds it, finished; raises `ValueError` if it holds another."""
    from protoclip.training.plan import make_plan
    from protoclip.training.run_folder import to_toml

    folder = Path(config.run.out or "")
    if not folder.exists():
        return False
    written, settings = folder / "config.toml", to_toml(make_plan(config).config)
    if not written.is_file() or written.read_text(encoding="utf-8") != settings:
        raise ValueError(
            f"{folder}: holds another run than this demonstration's; remove it, or choose "
            "another folder with --out"
        )
    return (folder / "results.json").is_file()


def write_report(folders: Iterable[Path], path: Path, *, samples: int) -> bool:
    """Write the report of runs; whether it could be."""
    from protoclip.cli.report import require

    try:
        require()
    except ValueError as error:
        say(f"note: no report.html: {error}")
        return False
    from protoclip.report import page

    page.write_report(list(folders), path, samples=samples)
    return True
