"""Whatever a file holds, a command succeeds, or says in one line what is wrong and ends with 2.

Each call is checked for more: see `audited.call`. The examples here are few and always the same;
`HYPOTHESIS_PROFILE=long pytest tests/hostile/test_properties.py` looks for new ones.
"""

import json
import os
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import near_valid
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w
from audited import Ended, call
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from protoclip.cli import COMMANDS
from protoclip.cli.spec import options
from protoclip.training import run
from protoclip.training.folder import to_toml
from protoclip.training.plan import make_plan
from testing import tiny_config, tiny_pairs

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"


def examples(number: int, *, long: int = 3000) -> Callable[[Any], Any]:
    """How many examples a property has, in the suite and in a long search."""
    return settings(
        max_examples=long if LONG else number,
        derandomize=not LONG,
        database=None,
        deadline=None,  # `call` has its own
        phases=[Phase.explicit, Phase.generate, Phase.shrink],  # explaining traces every line
        print_blob=False,
        suppress_health_check=[*HealthCheck],
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `0.png` to `7.png`."""
    folder = tmp_path_factory.mktemp("images")
    for number, image in enumerate(near_valid.IMAGES):
        (folder / f"{number}.png").write_bytes(image)
    return folder


@contextmanager
def place(beside: Path | None = None) -> Iterator[tuple[Path, Path]]:
    """A folder of data, with copies of files, in which a command runs; and one for its output."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="property") as made:
        data, out = Path(made) / "data", Path(made) / "out"
        data.mkdir()
        out.mkdir()
        for file in beside.iterdir() if beside else ():
            (data / file.name).hardlink_to(file)
        os.chdir(data)
        try:
            yield data, out
        finally:
            os.chdir(before)


INSPECT = ("data", "inspect", "{}", "--data.workers", "1")
SOURCES = (
    INSPECT,
    (*INSPECT, "--json", "--every"),
    ("data", "index", "{}"),
    ("data", "pack", "{}", "{out}/packed"),
)
STREAMED = (*INSPECT, "--data.read", "streaming")


def run_on(words: tuple[str, ...], source: Path | str, out: Path, data: Path) -> Ended:
    filled = [word.replace("{out}", str(out)).replace("{}", str(source)) for word in words]
    return call(filled, writes=[out], keeps=data)


@given(table=near_valid.table(), words=st.sampled_from(SOURCES))
@examples(25)
def test_any_table(images, table, words):
    suffix, content = table
    with place(images) as (data, out):
        (data / f"pairs{suffix}").write_bytes(content)
        run_on(words, data / f"pairs{suffix}", out, data)


@given(content=near_valid.tar(), words=st.sampled_from([*SOURCES, STREAMED, STREAMED]))
@examples(25)
def test_any_tar(content, words):
    with place() as (data, out):
        (data / "a.tar").write_bytes(content)
        run_on(words, data / "a.tar", out, data)


@given(
    texts=st.lists(near_valid.text, min_size=1, max_size=4),
    words=st.sampled_from(SOURCES),
    suffix=st.sampled_from([".jsonl", ".parquet", ".txt"]),
)
@examples(25)
def test_any_caption(images, texts, words, suffix):
    """In a table, or in a file beside its image."""
    with place(images) as (data, out):
        rows = [f"{number}.png" for number in range(len(texts))]
        if suffix == ".parquet":
            pq.write_table(pa.table({"image": rows, "caption": texts}), data / "pairs.parquet")
        elif suffix == ".jsonl":
            lines = [
                json.dumps({"image": r, "caption": t}) for r, t in zip(rows, texts, strict=True)
            ]
            (data / "pairs.jsonl").write_text("\n".join(lines))
        else:
            for number, text in enumerate(texts):
                (data / f"{number}.txt").write_bytes(text.encode())
        source = data if suffix == ".txt" else data / f"pairs{suffix}"
        ended = run_on(words, source, out, data)
        assert ended.code == 0 or not any(text.strip() for text in texts) or "\0" in "".join(texts)


@given(content=near_valid.image(), words=st.sampled_from([*SOURCES, *SOURCES[-1:]]))
@examples(25)
def test_any_image(content, words):
    with place() as (data, out):
        (data / "0.png").write_bytes(content)
        (data / "0.txt").write_text("a caption")
        run_on(words, data, out, data)


@pytest.fixture(scope="module", autouse=True)
def _imported(images: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Imports what commands import lazily."""
    folder = tmp_path_factory.mktemp("packed")
    (images / "good.csv").write_text("image,caption\n0.png,one\n1.png,two\n")
    call(["data", "pack", f"{images}/good.csv", f"{folder}/out"], writes=[folder])
    (images / "good.csv").unlink()


# Recipes

BASE: dict[str, Any] = tomllib.loads(to_toml(make_plan(tiny_config(out="x")).config))
# What starts processes, or says where to write; the command line sets these.
for section, setting in (("data", "workers"), ("run", "out")):
    BASE[section].pop(setting, None)
KNOWN = [name for name, _ in options(COMMANDS["train"]) if name.count(".") == 1]
FIXED = {"data.workers", "run.out", "run.loggers", "data.train"}


@st.composite
def recipe(draw: st.DrawFn) -> bytes:
    """A recipe for a tiny run with a few changes: of settings, of the tree, or of bytes."""
    tree = json.loads(json.dumps(BASE))
    for _ in range(draw(st.integers(0, 3))):
        section, name = draw(st.sampled_from([k for k in KNOWN if k not in FIXED])).split(".")
        tree[section][name] = draw(near_valid.toml_values)
    if draw(st.booleans()):
        tree = draw(near_valid.edited(tree, near_valid.toml_values, most=2))
    if not isinstance(tree, dict):
        tree = {"run": tree}
    try:
        written = tomli_w.dumps(tree).encode()
    except (TypeError, ValueError):
        written = b""
    return draw(near_valid.mutated(written)) if draw(st.integers(0, 4)) == 0 else written


@contextmanager
def stopping() -> Iterator[None]:
    """Let every run stop after its next step."""
    with pytest.MonkeyPatch.context() as patch:
        whole = run.Run.save_if_due

        def stop(self: run.Run) -> bool:
            self.stopped_by = "SIGTERM"
            return whole(self)

        patch.setattr(run.Run, "save_if_due", stop)
        yield


@given(content=recipe(), command=st.sampled_from(["train", "train", "train", "finetune"]))
@examples(15)
def test_any_recipe(images, content, command):
    """It trains a step, or is refused."""
    with place(images) as (data, out), stopping():
        pq.write_table(tiny_pairs(80), data / "pairs.parquet")
        (data / "recipe.toml").write_bytes(content)
        words = [command, "--config", str(data / "recipe.toml"), "--run.out", str(out / "run")]
        words += ["--data.train", str(data / "pairs.parquet"), "--data.workers", "0"]
        words += ["--run.loggers", "tensorboard"]
        call(words, writes=[out], keeps=data)


# Run folders

COMMANDS_ON_RUNS = (
    ("compare", "{}", "{good}"),
    ("report", "{}", "--out", "{out}/report.html", "--samples", "16"),
    ("evaluate", "{}", "--data", "{data}/pairs.parquet", "--workers", "0"),
    ("analyze", "{}", "--samples", "16"),
    ("embed", "{}", "--data", "{data}/pairs.parquet", "--out", "{out}/vectors.parquet"),
    ("export", "{}", "{out}/exported", "--formats", "open_clip"),
    ("train", "--config", "{data}/recipe.toml", "--run.out", "{}", "--resume", "auto"),
    ("train", "--config", "{data}/recipe.toml", "--run.out", "{out}/n", "--model.start", "{}"),
    ("finetune", "{}", "--config", "{data}/recipe.toml", "--run.out", "{out}/tuned"),
    ("explore", "{}", "--static", "{out}/pages", "--workers", "0", "--map", "pca"),
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a recipe, and the folders of a finished and of an unfinished run of it."""
    home = tmp_path_factory.mktemp("home")
    pq.write_table(tiny_pairs(80), home / "pairs.parquet")
    tree = json.loads(json.dumps(BASE))
    tree["data"] |= {"train": str(home / "pairs.parquet"), "validation": 0.2}
    tree["episodes"] |= {"size": 32, "count": 3, "batch_size": 16, "locked_image": 0}
    tree["run"] |= {"save_steps": 1}
    (home / "recipe.toml").write_text(tomli_w.dumps(tree))
    words = ["train", "--config", str(home / "recipe.toml"), "--run.out"]
    with stopping():
        call([*words, str(home / "stopped")], writes=[home])
    call([*words, str(home / "finished")], writes=[home])
    call(["analyze", str(home / "finished"), "--samples", "16"], writes=[home])
    points = [{"alpha": a, "scores": {"x": 0.5}, "mean": 0.5} for a in (0.0, 0.5, 1.0)]
    (home / "finished" / "wise_ft.json").write_text(json.dumps({"alpha": 0.5, "points": points}))
    bad = {"sample_id": "a", "where": "b", "reason": "c"}
    (home / "finished" / "skipped.jsonl").write_text(json.dumps(bad) + "\n")
    return home


@st.composite
def changed_file(draw: st.DrawFn, path: Path) -> bytes | None:
    """Other content for a file of a run folder; None for a folder in its place."""
    whole = path.read_bytes()
    how = draw(st.sampled_from(["edit", "edit", "edit", "mutate", "none", "folder"]))
    if how == "folder":
        return None
    if how == "edit" and path.suffix == ".json":
        return json.dumps(draw(near_valid.edited(json.loads(whole)))).encode()
    if how == "edit" and path.suffix == ".jsonl":
        records = [json.loads(line) for line in whole.splitlines()]
        found = draw(near_valid.edited(records))
        return "\n".join(map(json.dumps, found if isinstance(found, list) else [found])).encode()
    if how == "edit" and path.suffix == ".toml":
        tree = draw(near_valid.edited(tomllib.loads(whole.decode()), near_valid.toml_values))
        return tomli_w.dumps(tree if isinstance(tree, dict) else {"run": tree}).encode()
    return b"" if how == "none" else draw(near_valid.mutated(whole))


def files_of(folder: Path) -> list[str]:
    """The files of a run folder by name, of checkpoints those of the newest."""
    newest = max((folder / "checkpoints").iterdir())
    found = [*newest.iterdir(), *folder.glob("*.*"), *(folder / "results").glob("*")]
    # What the report alone reads is trusted to be as it was written.
    names = {str(path.relative_to(folder)) for path in found if path.is_file()}
    return sorted(names - {"analysis.json", "wise_ft.json"})


@given(drawn=st.data())
@examples(12, long=1500)
def test_any_run_folder(home, drawn):
    """One file changed."""
    state = drawn.draw(st.sampled_from(["finished", "stopped"]))
    name = drawn.draw(st.sampled_from(files_of(home / state)))
    content = drawn.draw(changed_file(home / state / name))
    words = drawn.draw(st.sampled_from(COMMANDS_ON_RUNS))
    with place() as (_, out), stopping():
        folder = shutil.copytree(home / state, out / state)
        (folder / name).unlink()
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)
        marks = {"{good}": home / "finished", "{data}": home, "{out}": out, "{}": folder}
        filled = [*words]
        for mark, path in marks.items():
            filled = [word.replace(mark, str(path)) for word in filled]
        call(filled, writes=[out], keeps=home)


@given(table=near_valid.table(), classes=st.booleans())
@examples(10)
def test_any_table_to_evaluate_on(home, images, table, classes):
    suffix, content = table
    with place(images) as (data, out):
        (data / f"pairs{suffix}").write_bytes(content)
        words = ("evaluate", str(home / "finished"), "--data", "{}", "--workers", "0")
        words += ("--class_column", "label") if classes else ()
        with_root = (*words, "--out", "{out}", "--cache", "false")
        call_on = [w.replace("{out}", str(out)) for w in with_root]
        source = str(data / f"pairs{suffix}")
        writes = [out, home / "finished" / "results"]
        call([w.replace("{}", source) for w in call_on], writes=writes, keeps=data)


# The command line

NO_TRAINING = [name for name in COMMANDS if name not in ("demo", "explore")]


@given(drawn=st.data())
@examples(25)
def test_any_words(drawn):
    """Options with odd values, on what does not exist."""
    name = drawn.draw(st.sampled_from(NO_TRAINING))
    names = [f"--{option}" for option, _ in options(COMMANDS[name])]
    words = drawn.draw(st.lists(st.sampled_from(names) | near_valid.text, max_size=6))
    with place() as (data, out):
        if name in ("train", "finetune", "embed-teacher"):
            words += ["--data.train", "none.tsv"]
        call([*name.split(), *words], writes=[out], keeps=data)
