"""A browser: Debian's chromium, driven by playwright. Tests that ask for it are skipped without.

The fixture comes first among those of a test, so that nothing is made for a test that is skipped.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"


@pytest.fixture(scope="module")  # playwright holds the thread's event loop while it is open
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if not Path(CHROMIUM).is_file():
        pytest.skip(f"no browser: {CHROMIUM} does not exist")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def serious() -> Callable[[Any], list[str]]:
    """What axe-core finds serious or critical on a page, each with the elements; also where it is
    not sure, but for contrast, of which it is never sure where things overlap."""
    package = pytest.importorskip("axe_playwright_python")
    script = (Path(package.__file__).parent / "axe.min.js").read_text(encoding="utf-8")

    def found(page: Any) -> list[str]:
        page.evaluate(script)
        results = page.evaluate("axe.run({resultTypes: ['violations', 'incomplete']})")
        unsure = [each for each in results["incomplete"] if each["id"] != "color-contrast"]
        return [
            f"{each['id']}: {node['target']}: {node['failureSummary']}"
            for each in [*results["violations"], *unsure]
            if each["impact"] in ("serious", "critical")
            for node in each["nodes"]
        ]

    return found
