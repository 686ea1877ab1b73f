"""Messages: setting, file and way out; the path of a full disk; rows that are left out."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from audited import call, full
from near_valid import IMAGES

import protoclip
from protoclip.config import Config, DataConfig
from protoclip.data.tables import open_table
from protoclip.files import to_json
from protoclip.training import checkpoint

# Setting, a wrong value, and what is said: what is wrong, and what would be right.
WRONG: dict[str, tuple[Any, str]] = {
    "run.seed": (-1, "-1 is too small; at least 0"),
    "run.sede": (1, "no such setting; did you mean run.seed?"),
    "run.device": ("quantum", "run.device: "),
    "data.max_bad_share": (1.5, "1.5 is too large; at most 1"),
    "data.read": ("often", "'often' is not one of auto, "),
    "model.embed_dim": ("many", "'many' is no whole number"),
    "model.image": (3, "3 is no section; give its settings by name"),
    "loss.info_nce": (float("nan"), "nan is not finite"),
    "loss.prototypical": (True, "true is no number"),
    "optim.learning_rate": (0.0, "0.0 needs to be above 0"),
    "optim.betas": ([0.9], "[0.9] is not 2 values"),
    "episodes.count": (2.5, "2.5 is no whole number"),
    "prototypes.target_temperature": (0.0, "for hard targets set hard_targets = true"),
}


@pytest.mark.parametrize("setting", WRONG)
def test_a_wrong_setting_is_named_alike_from_everywhere(setting, tmp_path, monkeypatch):
    """In Python, on the command line, and in a recipe, whose name comes first."""
    monkeypatch.chdir(tmp_path)
    value, message = WRONG[setting]
    section, name = setting.split(".")
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        protoclip.train(Config.from_dict({section: {name: value}}))
    said = str(raised.value)
    assert said.startswith(setting)
    typed = to_json(value) if isinstance(value, list) else str(value)
    on_the_line = call(["train", f"--{setting}", typed], keeps=tmp_path).error
    if setting != "model.image":  # a section is no option
        assert on_the_line == said
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(tomli_w.dumps({section: {name: value}}))
    in_a_recipe = call(["train", "--config", str(recipe)], keeps=tmp_path).error
    own = said if setting == "run.device" else f"{recipe}: {said}"  # known only to this machine
    assert in_a_recipe == own


# Full disks


@pytest.fixture(scope="module")
def home(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs and a run of them."""
    home = shutil.copytree(trained, tmp_path_factory.mktemp("messages") / "home")
    for number, image in enumerate(IMAGES):
        (home / f"{number}.png").write_bytes(image)
    rows = [f"{number % 8}.png,caption {number}" for number in range(500)]
    (home / "pairs.csv").write_text("\n".join(["image,caption", *rows]))
    for name in ("pairs.parquet", "pairs.csv"):  # so that not an index is what finds no room
        call(["data", "index", str(home / name)])
    return home


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("data inspect {}/pairs.csv --data.workers 1", "{out}/c/index"),
        ("data pack {}/pairs.parquet {out}/packed", "{out}/packed/"),
        ("report {}/run --samples 16 --out {out}/r.html", "{out}/r.html"),
        ("explore {}/run --static {out}/pages --workers 0 --cache false", "{out}/pages"),
        ("explore {}/run --atlas {out}/t.parquet --workers 0 --cache false", "{out}/t.parquet"),
        ("export {}/run {out}/exported --formats open_clip", "{out}"),
        ("embed {}/run --data {}/pairs.csv --out {out}/v.parquet", "{out}/.v.parquet.parts/parts/"),
        ("embed-teacher --teacher {}/run --data.train {}/pairs.csv --out {out}/f", "{out}/f"),
        ("train --config {}/recipe.toml --run.out {out}/run", "{out}/run/checkpoints/step-"),
    ],
)
def test_a_full_disk_names_the_path(words, named, home, tmp_path, monkeypatch):
    if "/c/" in named:
        monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "c"))
    monkeypatch.setattr(checkpoint, "LAST_RETRIES", (0.0,))
    filled = [w.replace("{}", str(home)).replace("{out}", str(tmp_path)) for w in words.split()]
    with full(4096):
        ended = call(filled, writes=[tmp_path], keeps=home)
    assert ended.code == 2
    assert named.replace("{out}", str(tmp_path)) in ended.error, ended.error
    assert "File too large" in ended.error, ended.error


# Rows that are left out

GOOD = [f"{number % 8}.png\tcaption {number}\tid{number}" for number in range(20)]
# A row, of how many lines, and the reason for which it is left out.
BAD: list[tuple[str, str]] = [
    ("0.png\tone field too few", "lines with another number of fields than the header"),
    ("0.png\ta\tb\tone too many", "lines with another number of fields than the header"),
    ("0.png\ta zero\0byte\tx", "lines with a zero byte"),
    ("0.png\tnot UTF-8 \udcff\ty", "lines that are not UTF-8"),
    (f"0.png\t{'long' * 900_000}\tz", "lines of more than a megabyte"),
    ('0.png\t"an open quote\tw', "lines with an open quote"),
]


@pytest.mark.parametrize("suffix", ["tsv", "jsonl"])
def test_rows_left_out_are_counted_with_their_reasons(suffix, tmp_path):
    """Rows that are used and rows that are left out are all rows of the file."""
    if suffix == "tsv":
        rows = [*GOOD[:10], *(row for row, _ in BAD), *GOOD[10:]]
        lines, reasons = ["image\tcaption\tkey", *rows], [reason for _, reason in BAD]
    else:
        records = [dict(zip(("image", "caption", "key"), r.split("\t"), strict=True)) for r in GOOD]
        bad = ["{", "3", '{"image": "0.png", "caption": "\\ud800"}', "{" + "x" * (1 << 21) + "}"]
        bad.append("{}")
        lines = rows = [*map(to_json, records[:10]), *bad, *map(to_json, records[10:])]
        reasons = ["lines that are no JSON object", "lines that are not UTF-8"]
        reasons += ["lines of more than a megabyte", "lines with an empty object"]
    path = tmp_path / f"pairs.{suffix}"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape") + b"\n")
    pairs = open_table(DataConfig(train=str(path)))
    notes = [note for note in pairs.notes if "left out" in note]
    counts = [int(re.search(r"left out (\d+) ", note)[1]) for note in notes]  # type: ignore[index]
    assert len(pairs) + sum(counts) == len(rows), notes
    for reason in reasons:
        assert any(reason in note for note in notes), (reason, notes)
    assert all(note.startswith(f"{path}: left out ") for note in notes)
    assert len(pairs) == len(GOOD)
    found = {m[1] for note in notes for m in [re.search(r"\(line ([\d, ]+):", note)] if m}
    numbers = sorted(int(n) for each in found for n in each.split(", "))
    first = lines.index(rows[10]) + 1
    assert numbers == [*range(first, first + len(rows) - len(GOOD))]
