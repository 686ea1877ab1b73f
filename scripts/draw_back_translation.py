"""Draw docs/back_translation.png: prototypes before and after training, on toy points.

It runs the code of examples/notebooks/method.ipynb, so that page and notebook show the same.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "examples" / "notebooks" / "method.ipynb"


def draw(path: Path) -> None:
    """Write the notebook's figure as PNG."""
    mpl.use("Agg")
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    names["figure"].savefig(path, dpi=80)


if __name__ == "__main__":
    draw(ROOT / "docs" / "back_translation.png")
