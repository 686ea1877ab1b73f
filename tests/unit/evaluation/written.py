"""Evaluation data in files: three images of one colour each, in several forms."""

import io
import tarfile
from typing import Any

import datasets as hugging_face
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from protoclip.config import DataConfig
from protoclip.evaluation import datasets
from protoclip.evaluation.datasets import EvaluationData
from testing import save_to_bytes


def open_data(reference: str, *, split: str = "test", **settings: Any) -> EvaluationData:
    """A data set that is read with these settings of `[data]`."""
    return datasets.open_data(reference, split=split, config=DataConfig(**settings))


# The images of every split below, by the red of their pixels, with class and captions.
REDS, NAMES, CLASSES = (10, 20, 30), ["cat", "big dog"], [1, 0, 1]
CAPTIONS = [("one",), ("two", "a second"), ("three",)]


def png(red: int) -> bytes:
    return save_to_bytes(Image.new("RGB", (3, 2), (red, 0, 0)))


def write(path, content: str | bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_tar(path, files: dict[str, bytes]):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def npy(*present: int) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(present))
    return buffer.getvalue()


BESIDE = {
    "cls": [b"1", b"0\n", b"1"],
    "npy": [npy(0, 1), npy(1, 1), npy(0, 0)],
    "txt": ["\n".join(texts).encode() for texts in CAPTIONS],
}
KINDS = {"cls": "classification", "npy": "multilabel", "txt": "retrieval"}


def write_wds(folder, extension: str = "cls", beside=None, splits=("train", "test")):
    """Three samples in two tars a split."""
    for split in splits:
        write(folder / split / "nshards.txt", "2\n")
        samples = list(zip(REDS, beside or BESIDE[extension], strict=True))
        for shard, part in enumerate((samples[:2], samples[2:])):
            files: dict[str, bytes] = {}
            for number, (red, content) in enumerate(part):
                key = f"s{shard}{number}"
                files |= {f"{key}.{extension}": content, f"{key}.png": png(red), f"{key}.json": b""}
            write_tar(folder / split / f"{shard}.tar", files)
    write(folder / "classnames.txt", "cat\nbig dog\n")
    write(folder / "zeroshot_classification_templates.txt", "a {c}\nthe {c}.\n")
    if extension != "cls":
        write(folder / "dataset_type.txt", KINDS[extension] + "\n")
    return folder


def write_table(path, **columns):
    table = {"image": [png(red) for red in REDS], **columns}
    pq.write_table(pa.table(table), path)
    return path


def as_class_label(folder, labels=CLASSES, names=NAMES):
    features = hugging_face.Features(
        image=hugging_face.Value("binary"), label=hugging_face.ClassLabel(names=names)
    )
    data = {"image": [png(red) for red in REDS], "label": labels}
    path = str(folder / "pets.parquet")
    hugging_face.Dataset.from_dict(data, features=features).to_parquet(path)
    return {"reference": path, "class_column": "label"}, "pets"
