"""The checkpoints of a tiny run, measured by `protoclip analyze`."""

import json
import math
import re
import shutil
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch

from interrupting import with_changes
from protoclip.cli import main
from protoclip.config import DataConfig
from protoclip.data.pairs import ImageTextPairs
from protoclip.evaluation import datasets
from protoclip.evaluation.datasets import EvaluationData, Split
from protoclip.results import examples
from protoclip.results.checkpoints import analyze_run, choose_files
from protoclip.results.examples import Examples, embed_checkpoint
from protoclip.training.run import train
from protoclip.training.run_folder import to_toml
from testing import tiny_config, tiny_pairs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with three checkpoints, the last one called a CLIP run, and held-out pairs."""
    folder = tmp_path_factory.mktemp("analyze")
    pq.write_table(tiny_pairs(seed=1), folder / "train.parquet")
    pq.write_table(tiny_pairs(80, seed=2), folder / "held_out.parquet")
    config = tiny_config(str(folder / "train.parquet"), out=str(folder / "proto"))
    often = {"run": {"save_steps": 4, "keep_checkpoints": 9}, "episodes": {"count": 3}}
    train(with_changes(config, often))
    old = shutil.ignore_patterns("step-000000004", "step-000000008")
    shutil.copytree(folder / "proto", folder / "clip", ignore=old)
    clip = with_changes(config, {"run": {"name": "CLIP"}, "loss": {"prototypical": 0.0}})
    (folder / "clip" / "config.toml").write_text(to_toml(clip))
    return folder


def test_analysis_of_a_run(runs, monkeypatch):
    """Every checkpoint is measured, and the run's own prototypes where it has some."""
    pairs = ImageTextPairs(tiny_pairs(80, seed=2), name="tiny")
    captions = [pairs.sample_captions(row) for row in range(80)]
    names = sorted({texts[0] for texts in captions})
    labels = datasets.positions((texts[0] for texts in captions), names)
    split = Split(images=pairs, captions=captions, labels=labels)
    emoji = EvaluationData(name="emoji", splits={"validation": split}, class_names=names)
    monkeypatch.setattr(datasets, "emoji", lambda: emoji)
    found = analyze_run(runs / "proto", data=DataConfig(train="emoji"), device=torch.device("cpu"))
    assert {name: found[name] for name in ("name", "pairs", "groups", "skipped")} == {
        "name": "tiny",
        "pairs": 80,
        "groups": 8,
        "skipped": 0,
    }
    assert [entry["step"] for entry in found["checkpoints"]] == [4, 8, 12]
    assert [entry["samples"] for entry in found["checkpoints"]] == [64, 128, 192]
    for number, entry in enumerate(found["checkpoints"]):
        assert entry.keys() == {"step", "samples", "features", "projections"}
        for values in (entry["features"], entry["projections"]):
            assert all(math.isfinite(value) for value in values.values())
            assert ("stability/image" in values) == (number > 0)
            assert {"classes/image", "alignment", "gap"} <= values.keys()
        own = {name for name in entry["projections"] if name.startswith("prototypes/")}
        assert len(own) == (10 if number > 0 else 0)  # the warm-up has none


def test_features_are_those_of_the_checkpoint(runs):
    """Of another checkpoint they differ; of the same one they are the model's own outputs."""
    import protoclip

    table = tiny_pairs(20, seed=2)
    pairs = ImageTextPairs(table, name="tiny")
    held_out = Examples(
        name="tiny",
        images=[pairs.encoded(row) for row in range(20)],
        captions=[pairs.sample_captions(row)[0] for row in range(20)],
    )
    cpu = torch.device("cpu")
    first, last = (
        embed_checkpoint(path, held_out, project=False, device=cpu)["features"]
        for path in sorted((runs / "proto" / "checkpoints").iterdir())[::2]
    )
    model, transform, tokenizer = protoclip.load(runs / "proto")
    with torch.inference_mode():
        texts = model.encode_text(tokenizer(held_out.captions), normalize=True)
        images = model.encode_image(
            torch.stack([transform(pairs.image(row)) for row in range(20)]), normalize=True
        )
    torch.testing.assert_close(last["texts"], texts, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(last["images"], images, atol=1e-5, rtol=1e-4)
    assert (first["texts"] - texts).abs().max() > 1e-3


def test_images_are_decoded_once_for_all_checkpoints(runs, tmp_path, monkeypatch):
    """Unless they take too much memory; the analysis is the same."""
    cpu, read = torch.device("cpu"), examples.Reader.read
    rows, found = [], []
    monkeypatch.setattr(
        examples.Reader, "read", lambda self, row: rows.append(row) or read(self, row)
    )
    for size in (1 << 31, 0):
        rows.clear()
        monkeypatch.setattr(examples, "CACHE_BYTES", size)
        monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / str(size)))  # or none are read again
        data = DataConfig(train=str(runs / "held_out.parquet"))
        found.append(analyze_run(runs / "proto", data=data, device=cpu))
        assert len(rows) == found[-1]["pairs"] * (1 if size else 3)
    assert found[0] == found[1]


def test_the_command_writes_a_file_for_each_run(runs, tmp_path, capsys):
    folders, data = [str(runs / "proto"), str(runs / "clip")], str(runs / "held_out.parquet")
    main(["analyze", *folders, "--data", data, "--out", str(tmp_path), "--json"])
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert [analysis["name"] for analysis in found] == ["tiny", "CLIP"]
    assert json.loads((tmp_path / "clip.json").read_text()) == found[1]
    assert "projections" not in found[1]["checkpoints"][0]  # CLIP's heads are not trained
    assert f"{runs / 'clip'}: a single checkpoint" in shown.err
    assert f"{runs / 'clip'}: only {found[1]['pairs']} pairs" in shown.err


@pytest.mark.parametrize(
    ("folders", "stems"),
    [
        ("x/a/clip x/b/clip x/clip-2", "clip clip-3 clip-2"),
        ("clip-2 a/clip b/clip c/clip", "clip-2 clip clip-3 clip-4"),
    ],
)
def test_no_two_runs_share_a_file(folders, stems, tmp_path):
    files = choose_files([tmp_path / name for name in folders.split()], "out")
    assert [path.as_posix() for path in files] == [f"out/{stem}.json" for stem in stems.split()]


def test_a_digest_is_equal_for_equal_pairs_alone():
    """Their order and the name of their data do not count."""
    pairs = Examples(name="a", images=[b"1", b"2"], captions=["x", "y"])
    turned = Examples(name="b", images=[b"2", b"1"], captions=["y", "x"])
    others = [
        replace(pairs, captions=["y", "x"]),
        replace(pairs, images=[b"1", b"3"]),
        replace(pairs, images=[b"1"], captions=["x"]),
    ]
    assert pairs.digest == turned.digest
    assert len({pairs.digest, *(other.digest for other in others)}) == 4


def test_runs_on_other_pairs_of_one_name_are_told(runs, tmp_path, capsys):
    """All runs that hold out pairs of their own call these `validation`."""
    folders = []
    for number in (1, 2):
        folder = tmp_path / str(number)
        shutil.copytree(runs / "clip", folder)
        pq.write_table(tiny_pairs(80, seed=number), tmp_path / f"{number}.parquet")
        data = {"train": str(tmp_path / f"{number}.parquet"), "validation": 0.4}
        config = with_changes(tiny_config("", out=str(folder)), {"data": data})
        (folder / "config.toml").write_text(to_toml(config))
        folders.append(str(folder))
    said = "the runs differ in data or in the number of groups"
    for words, differ in ((folders, True), (folders[:1] * 2, False)):
        main(["analyze", *words, "--json", "--out", str(tmp_path / "out")])
        shown = capsys.readouterr()
        assert [each["data"] for each in json.loads(shown.out)] == ["validation"] * 2
        assert (said in shown.err) == differ


def test_images_of_a_table_may_lie_elsewhere(runs, tmp_path, capsys):
    images, table = tmp_path / "images", tmp_path / "pairs.tsv"
    images.mkdir()
    rows = ["bild\ttitel"]
    for number, image in enumerate(tiny_pairs(12)["image"].to_pylist()):
        (images / f"{number}.png").write_bytes(image)
        rows.append(f"{number}.png\tcaption {number}")
    table.write_text("\n".join(rows))
    data = f"{table},root={images},image_column=bild,caption_column=titel"
    out = ["--out", str(tmp_path / "out"), "--json"]
    main(["analyze", str(runs / "clip"), "--data", data, *out])
    assert json.loads(capsys.readouterr().out)[0]["pairs"] == 12


def test_an_error_of_several_runs_names_the_run(runs, tmp_path, capsys):
    """Once, also where it is a message of the run's folder."""
    folders = [str(runs / name) for name in ("proto", "clip")]
    few = ["--data", str(runs / "held_out.parquet"), "--samples", "9"]
    for words, said in ((few, ": held_out.parquet: 9 pairs"), ([], ": no pairs are held out")):
        with pytest.raises(SystemExit):
            main(["analyze", *folders, *words, "--out", str(tmp_path)])
        assert f"error: {folders[0]}{said}" in capsys.readouterr().err


def test_links_that_leave_the_root_are_followed_where_they_may_be(runs, tmp_path, capsys):
    """Else the message names the reason, and what allows it."""
    (tmp_path / "table").mkdir()
    rows = ["image\tcaption"]
    for number, image in enumerate(tiny_pairs(12)["image"].to_pylist()):
        (tmp_path / f"{number}.png").write_bytes(image)
        (tmp_path / "table" / f"{number}.png").symlink_to(tmp_path / f"{number}.png")
        rows.append(f"{number}.png\tcaption {number}")
    (tmp_path / "table" / "pairs.tsv").write_text("\n".join(rows))
    words = ["analyze", str(runs / "clip"), "--data", str(tmp_path / "table" / "pairs.tsv")]
    with pytest.raises(SystemExit):
        main([*words, "--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert re.search("0 pairs are too few; needs 10; 12 pairs of .*allow_links true follows", said)
    main([*words, "--out", str(tmp_path), "--data.allow_links", "true", "--json"])
    assert json.loads(capsys.readouterr().out)[0]["pairs"] == 12
