"""The card of an exported model, and its prototypes."""

import re
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from exported import assert_close, run_examples, save_run

import protoclip
from protoclip.evaluation.metrics import SampleResults, list_columns
from protoclip.export import card as cards
from protoclip.files import to_json
from testing import tiny_model


def test_the_card_of_a_run(tmp_path):
    """With settings, metrics with intervals, and commands that load the folder."""
    made, generator = save_run(tmp_path / "run", tiny_model()), np.random.default_rng(0)
    (made / "config.toml").write_text(
        '[run]\nname = "My <i>model</i>|[x]"\n[data]\ntrain = "pairs.tsv"\n'
        '[teacher]\nfeatures = "me/teacher"\n'
    )
    images: dict[str, Any] = {
        name: generator.integers(0, 9, 200) for name in list_columns(texts=False)
    }
    ids = np.array([f"{number:03}" for number in range(200)])
    images["group"] = ids
    texts = {"sample_id": ids, "group": ids, "text_to_image_rank": images["image_to_text_rank"]}
    samples = SampleResults(images={"sample_id": ids, **images}, texts=texts)
    samples.write(made / "results" / "emoji-test.parquet")
    accuracy = float(samples.values("zero_shot/acc5").mean())
    metrics = {"eval/emoji/zero_shot/acc5": accuracy, "eval/emoji/modality_gap/gap": 0.5}
    metrics["eval/emoji/clustering/ami"] = 0.25
    counts = {"name": "My model", "seed": 0, "samples_seen": 1, "train_seconds": 1.0}
    (made / "results.json").write_text(to_json({**counts, "metrics": metrics}))
    formats = ("open_clip", "hf", "timm")
    protoclip.export(made, tmp_path / "out", formats)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\n# My \\<i\\>model\\</i\\>|\\[x\\]\n" in card
    assert 'train = "pairs.tsv"' in card
    assert "| teachers | `me/teacher` |\n| data | `pairs.tsv` |\n| positives | `pair` |\n" in card
    row = re.search(r"zero_shot/acc5` \| (0\.\d{4}) \| \[(0\.\d{4}), (0\.\d{4})\] \|", card)
    value, low, high = map(float, row.groups())
    assert value == pytest.approx(accuracy, abs=1e-4)
    error = (accuracy * (1 - accuracy) / 200) ** 0.5
    assert low == pytest.approx(accuracy - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(accuracy + 1.96 * error, abs=0.3 * error)
    assert "| `eval/emoji/modality_gap/gap` | 0.5000 | - |" in card
    assert "\nOn data that the run did not train on:\n" in card
    named = {"data": {"validation": "a.tsv"}, "run": {"guard": ["emoji", "b.tsv"]}}
    shared = "`a.tsv`, `b.tsv` may share pairs with its training data:"
    assert cards.name_validation(named) == f"On the validation data of the run; {shared}"
    assert "| `eval/emoji/clustering/ami` | 0.2500 | - |" in card
    names = run_examples(tmp_path / "out")
    assert [*names] == [*formats, "protoclip"]
    expected = names["protoclip"]["similarity"]
    assert expected.shape == (1, 2)
    assert_close(names["open_clip"]["similarity"], expected)
    assert_close(names["hf"]["similarity"], expected)
    features = names["timm"]["image_features"]
    assert_close(torch.nn.functional.normalize(features), names["protoclip"]["image_features"])
    front = yaml.safe_load(card.split("\n---\n")[0])
    assert front == {
        "license": "unknown",
        "library_name": "open_clip",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip", "protoclip", "transformers", "timm"],
    }


def test_the_card_of_a_fine_tuned_model(tmp_path):
    """How far from the start its weights are, and the metrics of the start beside its own."""
    made = save_run(tmp_path / "run", tiny_model(), alpha=0.3)
    model = '[model]\nname = "RN50"\npretrained = "openai"\n'
    (made / "config.toml").write_text(f'{model}[data]\ntrain = "pairs.tsv"\n')
    counts = {"name": "shop", "seed": 0, "samples_seen": 1, "train_seconds": 1.0}
    metrics = {"eval/emoji/zero_shot/acc5": 0.75, "eval/emoji/modality_gap/gap": 0.5}
    before = {"eval/emoji/zero_shot/acc5": 0.5}
    results = {**counts, "metrics": metrics, "start_metrics": before}
    (made / "results.json").write_text(to_json(results))
    protoclip.export(made, tmp_path / "out", ("open_clip",))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| start | `RN50`, weights `openai` |" in card
    assert "| weights | 0.3 of the way from the start to the end of fine-tuning |" in card
    assert "| metric | start | value | 95% interval |\n| --- | --- | --- | --- |\n" in card
    assert "| `eval/emoji/zero_shot/acc5` | 0.5000 | 0.7500 | - |" in card
    assert "| `eval/emoji/modality_gap/gap` | - | 0.5000 | - |" in card
