"""A browser: Debian's chromium, driven by playwright. Tests that ask for it are skipped without.

The fixture comes first among those of a test, so that nothing is made for a test that is skipped.
"""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from protoclip.cli.explore import listen
from protoclip.explore.pages import Pages
from protoclip.explore.serve import make_server

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
        unsure = [result for result in results["incomplete"] if result["id"] != "color-contrast"]
        return [
            f"{result['id']}: {node['target']}: {node['failureSummary']}"
            for result in [*results["violations"], *unsure]
            if result["impact"] in ("serious", "critical")
            for node in result["nodes"]
        ]

    return found


@pytest.fixture(scope="module")
def serve_pages() -> Iterator[Callable[[Pages], str]]:
    """Serves pages until the end, and returns their address."""
    running = []

    def serve(pages: Pages) -> str:
        listening = listen("127.0.0.1", 0)
        serving = make_server(pages, host="127.0.0.1", token="token")
        thread = threading.Thread(target=serving.run, kwargs={"sockets": [listening]})
        thread.start()
        running.append((serving, thread))
        return f"http://127.0.0.1:{listening.getsockname()[1]}/?token=token"

    yield serve
    for serving, thread in running:
        serving.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def address(pages: Pages, serve_pages: Callable[[Pages], str]) -> str:
    """That of the `pages` of a file of tests."""
    return serve_pages(pages)
