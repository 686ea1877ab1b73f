"""scripts/check_docs.py finds links that lead nowhere, and relative ones in the README."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from scripts_as_modules import script

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "https://github.com/me/it"


@pytest.fixture
def check_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script, for a small repository in `tmp_path`."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text("# Page\n\n## Here\n", encoding="utf-8")
    urls = f'[project.urls]\nSource = "{ADDRESS}"\n'
    (tmp_path / "pyproject.toml").write_text(urls, encoding="utf-8")
    with script("scripts/check_docs.py") as module:
        monkeypatch.setattr(module, "ROOT", tmp_path)
        yield module


@pytest.mark.parametrize(
    ("file", "link", "complaint"),
    [
        ("README.md", f"{ADDRESS}/blob/main/docs/page.md#here", None),
        ("README.md", "https://raw.githubusercontent.com/me/it/main/docs/page.md", None),
        ("README.md", f"{ADDRESS}/issues", None),
        ("README.md", f"{ADDRESS}/blob/main/docs/gone.md", "no such file"),
        ("README.md", "https://raw.githubusercontent.com/me/it/main/gone.png", "no such file"),
        ("README.md", f"{ADDRESS}/blob/main/docs/page.md#gone", "no such heading in page.md"),
        ("README.md", "docs/page.md", f"relative; begin it with {ADDRESS}/blob/main/"),
        ("docs/other.md", "page.md#here", None),
        ("docs/other.md", "gone.md", "no such file"),
    ],
)
def test_links(
    check_docs: ModuleType, tmp_path: Path, file: str, link: str, complaint: str | None
) -> None:
    (tmp_path / file).write_text(f"See [it]({link}).\n", encoding="utf-8")
    found = list(check_docs.broken_links(tmp_path / file, check_docs.addresses()))
    assert found == ([] if complaint is None else [f"{file}:1: {link}: {complaint}"])


def test_the_repository_has_no_broken_link(check_docs: ModuleType) -> None:
    check_docs.ROOT = ROOT
    assert check_docs.main() == 0
