"""One small run for the tests that give commands a run in good order."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from interrupting import with_changes
from protoclip.training import run
from protoclip.training.folder import to_toml
from testing import tiny_config, tiny_pairs


@pytest.fixture(autouse=True, scope="module")
def quick_reports(without_charts: None) -> None:
    """tests/unit/report and tests/browser look at charts."""


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pairs, a recipe, and the run of it; copy it before changing it."""
    home = tmp_path_factory.mktemp("trained")
    pq.write_table(tiny_pairs(64), home / "pairs.parquet")
    config = tiny_config(str(home / "pairs.parquet"), out=str(home / "run"))
    (home / "recipe.toml").write_text(to_toml(config))
    run.train(with_changes(config, {"data": {"validation": 0.4}}))
    return home
