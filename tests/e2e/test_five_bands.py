"""Images of five bands, and of more than 8 bits: train, evaluate, embed, load and export."""

import csv
import json
import shlex
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from timm.models import adapt_input_conv

import protoclip
from protoclip.cli import main
from protoclip.data.bands import read_values
from protoclip.training import plan

SETTINGS = """--model.image.name test_resnet --model.image.size 32 --model.embed_dim 16
    --model.text.context_length 8 --model.text.width 16 --model.text.layers 1
    --model.heads.hidden_dim 32 --model.heads.projection_dim 8
    --episodes.size 64 --episodes.count 3 --episodes.batch_size 16 --prototypes.number 8
    --run.device cpu --run.precision fp32 --data.validation 0.2"""

FEW = """--episodes.size 32 --episodes.count 1 --episodes.batch_size 16 --episodes.warm_up 0
    --episodes.locked_image 0 --prototypes.number 8 --run.device cpu --run.precision fp32"""


def write_images(folder: Path, channels: int, form: str, number: int = 120) -> Path:
    """Images with patches that are bright in one band, which captions name, in thousands."""
    generator, rows = np.random.default_rng(0), [("sample_id", "image", "caption")]
    for row in range(number):
        image = generator.normal(1000, 50, (24, 24, channels)).clip(0)
        image[..., row % channels] += 3000 * generator.integers(0, 2, (4, 4)).repeat(6, 0).repeat(
            6, 1
        )
        values, name = image.astype(np.uint16), f"{row}.{form}"
        if form == "npy":
            np.save(folder / name, image.astype(np.float32) if row % 2 else values)
        elif channels == 1:
            Image.fromarray(values[..., 0]).save(folder / name)
        else:
            pytest.importorskip("tifffile").imwrite(
                folder / name, np.moveaxis(values, -1, 0), photometric="minisblack"
            )
        rows.append((str(row), name, f"band {row % channels} number {row}"))
    with (folder / "bands.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder / "bands.csv"


def train(table: Path, run: Path, words: str = "") -> dict[str, float]:
    main(shlex.split(f"train --data.train {table} --run.out {run} {SETTINGS} {words}"))
    metrics: dict[str, float] = json.loads((run / "results.json").read_text())["metrics"]
    return metrics


@pytest.mark.parametrize("form", ["npy", "tif"])
def test_five_bands(form, tmp_path, capsys):
    """A run measures the ranges of the bands once; what reads its model afterwards has them."""
    table, run = write_images(tmp_path, 5, form), tmp_path / "run"
    metrics = train(table, run, "--model.image.channels 5 --data.augmentation light")
    assert "without changes of colour" in capsys.readouterr().err
    assert metrics["eval/validation/retrieval/text_to_image@10"] > 0
    model, transform, _ = protoclip.load(run)
    for low, high in transform.bands.ranges:
        assert 800 < low < 1000
        assert 3900 < high < 4200

    out = tmp_path / "vectors.parquet"
    main(["embed", str(run), "--data", str(table), "--out", str(out), "--device", "cpu"])
    vectors = pq.read_table(out)
    embedded = torch.tensor(vectors["image_vector"].to_pylist())
    array = read_values((tmp_path / f"7.{form}").read_bytes(), 5)[0]
    with torch.no_grad():  # from Python, an array is an image
        feature = model.encode_image(transform(array)[None], normalize=True)[0]
    expected = embedded[vectors["sample_id"].to_pylist().index("7")]
    torch.testing.assert_close(feature, expected, atol=2e-3, rtol=0)

    capsys.readouterr()
    words = ["evaluate", str(run), "--data", str(table), "--json", "--no-cache"]
    main([*words, "--tasks", "retrieval"])
    (record,) = json.loads(capsys.readouterr().out)
    assert (record["samples"], record["bad_share"]) == (120, 0)
    main(["data", "inspect", str(table), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (report["read"], report["formats"]) == (120, {"array": 120})


def test_a_run_that_goes_on_keeps_its_ranges(tmp_path, monkeypatch):
    """It measures none again, and ends as one that was not interrupted."""
    table, whole, run = write_images(tmp_path, 5, "npy", 60), tmp_path / "whole", tmp_path / "run"
    often = "--model.image.channels 5 --run.save_steps 4 --run.keep_checkpoints 9"
    train(table, whole, often)
    shutil.copytree(whole, run)
    (run / "results.json").unlink()
    *_, last = sorted((run / "checkpoints").glob("step-*"))
    shutil.rmtree(last)
    monkeypatch.setattr(plan, "measure_ranges", Mock(side_effect=AssertionError))
    train(table, run, f"{often} --resume auto")
    states = [protoclip.load(folder)[0].state_dict() for folder in (whole, run)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert protoclip.load(run)[1].bands == protoclip.load(whole)[1].bands


def test_onnx_holds_five_bands(tmp_path):
    table, run = write_images(tmp_path, 5, "npy", 60), tmp_path / "run"
    train(table, run, "--model.image.channels 5 --episodes.count 1 --episodes.warm_up 0")
    facts = protoclip.export(run, tmp_path / "exported", ["onnx", "open_clip", "hf", "timm"])
    assert [*facts["formats"]] == ["onnx"]
    assert {*facts["left_out"].values()} == {
        "it reads 8-bit RGB alone; onnx holds models of other images"
    }
    assert facts["differences"]["onnx"]["image"] < 1e-4
    model, transform, _ = protoclip.load(run)
    images = torch.stack([transform((tmp_path / f"{row}.npy").read_bytes()) for row in range(4)])
    graph = onnxruntime.InferenceSession(tmp_path / "exported" / "onnx" / "vision_model.onnx")
    (features,) = graph.run(None, {"pixel_values": images.contiguous().numpy()})
    with torch.no_grad():
        expected = model.encode_image(images)
    torch.testing.assert_close(torch.from_numpy(features), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_images_of_sixteen_bits(channels, tmp_path, capsys):
    """Scaled by what was measured, also in a model that starts from the run."""
    table, run = write_images(tmp_path, 1, "png"), tmp_path / "run"
    train(table, run, f"--model.image.channels {channels}" if channels == 1 else "")
    assert "images of more than 8 bits are scaled to 8, by band: 8" in capsys.readouterr().err
    bands = protoclip.load(run)[1].bands
    assert bands.channels == channels
    assert len({*bands.ranges}) == 1

    (tmp_path / "other").mkdir()
    other = write_images(tmp_path / "other", 1, "npy")
    start = f"train --data.train {other} --model.start {run} --run.out {tmp_path / 'after'} {FEW}"
    with pytest.raises(SystemExit):
        main(shlex.split(f"{start} --model.image.channels 5"))
    reason = {1: f"does not go with model.start = {run}, which has 1", 3: "no image fits"}
    assert reason[channels] in capsys.readouterr().err
    main(shlex.split(start))
    assert protoclip.load(tmp_path / "after")[1].bands == bands


def test_encoders_of_rgb_read_five_bands_in_align(tmp_path):
    """The first convolution is widened from trained weights, which then stay."""
    table, weights = write_images(tmp_path, 5, "npy"), tmp_path / "weights.pth"
    rgb, run = timm.create_model("test_resnet"), tmp_path / "run"
    torch.save(rgb.state_dict(), weights)
    words = f"""align --data.train {table} --run.out {run} --model.image.name test_resnet
        --model.image.weights {weights} --model.image.channels 5 --model.image.size 32
        --model.text.name minilm --run.device cpu --data.validation 0.2"""
    main(shlex.split(words))
    model, transform, _ = protoclip.load(run)
    assert transform.bands.channels == 5
    first = model.towers.visual.trunk.conv1[0].weight
    torch.testing.assert_close(first, adapt_input_conv(5, rgb.conv1[0].weight))


def test_a_tower_without_a_first_convolution_is_refused(tmp_path, capsys):
    table = write_images(tmp_path, 5, "npy", 40)
    words = f"train --data.train {table} --run.out {tmp_path / 'run'} --model.image.channels 5"
    with pytest.raises(SystemExit):
        main(shlex.split(f"{words} --model.image.name crossvit_9_240"))
    assert "crossvit_9_240 cannot read images of 5 channels" in capsys.readouterr().err
