"""The notebooks of examples/ run, and give what they show."""

from pathlib import Path

import nbclient
import nbformat
import pytest

KINDS = ("image/png", "text/html", "text/plain")
NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples" / "notebooks").glob("*.ipynb"))

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_gives_what_it_shows(path, tmp_path):
    """Its words to the letter, as many pictures and tables, and no errors; what goes to standard
    error is of the machine, and the numbers in tables and pictures are of its arithmetic."""
    shown = nbformat.read(path, as_version=4)
    found = nbformat.read(path, as_version=4)
    settings = {"timeout": 600, "resources": {"metadata": {"path": str(tmp_path)}}}
    nbclient.NotebookClient(found, **settings).execute()
    assert outputs(found) == outputs(shown)
    assert any(any(cell) for cell in outputs(shown))


def outputs(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """Of each cell what it prints, which may come in several pieces, and its kinds of pictures."""
    cells = []
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        shown = [output for output in cell.outputs if output.get("name") != "stderr"]
        printed = "".join(output.get("text", "") for output in shown)
        kinds = [
            next(kind for kind in KINDS if kind in each.data) for each in shown if "data" in each
        ]
        cells.append([printed, *kinds])
    return cells
