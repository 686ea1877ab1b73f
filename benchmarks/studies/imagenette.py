"""Sort imagenette into a folder of classes with train, val and test, to evaluate features by.

    python benchmarks/studies/imagenette.py IMAGENETTE OUT

IMAGENETTE has `train` and `val`, each with a folder for each of the ten synsets. Of its 9,469
training images 4,000 are OUT/train and 1,500 OUT/val, drawn once for all; its 3,925 validation
images are OUT/test. Files are linked where the disk allows it.
"""

import argparse
import os
import random
import shutil
from pathlib import Path

CLASSES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
TRAIN, VALIDATION = 4000, 1500
SEED = 5


def splits(folder: Path) -> dict[str, list[Path]]:
    """The images of each split, as paths within the folder."""
    found = sorted(str(path.relative_to(folder)) for path in folder.glob("*/*/*"))
    random.Random(SEED).shuffle(found)
    images = [Path(path) for path in found]
    trained = [path for path in images if path.parts[0] == "train"]
    return {
        "train": trained[:TRAIN],
        "val": trained[TRAIN : TRAIN + VALIDATION],
        "test": [path for path in images if path.parts[0] == "val"],
    }


def place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("imagenette", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    for split, images in splits(given.imagenette).items():
        for path in images:
            target = given.out / split / CLASSES[path.parts[1]] / path.name
            place(given.imagenette / path, target)
        print(f"{split}: {len(images):,} images")


if __name__ == "__main__":
    main()
