"""Links of the pages lead somewhere."""

from scripts_as_modules import script


def test_the_repository_has_no_broken_link() -> None:
    with script("scripts/check_docs.py") as check_docs:
        assert check_docs.main() == 0
