"""mteb runs a task on any model of ours; skipped where mteb is not installed."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_open_clip import save_tiny_open_clip

import protoclip
from protoclip.evaluation.datasets import EvaluationData, Split
from protoclip.evaluation.mteb import MtebModel

mteb: Any = pytest.importorskip("mteb")
abstasks: Any = pytest.importorskip("mteb.abstasks")

NAMES = ["fox", "cup", "house", "tram"]
PROMPT = "a photo of a {c}."
COUNT = 24
LABELS = [number % len(NAMES) for number in range(COUNT)]


class Noise:
    """Images of other soft colours each."""

    name, key = "noise", ""

    def __len__(self) -> int:
        return COUNT

    def sample_id(self, row: int) -> str:
        return str(row)

    def image(self, row: int) -> Image.Image:
        colours = np.random.default_rng(row).integers(256, size=(3, 3, 3)).astype(np.uint8)
        return Image.fromarray(colours).resize((40 + row, 50), Image.Resampling.BILINEAR)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_open_clip(tmp_path_factory.mktemp("model"))


def zero_shot_task() -> Any:
    """A task as those of MIEB, with data of its own instead of a download."""

    class NoiseZeroShot(abstasks.AbsTaskZeroShotClassification):
        metadata = mteb.TaskMetadata(
            name="NoiseZeroShot",
            description="Soft colours.",
            dataset={"path": "none", "revision": "1"},
            type="ZeroShotClassification",
            category="i2t",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="accuracy",
            modalities=["text", "image"],
        )

        def load_data(self, *args: Any, **settings: Any) -> None:
            images = [Noise().image(row) for row in range(COUNT)]
            columns = {"image": images, "label": LABELS}
            self.dataset = datasets.DatasetDict(test=datasets.Dataset.from_dict(columns))
            self.data_loaded = True

        def get_candidate_labels(self) -> list[str]:
            return [PROMPT.format(c=name) for name in NAMES]

    return NoiseZeroShot()


def test_a_task_gives_the_suites_own_number(folder):
    """One prompt a class is all that mteb has, so that here both measure the same."""
    model = MtebModel(folder, device="cpu")
    assert isinstance(model, mteb.models.EncoderProtocol)
    result = mteb.evaluate(model, [zero_shot_task()], cache=None, show_progress_bar=False)
    (scores,) = result.task_results[0].scores["test"]
    split = Split(images=Noise(), labels=torch.tensor(LABELS))
    data = EvaluationData(
        name="noise", splits={"test": split}, class_names=NAMES, templates=[PROMPT]
    )
    (record,) = protoclip.evaluate(*protoclip.load(folder), data, ["zero_shot"])
    assert 0 < scores["accuracy"] < 1
    assert scores["accuracy"] == pytest.approx(record["metrics"]["acc1"])
