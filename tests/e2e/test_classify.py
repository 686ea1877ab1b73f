"""`protoclip classify`: by names, and by labelled images with calibrated probabilities."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pyarrow import csv

import protoclip
from protoclip.cli import main
from protoclip.evaluation.classify import METHODS, compare, find_temperature, learn
from protoclip.evaluation.features import Part
from protoclip.training.run import align
from testing import save_to_bytes, tiny_pairs
from tiny_align import changed
from tiny_hugging_face import save_siglip

LABELLED, ROWS = 90, 150


def blur(image: bytes, seed: int) -> bytes:
    """The image with a little noise, so that no two are equal."""
    pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB")).astype(int)
    noise = np.random.default_rng(seed).integers(-9, 10, pixels.shape)
    return save_to_bytes(Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8)))


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shapes, labelled by their colour, and others; of these one is damaged and one labelled."""
    folder, table = tmp_path_factory.mktemp("tables"), tiny_pairs(ROWS)
    kinds = [caption.split()[1] for caption in table["caption"].to_pylist()]
    images = [blur(image, row) for row, image in enumerate(table["image"].to_pylist())]
    images[-1], images[-2], kinds[-2] = b"no image", images[0], kinds[0]
    columns = {"image": images, "sample_id": [f"{row}" for row in range(ROWS)], "kind": kinds}
    pq.write_table(pa.table(columns).slice(0, LABELLED), folder / "labelled.parquet")
    pq.write_table(pa.table(columns).slice(LABELLED), folder / "others.parquet")
    (folder / "names.txt").write_text("red\n\ngreen\nblue \n", encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for all tests."""
    folder = tmp_path_factory.getbasetemp() / "cache of classify"
    monkeypatch.setenv("PROTOCLIP_CACHE", str(folder))


def run(capsys: Any, model: Any, tables: Path, out: Path) -> tuple[dict[str, Any], list[Any]]:
    words = ["classify", str(model), "--data", f"{tables}/others.parquet,class_column=kind"]
    words += ["--classes", f"{tables}/labelled.parquet,class_column=kind"]
    main([*words, "--out", str(out), "--json"])
    return json.loads(capsys.readouterr().out), csv.read_csv(out).to_pylist()


def test_labelled_images_choose_the_method_and_calibrate(tiny_run, tables, tmp_path, capsys):
    """An image that is labelled too is classified, and counts for no accuracy."""
    facts, rows = run(capsys, tiny_run, tables, tmp_path / "predictions.csv")
    assert (facts["images"], facts["unusable"]) == (len(rows), 1) == (ROWS - LABELLED - 1, 1)
    assert (facts["labelled_too"], facts["accuracy"]["images"]) == (1, len(rows) - 1)
    accuracies = {name: record["accuracy"] for name, record in facts["validated"].items()}
    assert tuple(accuracies) == METHODS
    assert accuracies[facts["method"]] == max(accuracies.values())
    right = [row["prediction"] == row["class"] for row in rows if row["sample_id"] != ROWS - 2]
    own, (low, high) = facts["accuracy"]["accuracy"], facts["accuracy"]["interval"]
    assert own == pytest.approx(np.mean(right))
    assert low < own <= high
    assert own > 0.9
    assert facts["mean_probability"] == pytest.approx(own, abs=0.1)
    assert all(0 < row["probability"] <= 1 for row in rows)


def test_a_class_of_one_image_is_left_out_and_a_misfiled_image_is_found(
    tiny_run, tables, tmp_path, capsys
):
    """Labelled images are classified without themselves, and their share is that of
    cross-validation; images of a class that was left out count for no accuracy."""
    table = pq.read_table(tables / "labelled.parquet")
    kinds = table["kind"].to_pylist()
    wrong = {"red": "blue", "green": "blue", "blue": "red"}[kinds[5]]
    kinds[2], kinds[3], kinds[5], given = "mauve", "violet", wrong, kinds[5]
    changed_kinds = table.drop_columns(["kind"]).append_column("kind", pa.array(kinds))
    pq.write_table(changed_kinds, tmp_path / "shop.parquet")
    shop = f"{tmp_path}/shop.parquet,class_column=kind"
    out = tmp_path / "predictions.csv"
    main(
        ["classify", str(tiny_run), "--data", shop, "--classes", shop, "--out", str(out), "--json"]
    )
    said = capsys.readouterr()
    lack = "2 classes with fewer than two different images are left out, such as mauve, violet"
    assert f"{lack}\n" in said.err
    assert "accuracy leaves out 2 images of other classes, such as 'mauve'\n" in said.err
    facts, rows = json.loads(said.out), csv.read_csv(out).to_pylist()
    assert (len(rows), facts["labelled_too"], facts["accuracy"]) == (LABELLED, LABELLED, None)
    assert rows[5]["prediction"] == given
    right = [row["prediction"] == row["class"] for row in rows]
    share = facts["validated"][facts["method"]]["accuracy"]
    assert sum(right) / (LABELLED - 2) == pytest.approx(share)


def test_names_alone_need_no_labels(tiny_run, tables, tmp_path, capsys):
    """Neither of the images nor of others; without labels no accuracy is printed."""
    out = tmp_path / "predictions.parquet"
    words = ["classify", str(tiny_run), "--data", f"{tables}/others.parquet"]
    main([*words, "--classes", f"{tables}/names.txt", "--out", str(out)])
    table = pq.read_table(out)
    assert table.column_names == ["sample_id", "prediction", "probability"]
    assert {*table["prediction"].to_pylist()} <= {"red", "green", "blue"}
    assert table["probability"].to_numpy().min() >= 1 / 3
    assert capsys.readouterr().out.startswith(f"{ROWS - LABELLED - 1} images by names")

    (tmp_path / "few.txt").write_text("green\nblue\n")
    words[3] += ",class_column=kind"
    main([*words, "--classes", f"{tmp_path}/few.txt", "--out", str(tmp_path / "few.csv")])
    assert "images of other classes, such as 'red'" in capsys.readouterr().err


def test_any_model_that_is_opened_classifies(given, tables, tmp_path, capsys):
    """A run of `align` and its export, as ours and as open_clip's, agree; so does a model of the
    hub that is in a folder."""
    align(changed(given, tmp_path / "run"))
    protoclip.export(tmp_path / "run", tmp_path / "exported")
    save_siglip(tmp_path / "siglip")
    models = [f"{tmp_path}/run", f"{tmp_path}/exported", f"local-dir:{tmp_path}/exported"]
    found = [
        run(capsys, model, tables, tmp_path / f"{number}.csv")[1]
        for number, model in enumerate([*models, f"hf:{tmp_path}/siglip"])
    ]
    for rows in found[1:3]:
        assert [row["prediction"] for row in rows] == [row["prediction"] for row in found[0]]
        chances = [[row["probability"] for row in some] for some in (rows, found[0])]
        assert chances[0] == pytest.approx(chances[1], abs=0.02)
    assert [row["class"] for row in found[3]] == [row["class"] for row in found[0]]


def test_a_folder_of_a_folder_a_class_is_labelled_images(tiny_run, tables, tmp_path, capsys):
    """Images in a folder, without captions or classes, are classified by them."""
    images = pq.read_table(tables / "labelled.parquet").to_pylist()
    for row in images[:40]:
        (tmp_path / "known" / row["kind"]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "known" / row["kind"] / f"{row['sample_id']}.png").write_bytes(row["image"])
    (tmp_path / "new").mkdir()
    for row in images[40:60]:
        (tmp_path / "new" / f"{row['sample_id']}.png").write_bytes(row["image"])
    out = tmp_path / "predictions.csv"
    words = ["classify", str(tiny_run), "--data", f"{tmp_path}/new"]
    main([*words, "--classes", f"{tmp_path}/known", "--out", str(out)])
    kinds = {row["sample_id"]: row["kind"] for row in images}
    right = [
        row["prediction"] == kinds[Path(str(row["sample_id"])).stem]
        for row in csv.read_csv(out).to_pylist()
    ]
    assert len(right) == 20
    assert sum(right) >= 18
    assert "linear probe" in capsys.readouterr().out


def test_means_are_those_of_centred_unit_rows():
    draws = torch.Generator().manual_seed(0)
    train, rows = torch.randn(12, 5, generator=draws), torch.randn(4, 5, generator=draws)
    labels = torch.arange(12) % 3
    logits = compare("means", train, labels, rows, torch.zeros(3, 5))
    centre = train.double().mean(0)
    centred = [(each.double() - centre) / (each.double() - centre).norm() for each in train]
    for row, made in zip(rows.double(), logits, strict=True):
        row = (row - centre) / (row - centre).norm()
        for number in range(3):
            own = [each for each, label in zip(centred, labels, strict=True) if label == number]
            mean = torch.stack(own).mean(0)
            assert float(made[number]) == pytest.approx(-float(((row - mean) ** 2).sum()), abs=1e-5)


def test_votes_become_probabilities_and_none_is_0():
    """Of three equal neighbours two are of a class; a hundredth is divided among all three."""
    train, rows = torch.eye(4)[[0, 0, 0]], torch.eye(4)[[0]]
    logits = compare("knn", train, torch.tensor([0, 0, 2]), rows, torch.zeros(3, 4))
    expected = np.array([2 / 3, 0, 1 / 3]) + 0.01 / 3
    np.testing.assert_allclose(logits.exp().numpy()[0], expected, rtol=1e-5)


def test_copies_of_an_image_do_not_choose_a_method():
    """Random features tell nothing of random labels; with each image there four times, its copies
    would."""
    draws = torch.Generator().manual_seed(0)
    content = torch.arange(60).repeat(4)
    features = F.normalize(torch.randn(60, 8, generator=draws), dim=1)[content]
    part = Part(
        features=features,
        ids=[f"{row}" for row in range(240)],
        bad=[],
        total=240,
        labels=(torch.arange(60) % 3)[content],
        groups=torch.arange(240),
        content=content.tolist(),
        captions=None,
        names=None,
    )
    texts = F.normalize(torch.randn(3, 8, generator=draws), dim=1)
    logits, best, records = learn(part, torch.arange(3), texts, part)
    assert max(record["accuracy"] for record in records.values()) < 0.6
    right = float((logits.argmax(1) == part.labels).double().mean())
    assert right == pytest.approx(records[best]["accuracy"])  # no image finds itself
    assert records["knn"]["interval"][1] - records["knn"]["interval"][0] > 0.15  # of 60, not 240


def test_the_temperature_makes_probabilities_those_of_the_labels():
    """Logits that are twenty times too large, and few images that are all right."""
    draws = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 3, generator=draws)
    labels = torch.multinomial(logits.softmax(1), 1, generator=draws)[:, 0]
    assert find_temperature(20 * logits, labels) == pytest.approx(20, rel=0.15)
    few = 5 * torch.eye(3)[labels[:6]]
    assert (few / find_temperature(few, labels[:6])).softmax(1).max() < 0.99
