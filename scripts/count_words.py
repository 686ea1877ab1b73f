"""Measure the pages of docs/ against bounds: their words together, and the sentences of each page.

A word is what stands between spaces and has a letter or a digit. Code blocks, comments and formulas
are left out, and so is LOG.md, a record that grows. A sentence ends at `.`, `!` or `?`, and with a
list item, a cell of a table or a heading; code within it counts as one word.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from check_docs import ROOT, prose

WORDS = 24_000
WORDS_OF_PAGE = {"results.md": 1_200, "faq.md": 600, "coming_from.md": 400}
LONGEST, MEAN = 35, 17.0  # words in a sentence; cells do not count for the mean


def read_text(path: Path) -> str:
    text = "\n".join(line for _, line in prose(path))
    text = re.sub(r"<!--.*?-->|\$\$.*?\$\$", "", text, flags=re.DOTALL)
    return re.sub(r"(?<!`)\$[^$`\n]+\$", "$x$", text)  # a formula within a line: one word


def count_words(text: str) -> int:
    return sum(bool(re.search(r"\w", word)) for word in text.split())


def split_sentences(text: str) -> Iterator[tuple[str, bool]]:
    """Each sentence, and whether it stands in a table."""
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)  # pictures
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)  # links: their text only
    text = re.sub(r"`[^`]+`", "code", text)
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )|\n(?=[|#])", text):
        in_table = block.lstrip().startswith("|")
        if block.lstrip().startswith("#"):
            continue
        for part in block.split("|") if in_table else [block]:
            part = re.sub(r"^\s*(?:[-*]|\d+\.) ", "", part)
            for sentence in re.split(r"(?<=[.!?])[)\"'*]*\s+", part):
                if count_words(sentence):
                    yield " ".join(sentence.split()), in_table


def check_page(path: Path, text: str) -> Iterator[str]:
    """What is above a bound."""
    sentences = list(split_sentences(text))
    lengths = [count_words(sentence) for sentence, in_table in sentences if not in_table]
    mean = sum(lengths) / len(lengths)
    name, words = path.relative_to(ROOT), count_words(text)
    bound = WORDS_OF_PAGE.get(path.name, WORDS)
    print(f"{words:6,} {mean:5.1f} {max(lengths):3} {name}")
    if words > bound:
        yield f"{name}: {words:,} words; at most {bound:,} may stay"
    if mean > MEAN:
        yield f"{name}: {mean:.1f} words in a sentence on average; at most {MEAN:.0f} may be"
    for sentence, _ in sentences:
        if (length := count_words(sentence)) > LONGEST:
            yield f"{name}: {length} words in a sentence; at most {LONGEST} may be: {sentence}"


def main() -> int:
    pages = [path for path in sorted((ROOT / "docs").rglob("*.md")) if path.name != "LOG.md"]
    texts = {path: read_text(path) for path in pages}
    print(" words  mean max page")
    failures = [line for path, text in texts.items() for line in check_page(path, text)]
    total = sum(map(count_words, texts.values()))
    print(f"{total:6,} words on {len(pages)} pages; at most {WORDS:,}")
    if total > WORDS:
        failures.append(f"docs: {total:,} words; at most {WORDS:,} may stay")
    print("\n".join(failures), file=sys.stderr, end="\n" if failures else "")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
