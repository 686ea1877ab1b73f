"""Draw the charts of docs/tasks from numbers of docs/LOG.md, and a sheet of what `classify` wrote.

    python scripts/draw_tasks.py
    python scripts/draw_tasks.py --write-classes classes
    protoclip classify runs/emoji-0 --data classes/test --classes classes/train --out classes.csv
    python scripts/draw_tasks.py --sheet classes.csv classes/test

The run is that of record_search.py.
"""

import argparse
import csv
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image

from protoclip.data.emoji import emoji_table

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {"start": "0.6", "InfoNCE": "tab:orange", "with prototypes": "tab:blue"}
# "Fine-tuning on groceries with five seeds", test: means, and standard deviations over seeds.
FINETUNED = {
    "zero-shot on groceries": ([1.8, 43.0, 47.0], [0, 1.0, 1.6]),
    "kNN on groceries": ([31.3, 50.1, 53.6], [0, 1.3, 1.1]),
    "zero-shot on clothing, the guard": ([75.0, 56.7, 62.6], [0, 1.8, 2.1]),
}
# "Aerial photographs: names of classes written as words", test, names as in the files.
AERIAL = {
    "OpenAI's ViT-B/32 (published)": 57.2,
    "align: Lite0 and MiniLM": 79.3,
    "align: Lite0, Lite2 and MiniLM": 83.3,
    "ViT-B/32, fine-tuned (published)": 88.3,
}
# Subgroups of emoji that are classes, and the artist whose drawings are classified.
CLASSES = ["food-fruit", "animal-bird", "transport-water", "musical-instrument", "clothing", "tool"]
ARTIST = "noto"


def draw_finetuned(out: Path) -> None:
    """Groups of bars: what fine-tuning gains, and what it forgets."""
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    for shift, (name, colour) in enumerate(COLOURS.items()):
        places = [place + 0.27 * (shift - 1) for place in range(len(FINETUNED))]
        heights = [means[shift] for means, _ in FINETUNED.values()]
        errors = [deviations[shift] for _, deviations in FINETUNED.values()]
        bars = axes.bar(places, heights, 0.25, yerr=errors, color=colour, label=name)
        axes.bar_label(bars, fmt="%.0f", padding=2)
    axes.set(ylabel="correct, in percent", ylim=(0, 85), xticks=range(len(FINETUNED)))
    axes.set_xticklabels(FINETUNED)
    axes.set_xlabel("five seeds: mean and standard deviation")
    axes.legend(loc="upper left")
    figure.savefig(out, dpi=110)


def draw_aerial(out: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 2.2), layout="constrained")
    colours = ["tab:blue" if name.startswith("align") else "0.6" for name in AERIAL]
    bars = axes.barh([*AERIAL], [*AERIAL.values()], color=colours)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.invert_yaxis()
    axes.set(xlabel="RSICD's test split, classified correctly, in percent", xlim=(0, 100))
    figure.savefig(out, dpi=110)


def write_classes(folder: Path) -> None:
    """Folders of emoji by class: two of an artist to classify, four of another to learn from."""
    rows = emoji_table("train").to_pylist()
    for name in CLASSES:
        of_class = [row for row in rows if row["subgroup"] == name]
        tests = [row for row in of_class if row["style"] == ARTIST][:2]
        known = {row["concept"] for row in tests}
        others = [row for row in of_class if row["style"] == "fluent-emoji"]
        labelled = [row for row in others if row["concept"] not in known][:4]
        for part, chosen in {"test": tests, "train": labelled}.items():
            for row in chosen:
                place = folder / part / name / f"{row['concept']}.webp"
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(row["image"])


def draw_sheet(table: Path, folder: Path, out: Path) -> None:
    """Images with the class and probability that `classify` wrote, the most certain first."""
    with table.open(encoding="utf-8", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: -float(row["probability"]))
    figure, places = plt.subplots(2, 6, figsize=(8, 3.2), layout="constrained")
    for place, row in zip(places.flat, rows, strict=False):
        place.imshow(Image.open(folder / row["sample_id"]).convert("RGBA"))
        is_right = row["prediction"] == row["class"]
        title = f"{row['prediction']}\n{float(row['probability']):.2f}"
        wrong = "" if is_right else ", wrong"
        place.set_title(title + wrong, fontsize=9, color="black" if is_right else "tab:red")
    for place in places.flat:
        place.axis("off")
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write-classes", type=Path, help="write folders for classify, and end")
    parser.add_argument("--sheet", type=Path, nargs=2, help="draw what classify wrote, and end")
    options = parser.parse_args()
    if options.write_classes:
        write_classes(options.write_classes)
    elif options.sheet:
        table, folder = options.sheet
        draw_sheet(table, folder, ROOT / "docs" / "classes.webp")
    else:
        draw_finetuned(ROOT / "docs" / "adapt.png")
        draw_aerial(ROOT / "docs" / "science.png")


if __name__ == "__main__":
    main()
