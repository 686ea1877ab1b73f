"""No character that a terminal obeys comes out of data, paths or names; markup in them is text."""

import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from audited import OBEYED, Ended, call

from interrupting import with_changes
from protoclip.files import to_json
from protoclip.terminal import visible
from protoclip.training.folder import to_toml
from testing import tiny_config, tiny_pairs

# A title for the window, an end of line, a mark that turns text, a C1 control; markup of rich,
# HTML and matplotlib.
ODD = "a\x1b]0;title\x07\u2028b\u202ec\x9b2J [red]d[/red] [/] <b>e</b> $\\frac{"
SHOWN = "a\\x1b]0;title\\x07\\u2028b\\u202ec\\x9b2J [red]d[/red] [/] <b>e</b> $\\frac{"
FOLDER = "run\x1b[31m\u2028\u202e [b]"


def test_visible_escapes_what_terminals_obey_and_no_more():
    bidi = [0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
    obeyed = {*range(0x20), *range(0x7F, 0xA0), *bidi, *range(0xD800, 0xE000)}
    # Of what lies beyond the symbols, some.
    codes = [*range(0x3000), *range(0x3000, 0x110000, 101), *range(0xD800, 0xE000)]
    assert {code for code in codes if visible(chr(code)) != chr(code)} == obeyed
    assert visible("a\x1b\n\u2028\ud800") == r"a\x1b\n\u2028\ud800"
    assert visible(visible(ODD)) == visible(ODD) == SHOWN


def test_json_holds_the_same_without_raw_characters():
    text = to_json({ODD: [ODD, "\ud800", "é\U0001f680"]}, indent=2)
    assert not OBEYED.search(text)
    assert "é\U0001f680" in text
    assert json.loads(text) == {ODD: [ODD, "\ud800", "é\U0001f680"]}


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--config", f"{ODD}.toml"],
        ["train", "--data.train", "a\nb.tsv"],
        ["train", f"--{ODD}", "1"],
        ["train", "--run.seed", ODD],
        ["compare", ODD],
        ["data", "inspect", ODD],
        [ODD],
    ],
)
def test_a_mistake_with_odd_characters_is_one_line(words, tmp_path, monkeypatch):
    """`call` checks that; the line shows what was typed."""
    monkeypatch.chdir(tmp_path)
    ended = call(words, keeps=tmp_path)
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    if "--run.seed" not in words and "b" not in words:
        assert "title" in ended.error or "a\\nb.tsv" in ended.error


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on data whose every text is odd, in a folder whose name is."""
    home = tmp_path_factory.mktemp("odd")
    table = tiny_pairs(60)
    captions = [f"{text} {row} {ODD}" for row, text in enumerate(table["caption"].to_pylist())]
    classes = [f"{text.split()[1]} {ODD}" for text in table["caption"].to_pylist()]
    ids = [f"{row} {ODD}" for row in range(60)]
    images = [
        b"no image %d" % row if row % 6 == 0 else i
        for row, i in enumerate(table["image"].to_pylist())
    ]
    columns = {"image": images, "caption": captions, "sample_id": ids, "class": classes}
    pq.write_table(pa.table(columns), home / f"{FOLDER}.parquet")
    config = tiny_config(str(home / f"{FOLDER}.parquet"), out=str(home / FOLDER))
    changes = {
        "run": {"name": ODD},
        "data": {"validation": 0.4, "class_column": "class", "max_bad_share": 0.5},
        "episodes": {"size": 32, "count": 3, "batch_size": 16},
    }
    recipe = to_toml(with_changes(config, changes))
    (home / "recipe.toml").write_text(recipe, encoding="utf-8")
    ended = call(["train", "--config", str(home / "recipe.toml")], writes=[home])
    assert "eval/" in ended.out
    return home


def on(home: Path, *words: str) -> Ended:
    return call([word.replace("{}", str(home / FOLDER)) for word in words], writes=[home])


def test_log_lines_hold_no_raw_character(odd):
    """Skipped samples keep their exact ids."""
    skipped = (odd / FOLDER / "skipped.jsonl").read_text(encoding="utf-8")
    ids = [json.loads(line)["sample_id"] for line in skipped.strip().split("\n")]
    assert all(name.endswith(f" {ODD}") for name in ids)
    for name in ("skipped.jsonl", "metrics.jsonl", "results.json"):
        assert not OBEYED.search((odd / FOLDER / name).read_text(encoding="utf-8")), name


@pytest.mark.parametrize(
    "words",
    [
        ("compare", "{}", "{}2"),
        ("evaluate", "{}", "--data", "{}.parquet", "--class_column", "class", "--workers", "0"),
        ("analyze", "{}", "{}2", "--samples", "16"),
        ("data", "inspect", "{}.parquet", "--data.workers", "1"),
        ("data", "inspect", "{}.parquet", "--data.workers", "1", "--json"),
        ("data", "pack", "{}.parquet", "{}-packed"),
        ("export", "{}", "{}-exported", "--formats", "open_clip"),
        ("train", "--config", "{}/config.toml", "--run.out", "{}", "--resume", "auto"),
    ],
)
def test_commands_show_odd_names_as_text(odd, words):
    """`call` finds raw characters; markup that vanished is missing here."""
    if (odd / FOLDER).exists() and not (odd / f"{FOLDER}2").exists():
        shutil.copytree(odd / FOLDER, odd / f"{FOLDER}2")
    ended = on(odd, *words)
    assert ended.code == 0
    said = " ".join((ended.out + ended.err).split())
    if words[0] in ("compare", "analyze"):
        assert "[red]d[/red]" in said
    if words[0] != "compare":
        assert "[b]" in said or "[red]" in said


def test_report_and_pages_hold_no_raw_character(odd):
    """The exact ids that pages hold for the selection are no text; nobody sees them."""
    on(odd, "report", "{}", "--out", "{}.html", "--samples", "40")
    on(odd, "explore", "{}", "--static", "{}-pages", "--workers", "0", "--map", "pca")
    pages = [odd / f"{FOLDER}.html", *(odd / f"{FOLDER}-pages").rglob("*.html")]
    assert len(pages) > 5
    for page in pages:
        text = re.sub(r'data-id="[^"<>]*"', "", page.read_text(encoding="utf-8"))
        assert not OBEYED.search(text), page
        assert "<b>e</b>" not in text, page
    assert any("&lt;b&gt;e&lt;/b&gt;" in page.read_text(encoding="utf-8") for page in pages)
