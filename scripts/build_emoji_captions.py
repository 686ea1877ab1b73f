"""Write captions of the bundled emoji in other languages: names and keywords of the Unicode CLDR.

The words come from two npm packages at the exact version below, or from folders of them that are
there already. A row is a concept; a caption is its name and then its keywords, between commas. The
same packages give the same bytes (the file at hand: pyarrow 26.0.1):

    python scripts/build_emoji_captions.py [--cache FOLDER] [--languages ar de ...] [--out FILE]

CLDR has more than a hundred languages; ten are bundled. A concept that CLDR does not name in a
language has an empty cell.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

FOLDER = Path(__file__).resolve().parents[1] / "src/protoclip/data/emoji"
VERSION = "48.2.0"
#: The packages, and what their folders and the entries of their files are called.
PACKAGES = {
    "cldr-annotations-full": "annotations",
    "cldr-annotations-derived-full": "annotationsDerived",  # flags, and people of a job
}
LANGUAGES = ("ar", "cs", "de", "es", "fr", "he", "hi", "ja", "th", "zh")


def find_concept(characters: str) -> str:
    """The concept of an emoji's characters: its code points, without variation selectors."""
    return "-".join(f"{ord(sign):x}" for sign in characters if sign != "\ufe0f")


def read_captions(modules: Path, language: str) -> dict[str, str]:
    """The caption of each emoji, by concept; raises `ValueError` for a language without words."""
    captions = {}
    for package, kind in PACKAGES.items():
        file = modules / package / kind / language / "annotations.json"
        if not file.exists():
            raise ValueError(f"--languages: CLDR {VERSION} has no emoji names in '{language}'")
        words = json.loads(file.read_text(encoding="utf-8"))[kind]["annotations"]
        for characters, entry in words.items():
            if names := entry.get("tts"):
                texts = dict.fromkeys([names[0], *entry.get("default", ())])
                captions[find_concept(characters)] = ", ".join(texts)
    return captions


def build(modules: Path, concepts: Sequence[str], languages: Sequence[str]) -> pa.Table:
    """A row for each concept, with a column `caption_LANGUAGE` for each language."""
    columns = {"concept": pa.array(concepts, pa.string())}
    for language in languages:
        captions = read_captions(modules, language)
        texts = [captions.get(concept) for concept in concepts]
        columns[f"caption_{language}"] = pa.array(texts, pa.string())
        print(f"{language}: {len(texts) - texts.count(None)} of {len(texts)} concepts")
    return pa.table(columns)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write captions of the emoji in other languages.")
    parser.add_argument("--cache", type=Path, help="where to keep the npm packages")
    parser.add_argument("--languages", nargs="+", default=LANGUAGES, help="as CLDR calls them")
    parser.add_argument("--out", type=Path, default=FOLDER / "emoji_captions.parquet")
    args = parser.parse_args()
    concepts = pq.read_table(FOLDER / "emoji.parquet", columns=["concept"])["concept"].to_pylist()
    with tempfile.TemporaryDirectory() as scratch:
        cache = args.cache or Path(scratch)
        if not all((cache / "node_modules" / package).exists() for package in PACKAGES):
            wanted = [f"{package}@{VERSION}" for package in PACKAGES]
            command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix"]
            subprocess.run([*command, str(cache), *wanted], check=True)
        table = build(cache / "node_modules", [*dict.fromkeys(concepts)], args.languages)
    pq.write_table(table, args.out, compression="zstd")
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
