"""Aligning two frozen encoders: heads train on features that were encoded once."""

import json
import multiprocessing
import os
import re
import shutil
import signal
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import protoclip
from interrupting import read_metrics
from protoclip.cli import main
from protoclip.cli.train import Align
from protoclip.config import Config
from protoclip.data import sources
from protoclip.data.loader import EpisodeLoader, Pass
from protoclip.data.sampler import EpisodeSampler
from protoclip.distributed.collectives import rank
from protoclip.encode import features as evaluated
from protoclip.encode import rows as encoded_rows
from protoclip.encode import run as running
from protoclip.encode.encoder import Encoder
from protoclip.encode.rows import RowLoader
from protoclip.encode.store import hash_ids
from protoclip.evaluation.suite import evaluate_run
from protoclip.evaluation.validation import split_validation
from protoclip.models.checkpoint import read_config
from protoclip.models.projections import AlignedModel
from protoclip.models.protoclip import evaluation_transform
from protoclip.models.start import find_start
from protoclip.prototypes.kmeans import kmeans
from protoclip.training import presets
from protoclip.training.presets import choose_before_data
from protoclip.training.run import align
from testing import build_model, run_distributed, tiny_pairs
from tiny_align import align_on_a_rank, assert_near, changed, rows_of, stop_in_episode, weights_of


@pytest.fixture(scope="module")
def ended(given, tmp_path_factory) -> Path:
    """A run with both kinds of prototypes, of the encoders and of the projections.

    Encoders are frozen and are clustered once, projections in each of two episodes.
    """
    folder, counted = tmp_path_factory.mktemp("ended") / "run", Mock(wraps=kmeans)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("protoclip.training.trainer.kmeans", counted)
        assert align(changed(given, folder))["steps"] == 12
    assert counted.call_count == 2 + 2 * 2
    return folder


def test_only_what_lies_between_the_encoders_trains(given, ended):
    after = weights_of(ended)
    before = build_model(choose_before_data("align", given).config.model, seed=0).state_dict()
    between = (
        "towers.visual.head.",
        "towers.text.proj.",
        "towers.logit_",
        "image_head",
        "text_head",
    )
    for name, value in after.items():
        if name.startswith(("towers.visual.trunk.", "towers.text.transformer.")):
            assert torch.equal(value, before[name])
        elif name.endswith("weight") and not name.endswith("1.weight"):
            assert name.startswith(between)
            assert not torch.equal(value, before[name])
    lines = (ended / "metrics.jsonl").read_text()
    towers, pairs = ("image", "text"), ("image_from_text", "text_from_image")
    encoders = [f"{student}_from_{tower}_half" for student in towers for tower in towers]
    for pair in (*pairs, *encoders):
        assert f'"train/loss/prototypical/{pair}":' in lines
    results = json.loads((ended / "results.json").read_text())
    assert "eval/validation/retrieval/image_to_text@1" in results["metrics"]


def test_strengths_set_themselves_as_in_train(ended):
    """Groups count as far as they agree with the student's, and the first factor makes prototypes
    pull as hard as InfoNCE for each unit of this weight."""
    loss, towers = read_config(ended).loss, ("image", "text")
    assert loss.strengths == "automatic"
    begun, *lines = (line for line in read_metrics(ended) if line["episode"] == 1)
    weights = {
        name.rpartition("/")[2]: (loss.teacher if name.endswith("half") else loss.prototypical)
        * value
        for name, value in begun.items()
        if "/agreement/" in name
    }
    assert len(weights) == 6
    first, second, *_ = steps = [line for line in lines if "train/loss/total" in line]
    for tower in towers:
        weight = sum(value for pair, value in weights.items() if pair.startswith(tower))
        factor = second[f"train/balance/{tower}"]
        assert factor == pytest.approx(weight / first[f"train/pull/{tower}"], rel=1e-4)
        assert len({line.get(f"train/balance/{tower}") for line in steps}) == 4
    for line in steps:
        factors = {tower: line.get(f"train/balance/{tower}", 1.0) for tower in towers}
        terms = [
            value * factors[pair.partition("_")[0]] * line[f"train/loss/prototypical/{pair}"] / 2
            for pair, value in weights.items()
        ]
        total = line["train/loss/info_nce"] + sum(terms)
        assert line["train/loss/total"] == pytest.approx(total, rel=1e-4)


def test_the_default_is_clip_from_the_closed_form(given, tmp_path, capsys, monkeypatch):
    """Without prototypes or the geometry term, which bring nothing (docs/LOG.md). Notes
    name what was given without effect, and nothing that was chosen. Without `run.out` a run is in
    the folder of its name and seed."""
    monkeypatch.chdir(tmp_path)
    given = {**given, "loss": {}, "align": {}}
    align(changed(given, data={"augmentation": "clip"}, run={"name": "My pairs", "seed": 3}))
    run = tmp_path / "runs" / "my-pairs-3"
    lines = (run / "metrics.jsonl").read_text()
    assert "train/loss/info_nce" in lines
    assert "train/loss/geometry" not in lines
    assert "prototypical" not in lines
    config = (run / "config.toml").read_text()
    for setting in ("dropout = 0.2", "geometry = 0.0", "teacher = 0.0"):
        assert setting in config
    chosen = read_config(run)
    for name in ("loss.prototypical", "loss.teacher"):
        section, _, setting = name.partition(".")
        assert getattr(getattr(chosen, section), setting) == Align.defaults[name]
    with pytest.raises(SystemExit):
        main(["align", "--help"])
    shown = capsys.readouterr()
    assert "Sets the time; else by the data. [30 passes]" in shown.out
    assert "Weight of the prototypical loss; 0 is CLIP. [0.0]" in shown.out
    assert find_start(str(run)).heads_are_new  # nothing has trained them
    said = shown.err
    for chosen in ("optim.heads_lr_scale", "episodes.warm_up"):
        assert f"{chosen}: no effect" not in said


def test_a_step_sees_what_the_whole_towers_would_make_of_its_batch(given, tmp_path):
    """The store holds half precision, so features agree to its rounding; the same captions match,
    but for case."""
    table = pq.read_table(given["data"]["train"])
    texts = [own[0] for own in table["caption"].to_pylist()]
    captions = [[texts[row // 2].upper(), texts[row]] for row in range(len(texts))]
    path = str(tmp_path / "pairs.parquet")
    pq.write_table(table.set_column(1, "caption", pa.array(captions)), path)
    given = changed(given, data={"train": path}, loss={"positives": "shared"})
    plan, encoded, model = rows_of(given)
    settings: dict[str, Any] = {
        "pairs": plan.samples,
        "tokenizer": plan.start.tokenizer(),
        "transform": evaluation_transform(model),
        "batch_size": 16,
        "seed": 0,
        "device": torch.device("cpu"),
    }
    episode = EpisodeSampler(len(plan.samples), 32, seed=0).episode(0)
    by = {"group_by": ("caption", "image")}
    rows = RowLoader(**settings, encoded=encoded).batches(Pass(episode, **by))
    pixels = EpisodeLoader(**settings).batches(Pass(episode, **by))
    on_rows = AlignedModel(model).eval()
    model.eval()
    number = 0
    for stored, plain in zip(rows, pixels, strict=True):
        assert stored.sample_id == plain.sample_id
        same = [(b.groups[:, None] == b.groups) for b in (stored, plain)]
        assert torch.equal(*same)
        assert same[0][..., 0].sum() > len(stored.sample_id)
        with torch.no_grad():
            mine = on_rows(stored.image, stored.text)
            whole = model(plain.image, plain.text)
        for name in ("image_features", "text_features", "image_projections"):
            torch.testing.assert_close(
                getattr(mine, name), getattr(whole, name), atol=5e-3, rtol=5e-3
            )
        number += 1
    assert number == 2


def test_a_run_is_evaluated_by_the_encoders_as_by_the_whole_model(given, tmp_path):
    results = align(changed(given, tmp_path / "run", run={"evaluate_every": 1}))
    model, transform, tokenizer = protoclip.load(tmp_path / "run")
    settings = Config.from_dict(choose_before_data("align", given).given)
    (data,) = split_validation(settings, sources.open_samples(settings)).data
    encoder = evaluated.Encoder(
        model=model, transform=transform, tokenizer=tokenizer, workers=0, whole=True
    )
    whole = evaluate_run(encoder, data=data, split="validation")
    assert {k for k in results["metrics"] if "retrieval" in k}
    for name, value in whole.items():
        assert results["metrics"][name] == pytest.approx(value, abs=1e-4)


def test_what_was_encoded_is_not_encoded_again(given, tmp_path, store, monkeypatch):
    """Neither for the same pairs, nor for some of them under other names."""
    encoded: list[int] = []
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, inputs: noted(self, inputs))

    def noted(encoder: Encoder, inputs: list[Any]) -> torch.Tensor:
        encoded.append(len(inputs))
        return encode(encoder, inputs)

    def rows_encoded(settings: dict[str, Any]) -> int:
        encoded.clear()
        rows_of(settings)
        return sum(encoded)

    for_keys = rows_encoded(given) and rows_encoded(given)
    plan, *_ = rows_of(given)
    captions = {
        text for row in range(len(plan.samples)) for text in plan.samples.sample_captions(row)
    }
    shutil.rmtree(store)
    assert rows_encoded(given) == len(plan.samples) + len(captions) + for_keys
    left_out = tmp_path / "left_out.json"
    left_out.write_text('["tiny/3"]')
    data = {key: value for key, value in given["data"].items() if key != "train"}
    mixture = [{"path": given["data"]["train"]}]
    for other in ({"without": str(left_out)}, {**data, "sources": mixture, "train": "emoji"}):
        assert rows_encoded(changed(given, data=other)) == for_keys


def encode_into(folder: Path, settings: dict[str, Any], kill: str = "") -> None:
    """Fill a store in small blocks. Each rank notes what it encodes in a file of its own; SIGKILL
    may come among the images or the texts."""
    folder.mkdir(exist_ok=True)
    encode, turns = Encoder.encode, count(1)

    def noted(encoder: Encoder, inputs: list[Any]) -> torch.Tensor:
        with (folder / f"{rank()}.txt").open("a") as lines:
            lines.write(f"{encoder.reads} {len(inputs)}\n")
        if encoder.reads == kill and next(turns) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(encoder, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROTOCLIP_CACHE", str(folder))
        patch.setattr(running, "TEXTS_AT_ONCE", 2)
        patch.setattr(running, "BLOCK_ROWS", 4)
        patch.setattr(encoded_rows, "images_at_once", lambda _: 4)
        patch.setattr(Encoder, "encode", noted)
        rows_of(settings)


def encoded_in(folder: Path) -> list[Counter[str]]:
    """How many images and texts `encode_into` encoded, by rank."""
    counts = []
    for file in sorted(folder.glob("*.txt")):
        lines = [line.split() for line in file.read_text().splitlines()]
        counts.append(Counter({kind: 0 for kind, _ in lines}))
        for kind, number in lines:
            counts[-1][kind] += int(number)
    return counts


def store_in(folder: Path) -> dict[str, bytes]:
    files = [path for path in (folder / "features").rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def undisturbed(given, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    encode_into(folder, given)
    return folder


def test_a_killed_pass_loses_and_doubles_no_row(given, undisturbed, tmp_path):
    """Killed among images, then among captions, it ends with the same bytes in the store. What was
    not written before a kill is encoded again, and nothing else."""
    folder = tmp_path / "killed"
    for kind in ("image", "text"):
        arguments = (folder, given, kind)
        child = multiprocessing.get_context("fork").Process(target=encode_into, args=arguments)
        child.start()
        child.join(60)
        child.kill()  # if it hangs
        child.join()
        assert child.exitcode == -signal.SIGKILL
    before = encoded_in(folder)[0]
    encode_into(folder, given)
    assert store_in(folder) == store_in(undisturbed)
    again, (whole,) = encoded_in(folder)[0] - before, encoded_in(undisturbed)
    assert 0 < again["text"] < whole["text"]
    assert again["image"] < 4 < whole["image"]  # of the key


@pytest.mark.parametrize(
    "more",
    [
        {"loss": {"instance": "sigmoid"}},
        {"episodes": {"micro_batch_size": 4}, "prototypes": {"source": "extract", "number": 4}},
    ],
)
def test_ranks_train_what_one_process_trains(more, given, tmp_path):
    for ranks in (1, 2):
        settings = changed(given, tmp_path / f"{ranks}", **more)
        run_distributed(align_on_a_rank, ranks, settings, str(tmp_path / f"cache{ranks}"))
    assert_near(tmp_path / "2", tmp_path / "1")


def test_ranks_that_share_the_encoding_write_what_one_process_writes(given, undisturbed, tmp_path):
    """Byte for byte; each encodes some of both encoders."""
    run_distributed(encode_into, 2, tmp_path, given)
    counts, (whole,) = encoded_in(tmp_path), encoded_in(undisturbed)
    assert all(0 < count[kind] < whole[kind] for count in counts for kind in ("image", "text"))
    assert store_in(tmp_path) == store_in(undisturbed)


def test_a_stopped_run_goes_on_bit_for_bit(given, tmp_path, monkeypatch):
    more = {"prototypes": {"source": "queue"}, "align": {"dropout": 0.1}}
    align(changed(given, tmp_path / "whole", **more))
    settings = changed(given, tmp_path / "stopped", **more)
    with monkeypatch.context() as patch:
        stop_in_episode(patch, 7)
        assert align(settings)["stopped"] == "SIGTERM"
    align(settings, resume="auto")
    whole, resumed = weights_of(tmp_path / "whole"), weights_of(tmp_path / "stopped")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_the_weight_of_the_geometry_reaches_a_step(given, tmp_path):
    """Its loss is logged and counts."""
    changes = {"align": {"geometry": 3.0}, "episodes": {"count": 1}, "run": {"evaluate": False}}
    align(changed({**given, "loss": {}}, tmp_path / "run", **changes))
    lines = read_metrics(tmp_path / "run", "train/loss/total")
    assert len(lines) == 4
    for line in lines:
        assert line["train/loss/geometry"] > 0
        total = line["train/loss/info_nce"] + 3.0 * line["train/loss/geometry"]
        assert line["train/loss/total"] == pytest.approx(total, rel=1e-5)


def test_bad_images_are_left_out(given, tmp_path):
    table = pq.read_table(given["data"]["train"])
    images = table["image"].to_pylist()
    images[3], images[40] = b"no image", images[40][:50]
    pq.write_table(table.set_column(0, "image", pa.array(images)), tmp_path / "bad.parquet")
    settings = changed(given, data={"train": str(tmp_path / "bad.parquet"), "validation": 0.0})
    plan, rows, _ = rows_of(settings)
    assert len(plan.samples) == len(rows) == 94
    assert {"tiny/3", "tiny/40"}.isdisjoint(plan.samples.sample_ids())
    said = r"2 of 96 pairs cannot be used, such as sample 'tiny/3' \(.*\): not an image"
    assert re.search(said, "".join(plan.notes))
    with pytest.raises(ValueError, match=r"more than data\.max_bad_share"):
        rows_of(changed(settings, data={"max_bad_share": 0.01}))


def test_few_captions_train_at_a_lower_rate(given, monkeypatch):
    """Fewer than `FEW_CAPTIONS`, unless a rate is given."""

    def choose_rate(few: int, **optim: float) -> float:
        monkeypatch.setattr(presets, "FEW_CAPTIONS", few)
        return rows_of(changed({**given, "optim": {}}, optim=optim))[0].config.optim.learning_rate

    rates = [choose_rate(8192), choose_rate(96), choose_rate(8192, learning_rate=0.1)]
    assert rates == [3e-4, 1e-3, 0.1]


def test_rows_with_one_image_are_one_sample_with_all_captions(given, tmp_path):
    """As in tables with a row for each of an image's captions."""
    images = tiny_pairs(6)["image"].to_pylist()
    for number, image in enumerate(images):
        (tmp_path / f"{number}.png").write_bytes(image)
    names = [0, 1, 0, 2, 3, 1, 4, 5, 0]
    lines = [f"{name}.png\tcaption {row}" for row, name in enumerate(names)]
    (tmp_path / "pairs.tsv").write_text("\n".join(["image\tcaption", *lines]))
    data = {"train": str(tmp_path / "pairs.tsv"), "validation": 0.0}
    plan, rows, _ = rows_of(changed(given, data=data, episodes={"size": 6, "batch_size": 2}))
    assert len(plan.samples) == 6
    assert np.diff(rows.listing.first).tolist() == [3, 2, 1, 1, 1, 1]
    assert "3 pairs show an earlier pair's image, which gets their captions" in "".join(plan.notes)
    sample = plan.samples.sample_id(0)
    assert sample.endswith("/0")
    expected = hash_ids(f"caption {row}" for row in (0, 2, 8))
    assert rows.listing.texts[rows.listing.captions[:3]].tolist() == expected.tolist()
