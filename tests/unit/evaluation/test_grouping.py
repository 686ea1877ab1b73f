"""Measures of grouping against slow restatements, and `protoclip analyze` on a tiny run."""

import json
import math
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import adjusted_mutual_info_score

from interrupting import with_changes
from protoclip.cli import main
from protoclip.cli.analyze import Analyze
from protoclip.config import DataConfig
from protoclip.data.pairs import ImageTextPairs
from protoclip.evaluation import analysis, analysis_figure, datasets, grouping, retrieval
from protoclip.evaluation.datasets import EvaluationData, Split
from protoclip.training.run import train
from protoclip.training.run_folder import to_toml
from testing import tiny_config, tiny_pairs

BOTH = ("image", "text")


def unit(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)))


def blocks(groups: torch.Tensor, seed: int) -> torch.Tensor:
    """Unit-norm rows that lie together if they are in one group."""
    centres = unit(int(groups.max()) + 1, 32, seed)
    return F.normalize(centres[groups] + 0.01 * unit(len(groups), 32, seed + 1))


def test_spread_is_0_for_one_point_and_1_for_opposite_ones():
    assert grouping.spread(unit(1, 8).repeat(5, 1)) == pytest.approx(0, abs=1e-6)
    assert grouping.spread(torch.cat([unit(4, 8), -unit(4, 8)])) == pytest.approx(1)


@pytest.mark.parametrize("chunk", [1, 200, 4_000_000])
def test_neighbours_in_group_against_a_loop(chunk, monkeypatch):
    monkeypatch.setattr(retrieval, "CHUNK", chunk)
    rows, groups = unit(40, 6), torch.arange(40) % 3
    shares = []
    for row in range(40):
        order = sorted(range(40), key=lambda other: -float(rows[row] @ rows[other]))
        nearest = [other for other in order if other != row][:4]
        shares.append(np.mean([groups[other] == groups[row] for other in nearest]))
    found = grouping.neighbours_in_group(grouping.nearest_others(rows, 4), groups)
    assert found == pytest.approx(np.mean(shares))


def test_chance_is_the_share_of_pairs_in_one_group():
    groups = torch.tensor([0, 0, 0, 1, 1, 3])
    same = [groups[i] == groups[j] for i in range(6) for j in range(6) if i != j]
    assert grouping.same_group_by_chance(groups) == pytest.approx(np.mean(same))
    # Neighbours in a space that knows nothing of the groups do no better.
    groups = torch.arange(900) % 3
    found = grouping.neighbours_in_group(grouping.nearest_others(unit(900, 16)), groups)
    assert found == pytest.approx(grouping.same_group_by_chance(groups), abs=0.03)


def test_group_sizes_count_dead_groups():
    found = grouping.group_sizes(torch.tensor([0, 0, 0, 2]), 4)
    assert found == {"number": 4, "dead": 2, "smallest": 0, "median": 0.5, "largest": 3}


@pytest.mark.parametrize("together", [True, False])
def test_modalities_agree_if_they_group_alike(together):
    """Both modalities are in six clear groups: the same ones, or others that know nothing of them.

    Six far groups in each of two unrelated spaces are no alignment, so recall stays at chance.
    """
    generator = torch.Generator().manual_seed(0)
    image_groups = torch.arange(300) % 6
    shuffled = image_groups[torch.randperm(300, generator=generator)]
    text_groups = image_groups if together else shuffled
    found, groups = grouping.measure(
        blocks(image_groups, 1),
        blocks(text_groups, 5),
        num_groups=6,
        captions=[str(row) for row in range(300)],
        classes=image_groups,
    )
    assert found["classes/image"] == pytest.approx(1)
    expected = adjusted_mutual_info_score(image_groups.numpy(), text_groups.numpy())
    assert found["agreement"] == pytest.approx(expected, abs=1e-9)
    assert found["classes/text"] == pytest.approx(expected, abs=1e-9)
    for modality in BOTH:
        share, chance = (
            found[f"{name}/{modality}"] for name in ("neighbours", "neighbours_by_chance")
        )
        assert share == pytest.approx(1 if together else chance, abs=0.05)
        assert found[f"groups/smallest/{modality}"] == 50
        assert groups[modality].shape == (grouping.CLUSTERINGS, 300)
    assert found["recall@10/image_to_text"] < 0.2
    assert "stability/image" not in found


def test_equal_captions_match_each_other():
    texts = unit(6, 8).repeat_interleave(20, dim=0)
    images = F.normalize(texts + 0.1 * unit(120, 8, seed=1))
    settings = {"num_groups": 4, "seed": 0}
    found, _ = grouping.measure(
        images, texts, captions=[str(row // 20) for row in range(120)], **settings
    )
    assert found["recall@10/image_to_text"] == 1


def test_a_copy_of_an_image_is_that_image():
    """It takes no place among the best ten."""
    images, texts, names = unit(120, 8, seed=1), unit(120, 8), [str(row // 2) for row in range(120)]
    settings = {"num_groups": 4, "seed": 0}
    found, _ = grouping.measure(images, texts, captions=names, **settings)
    twice = [of.repeat(2, 1) for of in (images, texts)]
    content = [*range(120)] * 2
    copied, _ = grouping.measure(*twice, captions=names * 2, content=content, **settings)
    for way in ("image_to_text", "text_to_image"):
        assert 0 < copied[f"recall@10/{way}"] == found[f"recall@10/{way}"] < 1


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
    found = analysis.analyze(
        runs / "proto", data=DataConfig(train="emoji"), device=torch.device("cpu")
    )
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
    held_out = analysis.HeldOut(
        name="tiny",
        images=[pairs.encoded(row) for row in range(20)],
        captions=[pairs.sample_captions(row)[0] for row in range(20)],
        classes=None,
        skipped=0,
    )
    cpu = torch.device("cpu")
    first, last = (
        analysis.embed(path, held_out, project=False, device=cpu)["features"]
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
    cpu, read = torch.device("cpu"), analysis.Reader.read
    rows, found = [], []
    monkeypatch.setattr(
        analysis.Reader, "read", lambda self, row: rows.append(row) or read(self, row)
    )
    for size in (1 << 31, 0):
        rows.clear()
        monkeypatch.setattr(analysis, "KEPT_BYTES", size)
        monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / str(size)))  # or none are read again
        data = DataConfig(train=str(runs / "held_out.parquet"))
        found.append(analysis.analyze(runs / "proto", data=data, device=cpu))
        assert len(rows) == found[-1]["pairs"] * (1 if size else 3)
    assert found[0] == found[1]


def test_the_command_writes_files_and_figures(runs, tmp_path, capsys):
    folders, data = [str(runs / "proto"), str(runs / "clip")], str(runs / "held_out.parquet")
    main(["analyze", *folders, "--data", data, "--out", str(tmp_path), "--json"])
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert [analysis["name"] for analysis in found] == ["tiny", "CLIP"]
    assert json.loads((tmp_path / "clip.json").read_text()) == found[1]
    assert "projections" not in found[1]["checkpoints"][0]  # CLIP's heads are not trained
    assert f"{runs / 'clip'}: a single checkpoint" in shown.err
    assert f"{runs / 'clip'}: only {found[1]['pairs']} pairs" in shown.err
    for name in ("proto", "clip", "analysis_of_runs"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("folders", "stems"),
    [
        ("x/a/clip x/b/clip x/clip-2", "clip clip-3 clip-2"),
        ("clip-2 a/clip b/clip c/clip", "clip-2 clip clip-3 clip-4"),
        ("a/analysis_of_runs b", "analysis_of_runs-2 b"),
        ("analysis_of_runs analysis_of_runs-2", "analysis_of_runs-3 analysis_of_runs-2"),
    ],
)
def test_no_two_runs_share_a_file_and_none_has_that_of_the_common_figure(folders, stems, tmp_path):
    command = Analyze(folders.split(), out="out")
    written = command.stems([tmp_path / name for name in folders.split()])
    assert [path.as_posix() for path in written] == [f"out/{stem}" for stem in stems.split()]


def test_a_digest_is_equal_for_equal_pairs_alone():
    """Their order and the name of their data do not count."""
    common = {"classes": None, "skipped": 0}
    pairs = analysis.HeldOut(name="a", images=[b"1", b"2"], captions=["x", "y"], **common)
    turned = analysis.HeldOut(name="b", images=[b"2", b"1"], captions=["y", "x"], **common)
    others = [
        replace(pairs, captions=["y", "x"]),
        replace(pairs, images=[b"1", b"3"]),
        replace(pairs, images=[b"1"], captions=["x"]),
    ]
    assert pairs.digest == turned.digest
    assert len({pairs.digest, *(other.digest for other in others)}) == 4


def test_runs_on_other_pairs_of_one_name_are_told(runs, tmp_path, capsys, monkeypatch):
    """All runs that hold out pairs of their own call these `validation`."""
    monkeypatch.setitem(sys.modules, "protoclip.evaluation.analysis_figure", None)  # takes seconds
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


@pytest.mark.parametrize("words", ["{table},root={images}", "{table} --root {images}"])
def test_images_of_a_table_may_lie_elsewhere(words, runs, tmp_path, capsys):
    images, table = tmp_path / "images", tmp_path / "pairs.tsv"
    images.mkdir()
    rows = ["bild\ttitel"]
    for number, image in enumerate(tiny_pairs(12)["image"].to_pylist()):
        (images / f"{number}.png").write_bytes(image)
        rows.append(f"{number}.png\tcaption {number}")
    table.write_text("\n".join(rows))
    given = words.format(table=table, images=images).split()
    columns = ["--image_column", "bild", "--caption_column", "titel"]
    out = ["--out", str(tmp_path / "out"), "--json"]
    main(["analyze", str(runs / "clip"), "--data", *given, *columns, *out])
    assert json.loads(capsys.readouterr().out)[0]["pairs"] == 12


def test_an_error_of_several_runs_names_the_run(runs, tmp_path, capsys):
    """Once, also where it is a message of the run's folder."""
    folders = [str(runs / name) for name in ("proto", "clip")]
    few = ["--data", str(runs / "held_out.parquet"), "--samples", "9"]
    for words, said in ((few, ": held_out.parquet: 9 pairs"), ([], ": no pairs are held out")):
        with pytest.raises(SystemExit):
            main(["analyze", *folders, *words, "--out", str(tmp_path)])
        assert f"error: {folders[0]}{said}" in capsys.readouterr().err


def test_each_run_looks_different():
    """Also where the colours come again."""
    values = {"agreement": 0.5, "gap": 0.5} | dict.fromkeys(analysis_figure.RECALL, 0.5)
    run = {"checkpoints": [{"samples": 1, "features": values}]}
    figure = analysis_figure.runs_figure([run] * 9, [f"run {number}" for number in range(9)])
    for axes in figure.axes:
        assert len({(line.get_color(), line.get_marker()) for line in axes.lines}) == 9


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


def test_without_matplotlib_the_numbers_are_there(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "protoclip.evaluation.analysis_figure", None)
    data = str(runs / "held_out.parquet")
    main(["analyze", str(runs / "clip"), "--data", data, "--out", str(tmp_path)])
    shown = capsys.readouterr()
    assert "agreement" in shown.out
    assert "pip install 'protoclip[figures]'" in shown.err
    assert [path.name for path in tmp_path.iterdir()] == ["clip.json"]


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ("config.toml", "", "not a run folder, which has a config.toml"),
        ("checkpoints", "", "no checkpoint to analyse; train with --run.save_steps"),
        ("", "", "no pairs are held out; name some with --data"),
        ("", "--data {runs}/held_out.parquet --samples 9", "9 pairs are too few; needs 10"),
        ("", "--data {runs}/held_out.parquet --groups 1", "1 groups: choose from 2 to 16"),
        ("", "--data {runs}/held_out.parquet --groups 17", "17 groups: choose from 2 to 16"),
        ("", "--data {runs}/nowhere.parquet", "nowhere.parquet"),
        ("", "--root {runs}", "--root: is for a table that --data names; leave it out"),
        ("", "--data emoji,root={runs}", "--root: is for a table that --data names"),
        ("", "--data {runs}/held_out.parquet,root=gone", "data.root: gone: no such folder"),
        ("", "--data {runs}/held_out.parquet,class_column=x", "leave out class_column"),
    ],
)
def test_errors_are_one_line(change, arguments, message, runs, tmp_path, capsys):
    """`change` is what the run folder lacks."""
    run = tmp_path / "run"
    shutil.copytree(runs / "clip", run, ignore=shutil.ignore_patterns(change))
    with pytest.raises(SystemExit) as ended:
        main(["analyze", str(run), *arguments.format(runs=runs).split()])
    lines = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert len(lines) == 1
    assert message in lines[0]
