"""`protoclip demo`: CLIP and ProtoCLIP, also with a teacher, side by side; and `--quick`.

The quick one trains a small model on emoji by six artists in about a minute. It is evaluated and
shown on the drawings of a seventh.
"""

import shlex
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from protoclip.cli.explore import Explore
from protoclip.cli.spec import Answers, require_libraries
from protoclip.cli.train import exit_if_stopped
from protoclip.config import Config, EpisodeConfig, LossConfig, RunConfig, Seed, TeacherConfig
from protoclip.files import replacing, require_ours, to_json, write_atomically
from protoclip.rules import require_place
from protoclip.terminal import say, visible

# Nine passes take eight minutes on two cores, and are enough to tell the arms apart.
EPISODES = 16
ARTIST = "twemoji"  # whose drawings the quick demonstration holds out
# Groups in Unicode. People, hands and symbols are left out: many look almost alike.
GROUPS = (
    *("smileys-emotion", "animals-nature", "food-drink", "travel-places", "activities", "objects"),
    "flags",
)
QUICK_EPISODES = 8  # four passes
FIRST = 10


@dataclass(frozen=True, kw_only=True)
class Demo(Answers):
    """Train CLIP, ProtoCLIP, and ProtoCLIP with a teacher."""

    out: str | None = None  # Folder of the runs; else runs/demo, or runs/quick.
    seed: Seed = 0  # Seed of all runs.
    quick: bool = False  # One small model, in about a minute.

    def __call__(self) -> None:
        out = self.out or ("runs/quick" if self.quick else "runs/demo")
        require_place("--out", out, is_folder=True)
        import torch

        from protoclip.progress import duration

        torch.set_flush_denormal(True)
        started = time.monotonic()
        with redirect_stdout(sys.stderr if self.json else sys.stdout):
            places = (quick if self.quick else demo)(Path(out), seed=self.seed)
        seconds = time.monotonic() - started
        lines = [f"  {visible(place)}   {what}" for place, what in places.items()]
        text = "\n".join([f"Done in {duration(seconds)}. Where to look:", *lines])
        self.answer({"out": out, "seconds": seconds, "places": places}, lambda: print(text))


def demo(out: Path, *, seed: int = 0) -> dict[str, str]:
    """Train and evaluate the three arms; return what to look at.

    Finished arms of an earlier call are kept; an interrupted one continues.
    """
    from protoclip.evaluation.paired import read_results
    from protoclip.results.compare import compare_runs
    from protoclip.results.table import print_table, table_of_runs
    from protoclip.training.run import train

    require_ours(out / "results.json", '"seeds"', "with --out")
    folders = []
    for config in arms(seed=seed, out=str(out)).values():
        results = train(config, resume="auto")
        exit_if_stopped(results)
        folders.append(Path(results["folder"]))
    entries = compare_runs([read_results(folder) for folder in folders])
    write_atomically(out / "results.json", to_json(entries, indent=2) + "\n")
    print_table(table_of_runs(entries))
    print("One seed: another one moves a result by a point or two; docs/LOG.md has more seeds.")
    return {
        **write_report(folders, out / "report.html"),
        f"{out}/results.json": "this table",
        f"{out}/protoclip-teacher/": "configuration, metrics and checkpoint of one run",
        f"tensorboard --logdir {out}": "curves",
    }


def arms(*, seed: int = 0, out: str | None = None) -> dict[str, Config]:
    """The three runs, with the same seed, samples, augmentation, optimizer and schedule.

    `recipes/emoji_*.toml` are the same runs with 20 passes.
    """
    from protoclip.training.folder import slugify

    losses = {
        "CLIP": (LossConfig(prototypical=0.0), TeacherConfig()),
        "ProtoCLIP": (LossConfig(), TeacherConfig()),
        "ProtoCLIP + teacher": (LossConfig(), TeacherConfig(features="emoji")),
    }
    return {
        name: Config(
            run=RunConfig(name=name, seed=seed, out=f"{out}/{slugify(name)}" if out else None),
            episodes=EpisodeConfig(count=EPISODES),
            loss=loss,
            teacher=teacher,
        )
        for name, (loss, teacher) in losses.items()
    }


def quick(out: Path, *, seed: int = 0) -> dict[str, str]:
    """Train, evaluate and show a small model; return what to look at.

    What is finished is kept, and an interrupted run continues.
    """
    import pyarrow.parquet as pq

    from protoclip.training.run import train

    seen, unseen = write_pairs(out)
    results = train(quick_config(out, seen, unseen, seed=seed), resume="auto")
    exit_if_stopped(results)
    places = write_report([out / "model"], out / "report.html")
    if is_installed("explore"):
        pages, model, data = out / "explorer", str(out / "model"), str(unseen)
        if not pages.exists():
            Explore(
                models=[model],
                data=data,
                class_column="group",
                map="pca",  # umap compiles for as long as all of this takes
                static=str(pages),
            )()
        places[f"{pages}/index.html"] = "a map of these drawings"
        command = f"protoclip explore {shlex.quote(model)} --data {shlex.quote(data)}"
        places[command] = "a clearer map, and search"
    number = pq.read_metadata(unseen).num_rows
    same_emoji = "of emoji that it knows from other artists"
    print(f"Of {number} drawings by an artist new to the model, {same_emoji}, percent:")
    for way, what in (("image_to_text", "caption"), ("text_to_image", "image")):
        recall = 100 * results["metrics"][f"eval/validation/retrieval/{way}@{FIRST}"]
        print(f"  the right {what:<7} is among the first {FIRST}: {recall:.1f}")
    print(f"  by chance it is: {100 * FIRST / number:.1f}")
    return {**places, f"{out}/model/": "configuration, metrics and checkpoint of the run"}


def quick_config(out: Path, seen: Path, unseen: Path, *, seed: int) -> Config:
    """The run: ProtoCLIP with the emoji's teacher, as small as shows something.

    Colour tells many emoji apart, so nothing but crops changes the images.
    """
    from protoclip.data.emoji import emoji_teacher_path

    return Config.from_dict(
        {
            "run": {"name": "quick", "seed": seed, "out": str(out / "model"), "save_minutes": 0.0},
            "data": {"train": str(seen), "validation": str(unseen), "augmentation": "clip"},
            "model": {
                "embed_dim": 128,
                "image": {"name": "test_byobnet", "size": 32},
                "text": {"layers": 1, "context_length": 16},
                "heads": {"hidden_dim": 256},
            },
            "teacher": {"features": str(emoji_teacher_path()), "tower": "text"},
            "loss": {"prototypical": 0.0, "positives": "shared"},
            "episodes": {
                **{"size": 2048, "count": QUICK_EPISODES, "batch_size": 128},
                "locked_image": 0,
            },
        }
    )


def write_pairs(out: Path) -> tuple[Path, Path]:
    """Write the pairs to learn and those to evaluate on, as tables that any command reads."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from protoclip.data.emoji import emoji_table

    table = emoji_table("train")
    table = table.filter(pc.is_in(table["group"], pa.array(GROUPS)))
    is_held_out = pc.equal(table["style"], ARTIST)
    seen, unseen = table.filter(pc.invert(is_held_out)), table.filter(is_held_out)
    unseen = unseen.filter(pc.is_in(unseen["concept"], seen["concept"].unique()))
    out.mkdir(parents=True, exist_ok=True)
    paths = out / "seen.parquet", out / "unseen.parquet"
    for path, pairs in zip(paths, (seen, unseen), strict=True):
        if path.exists():  # of an earlier call
            continue
        # With the kind in the caption ("banana, food fruit"), groups on the map have clear names.
        kinds = pc.replace_substring(pairs["subgroup"], "-", " ")
        captions = pc.binary_join_element_wise(pairs["label"], kinds, ", ")
        pairs = pairs.select(["sample_id", "image", "group"]).append_column("caption", captions)
        with replacing(path) as scratch:
            pq.write_table(pairs, scratch)
    return paths


def write_report(folders: list[Path], path: Path) -> dict[str, str]:
    """Write the report of runs, if its libraries are there; return what to look at."""
    if not is_installed("report"):
        return {}
    from protoclip.results import page

    page.write_report(folders, path)
    return {str(path): "how it learned, in a browser"}


def is_installed(command: str) -> bool:
    """Whether the libraries of a command are there; says what to install if not."""
    try:
        require_libraries(command)
    except ValueError as error:
        say(f"note: {error}")
        return False
    return True
