"""The pages: their links lead somewhere, and they and their sentences stay short."""

import pytest

from scripts_as_modules import ROOT, script


def test_the_repository_has_no_broken_link() -> None:
    with script("scripts/check_docs.py") as check_docs:
        assert check_docs.main() == 0


def test_pages_and_sentences_stay_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")  # where the script finds the other one
    with script("scripts/count_words.py") as count_words:
        assert count_words.main() == 0
        page = "One `a b`, [two](c d).  Three:\n- four\n| five |"
        sentences = list(count_words.split_sentences(page))
    prose = [(sentence, False) for sentence in ("One code, two.", "Three:", "four")]
    assert sentences == [*prose, ("five", True)]
