"""`protoclip align` where it meets other features of a run, other commands, and bad input."""

import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import protoclip
from protoclip import cli
from protoclip.config import DataConfig, SourceConfig
from protoclip.data import decode as decoding
from protoclip.encode import features
from protoclip.encode import run as running
from protoclip.encode.store import hash_ids
from protoclip.explore import atlas
from protoclip.models.projections import AlignedModel, FrozenEncoders
from protoclip.models.protoclip import ProtoCLIP, evaluation_transform
from protoclip.training.run import align
from testing import run_distributed, tiny_pairs
from tiny_align import (
    align_on_a_rank,
    assert_near,
    changed,
    of_source,
    rows_of,
    weights_of,
)


@pytest.mark.parametrize("kind", ["mixture", "shared", "shards", "without"])
def test_each_row_has_the_features_of_its_own_image_and_captions(kind, given, sources):
    """Of whatever source, with what is held out and left out."""
    plan, rows, model = rows_of(
        of_source(given, sources[kind], episodes={"size": 16, "batch_size": 8})
    )
    samples = plan.samples
    assert len(samples) == len(rows)
    transform = evaluation_transform(model)
    for row in (0, len(samples) // 2, len(samples) - 1):
        image = rows.image_rows(np.array([row])).float()
        whole = FrozenEncoders(model.eval().towers).visual(transform(samples.image(row))[None])
        np.testing.assert_allclose(image.numpy(), whole.detach().numpy(), atol=2e-3, rtol=2e-3)
        own = {*samples.sample_captions(row)}
        hashes = rows.listing.texts[rows.listing.captions[rows.all_captions(np.array([row]))]]
        assert {*hash_ids(sorted(own))} <= {*hashes}
        if kind != "shared":
            assert len(hashes) == len(own)


def test_a_mixture_is_aligned_from_end_to_end(given, sources, tmp_path):
    """With numbers by source and together, and those of classes where there are any."""
    results = align(of_source(given, sources["mixture"], run={"out": str(tmp_path / "run")}))
    assert len([name for name in results["metrics"] if name.endswith("image_to_text@1")]) == 3
    of_classes = [name for name in results["metrics"] if name.endswith("zero_shot/acc1")]
    assert of_classes == ["eval/validation-classes.parquet/zero_shot/acc1"]


def teacher_file(path: Path) -> str:
    features = np.random.default_rng(0).normal(size=(96, 12)).tolist()
    ids = [f"tiny/{number}" for number in range(96)]
    pq.write_table(pa.table({"sample_id": ids, "features": features}), path)
    return str(path)


def test_a_teacher_from_a_file_takes_the_place_of_an_encoder_or_stands_beside_it(given, tmp_path):
    file = teacher_file(tmp_path / "teacher.parquet")
    teachers = [
        {"name": "texts", "features": "text-half", "number": 4},
        {"name": "mine", "features": file, "number": 4},
    ]
    settings = {key: value for key, value in given.items() if key != "teacher"}
    align(changed({**settings, "teachers": teachers}, tmp_path / "run"))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert all(f"image_from_{name}" in lines for name in ("texts", "mine"))
    assert "image_half" not in lines


@pytest.fixture(scope="module")
def finished(given, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    align(changed(given, folder))
    return folder


def test_its_own_recipe_trains_the_same(finished, tmp_path, capsys):
    """The last line names where it is, and what to look at it with."""
    again = tmp_path / "again"
    cli.main(["align", "--config", f"{finished}/config.toml", "--run.out", str(again)])
    last = f"written to {again}; look at its pairs with protoclip explore {again}\n"
    assert capsys.readouterr().out.endswith(last)
    one, two = weights_of(finished), weights_of(again)
    assert all(value.equal(two[name]) for name, value in one.items())


def test_an_image_that_changed_on_disk_is_encoded_anew(given, sources, tmp_path, store):
    shutil.copytree(Path(sources["folder"]["train"]), tmp_path / "images")
    settings = of_source(
        given, {"train": str(tmp_path / "images")}, episodes={"size": 16, "batch_size": 8}
    )
    plan, before, _ = rows_of(settings)
    row = next(r for r in range(96) if plan.samples.where(r).endswith("/7.png"))
    shutil.copy(tmp_path / "images" / "8.png", tmp_path / "images" / "7.png")
    _, after, _ = rows_of(settings)
    same = (before.image_rows(np.arange(96)) == after.image_rows(np.arange(96))).all(1)
    assert np.flatnonzero(~same.numpy()).tolist() == [row]


def test_a_run_of_ranks_goes_on_with_another_number(given, finished, tmp_path):
    """And ends as one of one process, up to rounding."""
    cache = str(tmp_path / "cache")
    settings = changed(given, tmp_path / "run")
    run_distributed(align_on_a_rank, 2, settings, cache, "never", 7)
    assert not (tmp_path / "run" / "results.json").exists()
    run_distributed(align_on_a_rank, 1, settings, cache, "auto")
    assert_near(tmp_path / "run", finished)


def test_odd_pairs_are_scored_by_heads_that_have_not_seen_them(
    given, sources, tmp_path, monkeypatch
):
    """In a mixture with weights and classes; tests/unit/encode restates how. Pairs that the run was
    not trained on are scored by the model itself."""
    monkeypatch.setattr(atlas, "LEAST_IMAGES", 20)
    several = {"path": given["data"]["train"], "name": "several", "weight": 0.5}
    mixture = [*sources["mixture"]["sources"], several]
    run = tmp_path / "run"
    out = {"run": {"out": str(run)}, "episodes": {"size": 16, "count": 1, "batch_size": 8}}
    align(of_source(given, {"sources": mixture, "validation": 0.0}, **out))
    other = str(tmp_path / "other.parquet")
    pq.write_table(tiny_pairs(40, seed=3), other)
    for data, seen in (([], False), (["--data", other], True)):
        folder = tmp_path / f"pages-{seen}"
        cli.main(["explore", str(run), *data, "--map", "pca", "--static", str(folder)])
        page = (folder / "1" / "odd-loss.html").read_text()
        assert ("scored by heads that have not seen it" in page) != seen
        assert ("The model itself scores them" in page) == seen
        by = "distance" if seen else "loss"  # by which more wrong captions are found
        assert f'<a href="odd-{by}.html" aria-current="page">Odd ones out</a>' in page


def test_vectors_in_a_file_are_of_what_align_has_encoded(given, finished, tmp_path, monkeypatch):
    """In its precision. Other images and captions between them are encoded."""
    train = given["data"]["train"]
    others = tiny_pairs(4, seed=3)
    bad = pa.table({"image": [b"no image"], "caption": ["bad"], "sample_id": ["bad"]})
    more = tmp_path / "more.parquet"
    pq.write_table(pa.concat_tables([others, bad.cast(others.schema)]), more)
    decoded: list[int] = []
    decode = decoding.decode_crop
    monkeypatch.setattr(
        decoding, "decode_crop", lambda *a, **b: decoded.append(1) or decode(*a, **b)
    )

    def embedded(name: str, *data: Any, precision: Any = "fp32") -> pa.Table:
        decoded.clear()
        sources = DataConfig(sources=[SourceConfig(path=str(table)) for table in data])
        out = tmp_path / f"{name}.parquet"
        return pq.read_table(protoclip.embed(finished, sources, out, precision=precision))

    alone = embedded("alone", train)
    assert (len(alone), decoded) == (96, [])
    both = embedded("both", more, train)
    assert len(decoded) == 5
    embedded("rounded", train, more, precision="bf16")
    assert len(decoded) == 101
    embedded("rounded", train, more, precision="bf16")
    assert not decoded  # the file is finished
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "empty"))
    plain = embedded("plain", more, train)
    for column in plain.column_names:
        mine, its = both[column].to_pylist(), plain[column].to_pylist()
        if column == "text_vectors":
            mine, its = [*chain(*mine)], [*chain(*its)]
        if "vector" in column:
            np.testing.assert_allclose(np.stack(mine), np.stack(its), atol=1e-3)
        else:
            assert mine == its


def test_what_evaluated_a_run_passes_the_encoders_once(given, tmp_path, store, monkeypatch):
    """Of each checkpoint, of the model before training, and of a run with other heads.

    A run whose image encoder is another one encodes no caption that evaluates it.
    """
    run, encoded = tmp_path / "run", list[int]()
    encode_some = running.encode_some

    def watched(encoder: Any, inputs: Any, *given: Any) -> Any:
        encoded.append(len(inputs))
        return encode_some(encoder, inputs, *given)

    encode_numbers = features.encode_numbers

    def watch(*given: Any, **more: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(running, "encode_some", watched)
            return encode_numbers(*given, **more)

    monkeypatch.setattr(features, "encode_numbers", watch)
    for name in ("encode_image", "encode_text"):
        before = getattr(ProtoCLIP, name)

        def encode(self: Any, *given: Any, before: Any = before, **more: Any) -> Any:
            assert isinstance(self, AlignedModel)  # nothing passes the whole model
            return before(self, *given, **more)

        monkeypatch.setattr(ProtoCLIP, name, encode)
    align(changed(given, run, episodes={"count": 2}, run={"save_steps": 4}))
    data = given["data"]["validation"]
    made = sum(encoded)
    assert made == len(pq.read_table(data)) + len({*pq.read_table(data)["caption"].to_pylist()})
    checkpoints = sorted((run / "checkpoints").iterdir())
    assert len(checkpoints) == 2
    for checkpoint in checkpoints:
        cli.main(["evaluate", str(checkpoint), "--data", data, "--workers", "0"])
    cli.main(["analyze", str(run), "--json"])
    cli.main(["report", str(run), "--out", str(tmp_path / "report.html")])
    align(changed(given, tmp_path / "other", model={**given["model"], "embed_dim": 8}))
    assert sum(encoded) == made
    image = {**given["model"]["image"], "size": 64}
    align(changed(given, tmp_path / "larger", model={**given["model"], "image": image}))
    assert sum(encoded) == made + len(pq.read_table(data))
