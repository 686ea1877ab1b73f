"""On one model and the same files, CLIP_benchmark's code and ours give the same numbers.

CLIP_benchmark needs an older NumPy than the package may have; without it, these tests are skipped.
"""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from tiny_open_clip import save_tiny_open_clip

import protoclip
from testing import save_to_bytes

builder: Any = pytest.importorskip("clip_benchmark.datasets.builder")
classification: Any = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
retrieval: Any = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")

COUNT = 48
NAMES = ["red fox", "cup", "tall house", "tram", "sea", "violin", "old map"]
TEMPLATES = ["a photo of a {c}.", "{c}", "a drawing of the {c}, from above."]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_open_clip(tmp_path_factory.mktemp("model"))


def image(number: int) -> tuple[str, bytes]:
    """A suffix and a file: soft colours, of odd sides, smaller and larger than the model's input.

    The largest are JPEGs that training would decode at half their size.
    """
    draw = np.random.default_rng(number)
    small = Image.fromarray(draw.integers(256, size=(6, 6, 3)).astype(np.uint8))
    sides = draw.integers(21, 75, size=2) * (1 + 3 * (number % 4 == 0))
    suffix, kind = [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WebP")][number % 4 % 3]
    return suffix, save_to_bytes(small.resize(tuple(sides.tolist()), Image.BILINEAR), kind)


def beside(kind: str, number: int) -> tuple[str, bytes]:
    """What lies beside an image: its class, the classes that it shows, or one to four captions."""
    draw = np.random.default_rng(1000 + number)
    if kind == "classification":
        return "cls", str(draw.integers(len(NAMES))).encode()
    if kind == "multilabel":
        buffer = io.BytesIO()
        np.save(buffer, draw.integers(2, size=len(NAMES)))
        return "npy", buffer.getvalue()
    pairs = draw.integers(len(NAMES), size=(1 + number % 4, 2))
    lines = [f"{NAMES[first]} by a {NAMES[second]}, {number}" for first, second in pairs]
    return "txt", "\n".join(lines).encode()


def write_data(folder: Path, kind: str) -> Path:
    """Two tars in CLIP_benchmark's layout."""
    (folder / "test").mkdir(parents=True)
    texts = {
        "classnames.txt": "\n".join(NAMES),
        "zeroshot_classification_templates.txt": "\n".join(TEMPLATES),
        "dataset_type.txt": kind,
        "test/nshards.txt": "2",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    for shard in range(2):
        with tarfile.open(folder / f"test/{shard}.tar", "w") as tar:
            for number in range(shard, COUNT, 2):
                for suffix, content in (image(number), beside(kind, number)):
                    member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def theirs(model_folder: Path, data: Path, kind: str) -> dict[str, float]:
    """As CLIP_benchmark's command does it, in full precision."""
    name = f"local-dir:{model_folder}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    dataset = builder.build_wds_dataset("data", transform, split="test", data_dir=str(data))
    loader = torch.utils.data.DataLoader(dataset.batched(10), batch_size=None)
    settings = {"device": "cpu", "amp": False}
    if kind == "retrieval":
        settings["recall_k_list"] = [1, 5, 10]
        return dict(retrieval.evaluate(model.eval(), loader, tokenizer, **settings))
    texts = dataset.classes, dataset.templates
    return dict(classification.evaluate(model.eval(), loader, tokenizer, *texts, **settings))


@pytest.mark.parametrize(
    ("kind", "metrics"),
    [
        ("classification", ["acc1", "acc5", "mean_per_class_recall"]),
        ("multilabel", ["mean_average_precision"]),
        (
            "retrieval",
            [f"{answer}_retrieval_recall@{k}" for k in (1, 5, 10) for answer in ("image", "text")],
        ),
    ],
)
def test_the_same_numbers(kind, metrics, model_folder, tmp_path):
    data = write_data(tmp_path / "data", kind)
    expected = theirs(model_folder, data, kind)
    assert sorted(expected) == sorted(metrics)
    assert all(0 < value < 1 for value in expected.values())
    task = "retrieval" if kind == "retrieval" else "zero_shot"
    loaded = protoclip.load(model_folder)
    (record,) = protoclip.evaluate(*loaded, f"wds:{data}", [task])
    assert record["metrics"] == pytest.approx(expected, abs=1e-6)
