"""The notebooks of examples/ run, and give what they show."""

from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_gives_what_it_shows(path, tmp_path):
    """Its words to the letter, and as many pictures."""
    shown = nbformat.read(path, as_version=4)
    found = nbformat.read(path, as_version=4)
    settings = {"timeout": 120, "resources": {"metadata": {"path": str(tmp_path)}}}
    nbclient.NotebookClient(found, **settings).execute()
    assert outputs(found) == outputs(shown)
    assert any(outputs(shown))


def outputs(notebook: nbformat.NotebookNode) -> list[list[str]]:
    return [
        [
            output.get("text") or ("picture" if "image/png" in output.get("data", {}) else "")
            for output in cell.get("outputs", [])
        ]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
