"""`encode.engine` in the commands that encode images: other libraries, the same results."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import protoclip
from protoclip.cli import main
from protoclip.encode.encoder import Encoder
from testing import run_distributed
from tiny_align import tiny_alignment

pytest.importorskip("onnxruntime")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))


def read_vectors(path: Path) -> np.ndarray:
    return np.stack(pq.read_table(path)["image_vector"].to_pylist())


def embed(model: Path, data: str, out: Path) -> None:
    protoclip.embed(model, data, out, batch_size=10, engine="onnx")


def test_embed_and_evaluate_give_what_pytorch_gives(tiny_run, tiny_parquet, tmp_path, capsys):
    """A finished file is left as it is, whatever the engine; two ranks make the file of one."""
    records = {}
    for engine in ("torch", "onnx"):
        words = f"evaluate {tiny_run} --data {tiny_parquet} --tasks retrieval --no-cache --json"
        main([*words.split(), "--engine", engine])
        records[engine] = json.loads(capsys.readouterr().out)[0]["metrics"]
        protoclip.embed(tiny_run, tiny_parquet, tmp_path / f"{engine}.parquet", engine=engine)
    assert records["onnx"] == pytest.approx(records["torch"], abs=0.02)
    plain, fast = (read_vectors(tmp_path / f"{engine}.parquet") for engine in ("torch", "onnx"))
    np.testing.assert_allclose(fast, plain, atol=5e-4)
    assert len(list((tmp_path / "cache" / "engines").rglob("model.onnx"))) == 2  # by their keys

    capsys.readouterr()
    protoclip.embed(tiny_run, tiny_parquet, tmp_path / "onnx.parquet", engine="torch")
    assert "is finished" in capsys.readouterr().err
    run_distributed(embed, 2, tiny_run, tiny_parquet, tmp_path / "two.parquet")
    np.testing.assert_allclose(read_vectors(tmp_path / "two.parquet"), plain, atol=5e-4)


def test_align_finds_what_another_engine_encoded(tmp_path, monkeypatch):
    """The store is that of the encoder; it lists the engine that made rows.

    So does that of the run's own evaluation, of images and of captions.
    """
    settings = tiny_alignment(tmp_path)
    settings["align"] |= {"features": str(tmp_path / "features")}
    settings["run"] |= {"out": str(tmp_path / "first"), "evaluate": True}
    first = protoclip.align({**settings, "encode": {"engine": "onnx"}})
    listed = [path.read_text() for path in (tmp_path / "features").rglob("engines.txt")]
    assert [line.split()[0] for line in listed] == ["onnxruntime"] * 3

    def encode(self, inputs, before=Encoder.encode):
        assert inputs is self.examples or len(inputs) == 1
        return before(self, inputs)

    monkeypatch.setattr(Encoder, "encode", encode)
    settings["run"] |= {"out": str(tmp_path / "second")}
    settings["run"] |= {"evaluate": False}
    protoclip.align({**settings, "encode": {"engine": "torch"}})
    assert first is not None
