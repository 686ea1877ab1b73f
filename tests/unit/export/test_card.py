"""The card of an exported model, and its prototypes."""

import json
import re
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from exported import assert_close, run_examples, save_run
from PIL import Image
from safetensors.torch import load_file

import protoclip
from protoclip.evaluation.metrics import columns_of
from protoclip.evaluation.samples import SampleResults
from protoclip.export import card as cards
from protoclip.export.card import captions_of, write_prototypes
from protoclip.export.source import open_source
from protoclip.files import to_json
from protoclip.models.saved import find_checkpoint
from testing import tiny_model


def test_the_card_of_a_run(tmp_path):
    """With settings, metrics with intervals, and commands that load the folder."""
    made, generator = save_run(tmp_path / "run", tiny_model()), np.random.default_rng(0)
    (made / "config.toml").write_text(
        '[run]\nname = "My <i>model</i>|[x]"\n[data]\ntrain = "pairs.tsv"\n'
        '[teacher]\nfeatures = "me/teacher"\n'
    )
    images: dict[str, Any] = {
        name: generator.integers(0, 9, 200) for name in columns_of(texts=False)
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
    assert cards.judged_on(named) == f"On the data that judged the run; {shared}"
    assert "| `eval/emoji/clustering/ami` | 0.2500 | - |" in card
    # Damaged results cost numbers, not the export.
    (made / "results" / "emoji-test.parquet").write_bytes(b"cut")
    given = made, find_checkpoint(made), {}, tmp_path
    assert f"| `eval/emoji/zero_shot/acc5` | {accuracy:.4f} | - |" in cards.metrics_lines(*given)
    (made / "results.json").write_text("{")
    assert cards.metrics_lines(*given) == ["None: there are no results of this checkpoint."]
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


def test_the_card_shows_how_a_run_learned(tmp_path, monkeypatch):
    """By the report's figure, with its words and its positives; by none without the extra. A
    licence that the hub does not know is another one, by its name."""
    made = save_run(tmp_path / "run", tiny_model())
    (made / "config.toml").write_text('[loss]\npositives = "shared"\n[episodes]\nbatch_size = 16\n')
    metric = "eval/]$data/retrieval/image_to_text@1"
    other = "eval/once/retrieval/image_to_text@1"  # one value is no curve
    logged = [
        {"step": 1, "train/loss/total": 3.0, metric: 0.25},
        {"step": 9, "train/loss/total": 2.0, metric: 0.5, other: 0.5},
    ]
    (made / "metrics.jsonl").write_text("".join(to_json(line) + "\n" for line in logged))
    protoclip.export(made, tmp_path / "out", ("open_clip",), license="my-own")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| positives | `shared` |" in text
    assert "Total loss from 3 to 2; \\]$data: " in text
    assert " from 0.25 to 0.5](training.png)" in text
    with Image.open(tmp_path / "out" / "training.png") as image:
        assert image.size == (1260, 390)
    front = yaml.safe_load(text.split("\n---\n")[0])
    assert (front["license"], front["license_name"]) == ("other", "my-own")
    monkeypatch.setattr(cards, "find_spec", lambda name: None)
    cards.metrics_lines(made, find_checkpoint(made), {}, tmp_path)
    assert not (tmp_path / "training.png").exists()


def test_prototypes_go_along(tmp_path):
    """With the heads, and the number of members."""
    centroids = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    clusters = {
        "image": {"centroids": centroids, "assignments": torch.tensor([2, 0, 2, 2])},
        "text": {"centroids": centroids.neg()[:2], "assignments": torch.tensor([0, 1, 1, 1])},
        "other": {"centroids": centroids[:, :5], "assignments": torch.tensor([0, -1, -1, 1])},
    }
    made = save_run(tmp_path / "run", tiny_model(), clusters=clusters)
    source = open_source(str(made))
    assert write_prototypes(source, tmp_path) is None
    found = load_file(tmp_path / "prototypes.safetensors")
    assert torch.equal(found["image.centroids"], centroids)
    assert found["image.sizes"].tolist() == [1, 0, 3]
    a, b = centroids.neg()[:2]
    torch.testing.assert_close(found["image.in_text"], torch.stack([b, 0 * a, (a + 2 * b) / 3]))
    torch.testing.assert_close(found["other.in_text"], torch.stack([a, b, 0 * a]))
    assert "text.in_text" not in found
    head = source.model.image_head.state_dict()
    assert all(torch.equal(found[f"image_head.{key}"], value) for key, value in head.items())
    facts = json.loads((tmp_path / "prototypes.json").read_text())
    assert facts["spaces"]["image"] == {"number": 3, "width": 8, "sizes": [1, 0, 3]}
    assert [*facts["spaces"]] == ["image", "other", "text"]
    resume = source.checkpoint / "resume.safetensors"
    resume.write_bytes(resume.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"damaged \(resume.safetensors is not what was written"):
        write_prototypes(source, tmp_path)


def test_captions_behind_links_need_a_permission(tmp_path):
    """As in training, since a run folder may be somebody else's."""
    (tmp_path / "linked").mkdir()
    for name in ("a.jpg", "a.txt"):
        (tmp_path / name).write_text("a caption")
        (tmp_path / "linked" / name).symlink_to(tmp_path / name)
    (tmp_path / "config.toml").write_text(f'data.train = "{tmp_path}/linked"\n')
    with pytest.raises(ValueError, match=r"--data.allow_links"):
        captions_of(tmp_path, allow_links=False)
    assert captions_of(tmp_path, allow_links=True) == ["a caption"]
