"""docs/data.md does not rot: its settings train and its commands run, on small data of those names.

A block runs unless a `<!-- not run: why -->` stands before it.
"""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from protoclip.cli import main
from protoclip.data import tools
from protoclip.data.pairs import ImageTextPairs
from testing import tiny_pairs

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
BLOCK = re.compile(r"(<!-- not run: [^\n]+ -->\n)?```(\w+)\n(.*?)```", re.DOTALL)
# A run of two steps.
TINY = """
    --run.device cpu --run.precision fp32
    --model.image.name test_resnet --model.image.size 32 --model.embed_dim 16
    --model.text.context_length 8 --model.text.width 16 --model.text.layers 1
    --model.heads.hidden_dim 32 --model.heads.projection_dim 8
    --episodes.size 32 --episodes.batch_size 16 --episodes.count 1 --episodes.locked_image 0
    --prototypes.number 4 --prototypes.iterations 2
"""
NUMBER = 96


def blocks(language: str) -> Iterator[str]:
    """The page's blocks of a language that are to be run."""
    for not_run, found, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if found == language and not not_run:
            yield text


def commands() -> Iterator[str]:
    for block in blocks("sh"):
        yield from block.replace("\\\n", " ").strip().splitlines()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same pairs under every name that the page uses."""
    root = tmp_path_factory.mktemp("docs")
    table = tiny_pairs(NUMBER)
    images, captions = table["image"].to_pylist(), table["caption"].to_pylist()
    pq.write_table(table, root / "pairs.parquet")
    (root / "mislabelled.csv").write_text("sample_id\npairs.tsv/3\n", encoding="utf-8")
    for name in ("images", "folder", "imagefolder", "export", "saved"):
        (root / name).mkdir()
    tsv, lines = ["filepath\ttitle"], []
    for row, (image, caption) in enumerate(zip(images, captions, strict=True)):
        for name in ("images", "folder", "imagefolder"):
            (root / name / f"{row}.png").write_bytes(image)
        (root / "folder" / f"{row}.txt").write_text(caption, encoding="utf-8")
        tsv.append(f"images/{row}.png\t{caption}")
        lines.append(json.dumps({"file_name": f"{row}.png", "text": caption}))
    (root / "pairs.tsv").write_text("\n".join(tsv) + "\n", encoding="utf-8")
    (root / "imagefolder" / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tools.pack(ImageTextPairs(table, name="tiny"), root / "shards", samples_per_shard=NUMBER // 3)
    # As Hugging Face `datasets` stores an image column.
    structs = [{"bytes": image, "path": None} for image in images]
    stored = pa.table({"image": structs, "caption": captions})
    for part in range(2):
        name = f"train-0000{part}-of-00002.parquet"
        pq.write_table(stored.slice(48 * part, 48), root / "export" / name)
    datasets.Dataset(stored).save_to_disk(root / "saved")
    return root


@pytest.fixture
def here(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in the folder of the data, with indexes and runs apart."""
    monkeypatch.chdir(data)
    monkeypatch.setenv("PROTOCLIP_CACHE", str(data / "cache"))
    return tmp_path


@pytest.mark.parametrize("number", range(len(list(blocks("toml")))))
def test_settings_train(number: int, here: Path) -> None:
    """A run with the block as its recipe ends well, and has skipped nothing."""
    recipe = Path("recipe.toml")  # beside the data, which its paths are relative to
    recipe.write_text(list(blocks("toml"))[number], encoding="utf-8")
    options = [*TINY.split(), "--run.out", str(here / "run")]
    main(["train", "--config", str(recipe), *options])
    results = json.loads((here / "run" / "results.json").read_text(encoding="utf-8"))
    assert results["samples_seen"] == 32
    assert results["samples_skipped"] == 0


def test_commands_run(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One after the other, as a reader would; each finds all the pairs."""
    for command in commands():
        program, *arguments = shlex.split(command)
        assert program == "protoclip"
        main(arguments)
        written = capfd.readouterr().out
        # In a sentence, in a table, or in JSON.
        said = rf'^{NUMBER} pairs |^pairs +{NUMBER}$|"pairs": {NUMBER},'
        assert re.search(said, written, re.MULTILINE), command
    assert len(list(Path("packed").glob("*.tar"))) == 1


def test_names_in_the_settings_table_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """Every `data.*` and `episodes.*` the page names is a setting."""
    with pytest.raises(SystemExit):
        main(["train", "--help", "all"])
    printed = capsys.readouterr().out
    named = re.findall(r"`((?:data|episodes|teacher)\.\w+)", PAGE.read_text(encoding="utf-8"))
    assert len(set(named)) > 10
    for name in set(named):
        assert re.search(rf"--{re.escape(name)}\b", printed), name
