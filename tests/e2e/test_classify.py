"""`protoclip classify`: by names, and by labelled images with calibrated probabilities."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import csv

from protoclip.cli import main
from protoclip.evaluation.classify import compare, find_temperature
from testing import tiny_pairs

LABELLED, ROWS = 90, 150


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shapes, labelled by their colour, and others; an image of these is damaged, and one of the
    labelled ones has a class of its own."""
    folder, table = tmp_path_factory.mktemp("tables"), tiny_pairs(ROWS)
    kinds = [caption.split()[1] for caption in table["caption"].to_pylist()]
    images = table["image"].to_pylist()
    kinds[0], images[-1] = "violet", b"no image"
    columns = {"image": images, "sample_id": [f"{row}" for row in range(ROWS)], "kind": kinds}
    pq.write_table(pa.table(columns).slice(0, LABELLED), folder / "labelled.parquet")
    pq.write_table(pa.table(columns).slice(LABELLED), folder / "others.parquet")
    (folder / "names.txt").write_text("red\n\ngreen\nblue \nred\n", encoding="utf-8")
    return folder


def test_labelled_images_choose_the_method_and_calibrate(
    tiny_run, tables, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "predictions.csv"
    words = ["classify", str(tiny_run), "--data", f"{tables}/others.parquet,class_column=kind"]
    words += ["--classes", f"{tables}/labelled.parquet,class_column=kind"]
    main([*words, "--out", str(out), "--json"])
    facts, rows = json.loads(capsys.readouterr().out), csv.read_csv(out).to_pylist()
    assert (facts["images"], facts["unusable"]) == (ROWS - LABELLED - 1, 1)
    *validated, own = facts["accuracies"].values()
    assert [*facts["accuracies"]][:4] == ["names", "means", "knn", "linear_probe"]
    assert facts["accuracies"][facts["method"]] == max(validated, key=lambda one: one["accuracy"])
    assert own["accuracy"] == np.mean([row["prediction"] == row["class"] for row in rows]) > 0.9
    assert own["interval"][0] < own["accuracy"] <= own["interval"][1]
    assert abs(facts["mean_probability"] - own["accuracy"]) < 0.1
    assert all(0 < row["probability"] <= 1 for row in rows)


def test_names_alone_need_no_labels(tiny_run, tables, tmp_path, capsys, monkeypatch):
    """Neither of the images nor of others. A name that comes twice is one class."""
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "predictions.parquet"
    words = ["classify", str(tiny_run), "--data", f"{tables}/others.parquet"]
    main([*words, "--classes", f"{tables}/names.txt", "--out", str(out)])
    table = pq.read_table(out)
    assert table.column_names == ["sample_id", "prediction", "probability"]
    assert {*table["prediction"].to_pylist()} <= {"red", "green", "blue"}
    assert table["probability"].to_numpy().min() >= 1 / 3
    assert capsys.readouterr().out.startswith(f"{ROWS - LABELLED - 1} images by names")


def test_a_table_without_classes_is_refused(tiny_run, tables, tmp_path, capsys):
    words = ["classify", str(tiny_run), "--data", f"{tables}/others.parquet"]
    with pytest.raises(SystemExit):
        main([*words, "--classes", f"{tables}/labelled.parquet", "--out", str(tmp_path / "a.csv")])
    assert "fewer than two classes; behind a table" in capsys.readouterr().err


def test_means_are_those_of_centred_unit_rows_and_a_class_without_images_is_impossible():
    draws = torch.Generator().manual_seed(0)
    train, rows = torch.randn(12, 5, generator=draws), torch.randn(4, 5, generator=draws)
    labels = torch.arange(12) % 3
    logits = compare("means", train, labels, rows, torch.zeros(4, 5))
    centre = train.double().mean(0)
    centred = [(each.double() - centre) / (each.double() - centre).norm() for each in train]
    for row, made in zip(rows.double(), logits, strict=True):
        row = (row - centre) / (row - centre).norm()
        for number in range(3):
            own = [each for each, label in zip(centred, labels, strict=True) if label == number]
            mean = torch.stack(own).mean(0)
            assert float(made[number]) == pytest.approx(-float(((row - mean) ** 2).sum()), abs=1e-5)
    assert (logits[:, 3] == -torch.inf).all()


def test_the_temperature_makes_probabilities_those_of_the_labels():
    """Logits that are twenty times too large, and few images that are all right."""
    draws = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 3, generator=draws)
    labels = torch.multinomial(logits.softmax(1), 1, generator=draws)[:, 0]
    assert find_temperature(20 * logits, labels) == pytest.approx(20, rel=0.15)
    few = 5 * torch.eye(3)[labels[:6]]
    assert (few / find_temperature(few, labels[:6])).softmax(1).max() < 0.99
