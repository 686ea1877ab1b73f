"""The notebooks of examples/ run, and give what they show."""

from collections.abc import Iterator
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
KINDS = ("image/png", "text/html", "text/plain")
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
# Lengths of runs, which no word that is shown depends on.
SHORTER = {'"count": 60': '"count": 2', '"count": 10': '"count": 2', '"count": 4': '"count": 1'}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def kernel() -> Iterator[nbclient.NotebookClient]:
    """One for all notebooks, since each kernel imports PyTorch anew."""
    client = nbclient.NotebookClient(nbformat.v4.new_notebook(), timeout=600)
    with client.setup_kernel():
        yield client


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_gives_what_it_shows(path, kernel, tmp_path_factory):
    """Its words to the letter, as many pictures and tables, and no errors; what goes to standard
    error is of the machine, and the numbers in tables and pictures are of its arithmetic."""
    shown = nbformat.read(path, as_version=4)
    found = nbformat.read(path, as_version=4)
    for cell in found.cells:
        for long, short in SHORTER.items():
            cell.source = cell.source.replace(long, short)
    # No `tmp_path`, which is removed while the kernel still stands in it.
    execute(kernel, found, tmp_path_factory.mktemp("notebook"))
    assert outputs(found) == outputs(shown)
    assert any(any(cell) for cell in outputs(shown))


def execute(kernel: nbclient.NotebookClient, notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Run a notebook in a folder, without the names of the notebook before."""
    fewer = "import protoclip.training.evaluate as e\ne.ALPHAS = (0.0, 0.3, 1.0)"
    anew = nbformat.v4.new_code_cell(f"{fewer}\n%reset -f\n%cd -q {folder}")
    for written in (nbformat.v4.new_notebook(cells=[anew]), notebook):
        kernel.nb = written
        kernel.reset_execution_trackers()
        for index, cell in enumerate(written.cells):
            kernel.execute_cell(cell, index)


def outputs(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """Of each cell what it prints, which may come in several pieces, and its kinds of pictures."""
    cells = []
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        shown = [output for output in cell.outputs if output.get("name") != "stderr"]
        printed = "".join(output.get("text", "") for output in shown)
        kinds = [
            next(kind for kind in KINDS if kind in output.data)
            for output in shown
            if "data" in output
        ]
        cells.append([printed, *kinds])
    return cells
