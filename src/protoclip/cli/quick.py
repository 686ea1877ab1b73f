"""`protoclip demo --quick`: a small model in about a minute, its report, and a map of pairs.

The model learns emoji by six artists, and is judged and shown on the drawings of a seventh.
"""

import os
import sys
import time
import webbrowser
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protoclip.cli import explore
from protoclip.cli.demo_runs import is_finished, write_report
from protoclip.cli.train import exit_if_stopped
from protoclip.config import Config
from protoclip.files import replacing, require_ours, require_regular
from protoclip.progress import duration
from protoclip.terminal import quote_word, visible

if TYPE_CHECKING:
    import pyarrow as pa

ARTIST = "twemoji"  # whose drawings are held out
# Of Unicode's groups. People, hands and symbols are left out: many look almost alike.
GROUPS = (
    *("smileys-emotion", "animals-nature", "food-drink", "travel-places", "activities", "objects"),
    "flags",
)
EPISODES = 8  # four passes
EXAMPLES = 300  # pairs in the report
FIRST = 10
TITLE = "<title>Report of runs: quick</title>"  # of its page, and of none of other runs


def configuration(out: Path, *, seed: int) -> Config:
    """The run: ProtoCLIP with the emoji's teacher, as small as shows something.

    Colour tells many emoji apart, so nothing but crops changes the images.
    """
    from protoclip.data.emoji import emoji_teacher_path

    seen, unseen = map(str, write_pairs(out))
    return Config.from_dict(
        {
            "run": {"name": "quick", "seed": seed, "out": str(out / "model"), "save_minutes": 0.0},
            "data": {"train": seen, "validation": unseen, "augmentation": "clip"},
            "model": {
                "embed_dim": 128,
                "image": {"name": "test_byobnet", "size": 32},
                "text": {"layers": 1, "context_length": 16},
                "heads": {"hidden_dim": 256},
            },
            "teacher": {"features": str(emoji_teacher_path()), "tower": "text"},
            "loss": {"prototypical": 0.0, "positives": "shared"},
            "episodes": {"size": 2048, "count": EPISODES, "batch_size": 128, "locked_image": 0},
        }
    )


def write_pairs(out: Path) -> list[Path]:
    """Write the pairs to learn and those to judge by, as tables that any command reads.

    Raises:
        ValueError: A table of this name holds something else.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from protoclip.data.emoji import emoji_table

    table = emoji_table("train")
    table = table.filter(pc.is_in(table["group"], pa.array(GROUPS)))
    is_held_out = pc.equal(table["style"], ARTIST)
    seen, unseen = table.filter(pc.invert(is_held_out)), table.filter(is_held_out)
    unseen = unseen.filter(pc.is_in(unseen["concept"], seen["concept"].unique()))
    paths = []
    for name, pairs in (("seen", seen), ("unseen", unseen)):
        path = out / f"{name}.parquet"
        paths.append(path)
        # With the kind in the caption ("banana, food fruit"), groups on the map have clear names.
        kinds = pc.replace_substring(pairs["subgroup"], "-", " ")
        captions = pc.binary_join_element_wise(pairs["label"], kinds, ", ")
        pairs = pairs.select(["sample_id", "image", "group"]).append_column("caption", captions)
        if path.exists():  # of an earlier call
            require_equal(path, pairs)
            continue
        out.mkdir(parents=True, exist_ok=True)
        with replacing(path) as scratch:
            pq.write_table(pairs, scratch)
    return paths


def require_equal(path: Path, table: "pa.Table") -> None:
    """Refuse a Parquet file that holds another table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        require_regular(path)
        is_equal = pq.read_table(path).equals(table)
    except (OSError, ValueError, pa.ArrowException):
        is_equal = False
    if not is_equal:
        raise ValueError(
            f"{path}: exists, and holds other pairs than this demonstration's; choose another "
            "folder with --out"
        )


def quick(out: str | Path = "runs/quick", *, seed: int = 0) -> dict[str, Any]:
    """Train, judge and show a small model; return its results, as `run.train` does.

    What is finished is kept, and an interrupted run continues.

    Raises:
        ValueError: The folder holds something else than this demonstration.
    """
    import pyarrow.parquet as pq

    from protoclip.training import run

    started, out = time.monotonic(), Path(out)
    report, explorer, unseen = out / "report.html", out / "explorer", out / "unseen.parquet"
    require_ours(report, TITLE, "with --out")
    config = configuration(out, seed=seed)
    if not (kept := is_finished(config)) and explorer.exists():
        raise ValueError(f"{explorer}: is of another model; remove it, or choose another --out")
    results = run.train(config, resume="auto")
    exit_if_stopped(results)
    written = (kept and report.exists()) or write_report([out / "model"], report, samples=EXAMPLES)
    looks = all(find_spec(name) for name in explore.NEEDED)
    if looks and not explorer.exists():
        explore.Explore(
            models=[str(out / "model")],
            data=str(unseen),
            class_column="group",
            map="pca",  # umap compiles for as long as all of this takes
            static=str(explorer),
        )()
    number = pq.read_metadata(unseen).num_rows
    known = "of emoji that it knows from other artists"
    print(f"Of {number} drawings by an artist new to the model, {known}, percent:")
    for way, what in (("image_to_text", "caption"), ("text_to_image", "image")):
        recall = 100 * results["metrics"][f"eval/validation/retrieval/{way}@{FIRST}"]
        print(f"  the right {what:<7} is among the first {FIRST}: {recall:.1f}")
    print(f"  by chance it is: {100 * FIRST / number:.1f}")
    print(f"Done in {duration(time.monotonic() - started)}. Where to look, in a browser:")
    if written:
        print(f"  {visible(str(report))}   how it learned, and what it finds")
    if not looks:
        print("  pip install 'protoclip[explore]', and the same command makes a map of them")
        return results
    page, model = explorer / "index.html", quote_word(str(out / "model"))
    print(f"  {visible(str(page))}   a map of these drawings")
    data = quote_word(str(unseen))
    print(f"  protoclip explore {model} --data {data}   a clearer map, and search")
    # Without a display a browser in text mode would take the terminal.
    display = (
        sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
    )
    if display and sys.stdout.isatty():
        webbrowser.open(page.resolve().as_uri())
    return results
