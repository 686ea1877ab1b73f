"""Check that links in the Markdown files lead to a file, and fragments to a heading.

Links are relative, or absolute ones into the repository, whose address `[project.urls]` of
pyproject.toml has. The README has absolute ones alone, since a package index shows it elsewhere.
"""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
NOT_OURS = {"build", "dist", "node_modules", "runs"}  # besides folders whose name starts with a dot

LINK = re.compile(
    r"\]\(\s*<?(?P<inline>[^)\s>]+)"  # [text](target "title") and ![text](target)
    r"|^\s{0,3}\[[^\]]+\]:\s*<?(?P<reference>[^\s>]+)"  # [name]: target
    r"|\b(?:href|src)=[\"'](?P<html>[^\"']+)[\"']"  # <img src="target">
)
INLINE_CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)")
EXTERNAL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:|//")
FENCE = re.compile(r"\s*(?P<ticks>`{3,}|~{3,})")


def addresses() -> list[str]:
    """What absolute links to files of the repository start with: to pages, and to pictures."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    source = project["urls"]["Source"]
    pictures = source.replace("https://github.com", "https://raw.githubusercontent.com")
    return [f"{source}/blob/main/", f"{source}/tree/main/", f"{pictures}/main/"]


def markdown_files() -> list[Path]:
    def ours(path: Path) -> bool:
        folders = path.relative_to(ROOT).parts[:-1]
        return not any(name in NOT_OURS or name.startswith(".") for name in folders)

    return sorted(filter(ours, ROOT.rglob("*.md")))


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines outside fenced code."""
    fence = ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        match = FENCE.match(line)
        if not match and not fence:
            yield number, line
        elif match and not fence:
            fence = match["ticks"]
        elif match and match["ticks"].startswith(fence) and not line.strip().strip(fence[0]):
            fence = ""


def anchors(path: Path) -> set[str]:
    """The fragments that GitHub gives to the headings, and explicit ids."""
    found: set[str] = set()
    for _, line in prose(path):
        found.update(re.findall(r"\b(?:id|name)=[\"']([^\"']+)[\"']", line))
        if heading := re.match(r"#{1,6}\s+(.*?)\s*#*$", line):
            text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])  # links: their text only
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            copies = sum(slug == re.sub(r"-\d+$", "", other) for other in found)
            found.add(f"{slug}-{copies}" if slug in found else slug)
    return found


def broken_links(path: Path, ours: list[str]) -> Iterator[str]:
    for number, line in prose(path):
        for match in LINK.finditer(INLINE_CODE.sub("", line)):
            target = match["inline"] or match["reference"] or match["html"]
            address = next((start for start in ours if target.startswith(start)), "")
            if EXTERNAL.match(target) and not address:
                continue
            where = f"{path.relative_to(ROOT)}:{number}: {target}"
            name, _, fragment = target.removeprefix(address).partition("#")
            name = unquote(name.partition("?")[0])
            if name and not address and path == ROOT / "README.md":
                yield f"{where}: relative; begin it with {ours[0]}"
                continue
            base = ROOT if address or name.startswith("/") else path.parent
            file = base / name.lstrip("/") if name else path
            if not file.exists():
                yield f"{where}: no such file"
            elif fragment and file.suffix == ".md" and unquote(fragment) not in anchors(file):
                yield f"{where}: no such heading in {file.name}"


def main() -> int:
    files, ours = markdown_files(), addresses()
    broken = [message for path in files for message in broken_links(path, ours)]
    print("\n".join([*broken, f"{len(files)} Markdown files, {len(broken)} broken links"]))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
