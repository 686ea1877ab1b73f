"""docs/python.md does not rot: its blocks run one after the other, with tiny encoders."""

import re
from pathlib import Path

import pytest

from testing import tiny_pairs
from tiny_starts import save_encoders

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
# The one line that is replaced: what it names is not here.
ENCODERS = re.compile(r"^encoders = .*$", re.MULTILINE)


def write_shop(file: Path, images: Path, *, seed: int) -> None:
    """A table with the columns of the page."""
    rows, pairs = ["bild,titel,sku,art"], tiny_pairs(96, seed=seed)
    for row, (image, caption) in enumerate(
        zip(pairs["image"].to_pylist(), pairs["caption"].to_pylist(), strict=True)
    ):
        name = f"{file.stem if seed else ''}{row}.jpg"
        (images / name).write_bytes(image)
        rows.append(f"bilder/{name},{caption},A-{row},{caption.split()[1]}")
    file.write_text("\n".join(rows), encoding="utf-8")


@pytest.mark.slow
def test_the_walk_runs(tmp_path, monkeypatch, capsys):
    """The search prints ids of the shop's own column, and the export is there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bilder").mkdir()
    write_shop(tmp_path / "shop.csv", tmp_path / "bilder", seed=0)
    write_shop(tmp_path / "unseen.csv", tmp_path / "bilder", seed=1)
    tiny = save_encoders(tmp_path / "encoders", "test_resnet", size=32)
    named = {
        "image": {"name": "timm:test_resnet", "weights": tiny.image.weights, "size": 32},
        "text": {"name": tiny.text.name, "context_length": 20},
    }
    page = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    code, replaced = ENCODERS.subn(lambda _: f"encoders = {named}", "".join(blocks))
    assert (len(blocks), replaced) == (6, 1)
    exec(compile(code, str(PAGE), "exec"), {"__name__": "page"})
    said = capsys.readouterr().out
    assert len(re.findall(r"^-?[01]\.\d\d A-\d+ \['", said, re.MULTILINE)) == 5
    assert "zeroshot_classification" in said
    assert "zeroshot_retrieval" in said
    assert (tmp_path / "exported" / "README.md").exists()
