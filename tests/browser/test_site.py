"""The site of the documentation, built once: its plain texts, and its pages in a real browser."""

import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
# Pages with what is wide: pictures, formulas, tables, code.
WIDE = ["index.md", "architecture.md", "method.md", "results.md", "notebooks/align.md"]
WIDE += [f"reference/{name}.md" for name in ("settings", "commands", "python")]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The settings of a site that was built; skipped without the tools that build it."""
    pytest.importorskip("mkdocstrings")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    found = load_config(
        str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path_factory.mktemp("site")), strict=False
    )
    build(found)
    return found


@pytest.fixture(scope="module")
def site(config: Any) -> Path:
    return Path(config.site_dir)


@pytest.fixture(scope="module")
def pages(config: Any) -> list[str]:
    """What the navigation lists, such as `reference/settings.md`."""

    def names(entries: list[Any]) -> Iterator[str]:
        for entry in entries:
            for value in entry.values():
                yield from [value] if isinstance(value, str) else names(value)

    return list(names(config.nav))


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where the site is served, since a browser searches nothing in files."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_each_page_is_in_llms_txt_and_has_its_markdown(site: Path, pages: list[str]) -> None:
    """With its first sentence."""
    listed = re.findall(
        r"^- \[.+?\]\((.+?)\): \S.+$", (site / "llms.txt").read_text(encoding="utf-8"), re.M
    )
    skill = "https://github.com/protoclip/protoclip/blob/main/SKILL.md"
    assert sorted(listed) == sorted([*pages, "reference.txt", skill])
    for name in pages:
        assert (site / name).with_suffix(".html").is_file()
        text = (site / name).read_text(encoding="utf-8")
        assert text.startswith("# "), name
        assert len(text) > 200, name


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1400, "dark")])
def test_pages_fit_and_are_quiet(
    browser: Any, address: str, pages: list[str], width: int, scheme: str
) -> None:
    """No sideways scrolling, nothing from another host, nothing on the console: every page on a
    phone, and those with what is wide on a desk."""
    page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    asked, said, wide = set[str](), list[str](), list[str]()
    page.on("request", lambda request: asked.add(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    shown = {"light": "default", "dark": "slate"}[scheme]
    for name in pages if width == 390 else WIDE:
        page.goto(address + name.removesuffix("md") + "html")
        assert page.evaluate("document.body.dataset.mdColorScheme") == shown
        if page.evaluate("document.documentElement.scrollWidth") > width:
            wide.append(name)
    page.close()
    assert wide == []
    assert said == []
    assert {url for url in asked if not url.startswith((address, "data:"))} == set()
