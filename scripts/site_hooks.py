"""What mkdocs.yml leaves to code: pages from the code, links into the repository, formulas, texts.

Nothing here needs a network, and what the site shows asks for none.
"""

import base64
import json
import posixpath
import re
import tomllib
from html import unescape
from pathlib import Path
from typing import Any

import draw_rooms
import reference
from latex2mathml.converter import convert
from mkdocs.structure.files import File

import protoclip

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\()(\.\./[^)\s]+)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
MERMAID = re.compile(r"```mermaid\n.*?```\n", re.DOTALL)
PAGES = {
    "reference/settings.md": reference.settings,
    "reference/commands.md": reference.commands,
    "reference/python.md": reference.python,
}
# What one edits to change a page that is made.
SOURCES = {
    "reference/settings.md": "src/protoclip/config.py",
    "reference/commands.md": "src/protoclip/cli",
    "reference/python.md": "src/protoclip/__init__.py",
    "reference/plain_text.md": "scripts/site_hooks.py",
}
NOTEBOOKS = ROOT / "examples" / "notebooks"
SEARCH: dict[str, dict[str, Any]] = {
    "LOG.md": {"exclude": True},  # or its tables would be most answers
    "reference/settings.md": {"boost": 4},  # or prose that has a setting's name comes first
}
# Pages of the reference that are written by hand.
WRITTEN = ("metrics.md", "run_folder.md", "compatibility.md")
PLAIN_TEXT = """# As plain text

For people who work with an assistant, and for whoever searches with `grep`:

- [llms.txt](../llms.txt) lists the pages of this site, each as Markdown, with a line on each.
- [reference.txt](../reference.txt) is the whole reference in one file: settings, commands, Python,
  metrics, the files of a run folder, and what stays from version to version.

The Markdown of any page lies beside it: `data.html` is made from `data.md`.
"""


def on_config(config: Any) -> Any:
    """The address of the repository is in pyproject.toml, the version in the package.

    It is no `repo_url`, for which the theme would ask GitHub when a page is viewed.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    config.extra["source"] = project["urls"]["Source"]
    link = {
        "icon": "fontawesome/brands/github",
        "link": project["urls"]["Source"],
        "name": "Source",
    }
    config.extra["social"] = [link]
    config.copyright = f"{config.site_name} {protoclip.__version__}"
    config.edit_uri = f"{project['urls']['Source']}/edit/main/docs/"
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made from the code, and the reference as one text."""
    for name, make in PAGES.items():
        files.append(File.generated(config, name, content=make()))
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        text, pictures = notebook(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    files.append(File.generated(config, "reference/plain_text.md", content=PLAIN_TEXT))
    helps = [
        f"## {name}\n\n{reference.full_help(name, kind)}"
        for name, kind in reference.COMMANDS.items()
    ]
    texts = [
        re.sub(r'<span id="[^"]+"></span>', "", reference.settings()),
        "\n\n".join(["# Commands", *helps]),
        reference.python_as_text(),
        *((ROOT / "docs" / name).read_text(encoding="utf-8") for name in WRITTEN),
    ]
    files.append(File.generated(config, "reference.txt", content="\n\n".join(texts)))
    return files


def notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook with its stored outputs as Markdown, and its pictures by name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            # From beside other notebooks, and from examples/, to where the site has them.
            source = re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", source)
            parts.append(source.replace("](../../docs/", "](../"))
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}-{len(pictures)}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![What the cell above draws]({name})")
            else:
                text = "".join(output.get("text") or data["text/plain"])
                parts.append(f"```text\n{text.rstrip()}\n```")
    link = f"[The notebook itself](../../{path.relative_to(ROOT).as_posix()}), to run."
    return "\n\n".join([*parts, link]) + "\n", pictures


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead links that leave docs/ to the repository, and draw the rooms without a script."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def absolute(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[2].partition("#")[0]))
        if path.startswith("docs/"):
            return match[0]
        if path.endswith(".ipynb") and not page.file.src_uri.startswith("notebooks/"):
            name = posixpath.join("docs", "notebooks", posixpath.basename(path))
            return f"{match[1]}{posixpath.relpath(name, folder).removesuffix('.ipynb')}.md"
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        _, mark, fragment = match[2].partition("#")
        return f"{match[1]}{config.extra['source']}/{kind}/main/{path}{mark}{fragment}"

    if page.edit_url is None:
        name = page.file.src_uri
        path = SOURCES.get(name) or f"examples/{name.removesuffix('.md')}.ipynb"
        kind = "edit" if (ROOT / path).is_file() else "tree"
        page.edit_url = f"{config.extra['source']}/{kind}/main/{path}"
    markdown = LINK.sub(absolute, markdown)
    if page.file.src_uri in SEARCH:
        page.meta["search"] = SEARCH[page.file.src_uri]
    page.meta["source_text"] = (
        MERMAID.sub("", markdown) if "reference/python" not in page.file.src_uri else ""
    )
    return MERMAID.sub(lambda _: draw_rooms.svg(draw_rooms.rooms()) + "\n", markdown)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Formulas as MathML, which browsers show by themselves, and no heading without words."""

    def formula(match: re.Match[str]) -> str:
        return convert(
            unescape(match[2].strip()), display="block" if match[1] == "div" else "inline"
        )

    return re.sub(r"<th( [^>]*)?></th>", "<td></td>", FORMULA.sub(formula, html))


def on_post_page(output: str, page: Any, config: Any) -> str:
    """The Markdown of a page beside it, and a name for the search, which the theme gives none."""
    text = page.meta.pop("source_text") or reference.python_as_text()
    path = Path(config.site_dir) / page.file.src_uri
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return name_search(output)


def on_post_template(output_content: str, template_name: str, config: Any) -> str:
    """404.html has the search too."""
    return name_search(output_content)


def name_search(html: str) -> str:
    dialog = 'data-md-component="search" role="dialog"'
    return html.replace(dialog, dialog + ' aria-label="Search"')
