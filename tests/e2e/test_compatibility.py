"""Runs that earlier versions stopped half-way (tests/fixtures/make.py), opened by this version."""

import json
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import protoclip
import tiny_tower  # noqa: F401 (timm knows it then)
from protoclip.cli import main
from protoclip.files import file_checksum
from protoclip.models.checkpoint import find_checkpoint
from testing import tiny_pairs

FIXTURES = Path(__file__).parents[1] / "fixtures"
VERSIONS = sorted(
    path.name.removeprefix("run-").removesuffix(".tar.xz") for path in FIXTURES.glob("run-*.tar.xz")
)
RESUME = "train --config run/config.toml --resume auto"


@pytest.fixture(autouse=True)
def without_onednn() -> Iterator[None]:
    """The tower of these runs has convolutions of 1x1 with stride 2 over four channels. On CPUs of
    AVX2, oneDNN of PyTorch 2.13 writes behind their memory in channels-last order, and the process
    aborts later; with eight channels it does not."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield


def unpack(version: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """The folders `run` and `data` of a version, in the current folder."""
    with tarfile.open(FIXTURES / f"run-{version}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    monkeypatch.chdir(folder)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_model_of_an_old_run_computes_the_same(version, monkeypatch, tmp_path):
    unpack(version, monkeypatch, tmp_path)
    then = json.loads((FIXTURES / f"run-{version}.json").read_text())
    pairs = tiny_pairs().slice(0, len(then["image"]))
    captions = pairs["caption"].to_pylist()
    opened = [Image.open(BytesIO(data)).convert("RGB") for data in pairs["image"].to_pylist()]

    model, transform, tokenizer = protoclip.load("run")
    protoclip.export("run", "out", ["open_clip"])
    exported, _, prepare = open_clip.create_model_and_transforms("local-dir:out")
    exported.eval()
    tokenize = open_clip.get_tokenizer("local-dir:out")
    with torch.inference_mode():
        for tried, image, text in ((model, transform, tokenizer), (exported, prepare, tokenize)):
            features = {
                "image": tried.encode_image(torch.stack([image(one) for one in opened])),
                "text": tried.encode_text(text(captions)),
            }
            for modality, computed in features.items():
                expected = torch.tensor(then[modality])
                torch.testing.assert_close(computed, expected, rtol=1e-4, atol=1e-5)

    pq.write_table(pairs, "pairs.parquet")
    (record,) = protoclip.evaluate(model, transform, tokenizer, "pairs.parquet", ["retrieval"])
    assert record["samples"] == len(pairs)
    main(["report", "run"])
    page = Path("report.html").read_text(encoding="utf-8")
    assert "not finished: step 6 of 16" in page


@pytest.mark.parametrize("version", VERSIONS)
def test_an_old_run_goes_on(version, monkeypatch, tmp_path, capsys):
    unpack(version, monkeypatch, tmp_path)
    main(RESUME.split())
    assert "going on from run/checkpoints/step-000000006, step 6\n" in capsys.readouterr().err
    assert find_checkpoint("run").name == "step-000000016"


@pytest.mark.parametrize("command", ["train --model.start run --run.out new", "export run out"])
def test_a_run_of_a_version_before_1_is_refused(command, monkeypatch, tmp_path, capsys):
    unpack(VERSIONS[0], monkeypatch, tmp_path)
    saved = find_checkpoint("run") / "model.json"
    saved.write_text(saved.read_text().replace(f'"{VERSIONS[0]}"', '"0.2.0"'))
    sums = saved.with_name("checksums.json")
    content = json.loads(sums.read_text()) | {"model.json": file_checksum(saved)}
    sums.write_text(json.dumps(content))
    with pytest.raises(SystemExit) as ended:
        main([*command.split()])
    assert ended.value.code == 2
    assert "written by protoclip 0.2.0; open it with protoclip 1.x" in capsys.readouterr().err
    assert not Path("new").exists()
    assert not Path("out").exists()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_new_run_starts_from_the_weights_of_an_old_one(version, monkeypatch, tmp_path):
    unpack(version, monkeypatch, tmp_path)
    words = "--model.start run --loss.strengths constant --run.out new --episodes.count 2"
    main(["train", "--config", "run/config.toml", *words.split(), "--episodes.locked_image", "0"])
    assert find_checkpoint("new").name == "step-000000008"
