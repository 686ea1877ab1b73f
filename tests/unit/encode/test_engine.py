"""The engines of image encoders on a CPU: the same features as PyTorch's, faster."""

import json
import sys
import tempfile
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from protoclip.data.access import cache_folder
from protoclip.data.pairs import Sample
from protoclip.data.transforms import EvaluationTransform
from protoclip.encode import engine as module
from protoclip.encode.encoder import Encoder, freeze, image_encoder, text_encoder
from protoclip.encode.engine import PACKAGES, accelerate
from protoclip.encode.run import encode_missing
from protoclip.encode.store import FULL, Store, hash_ids
from testing import tiny_pairs

CPU = torch.device("cpu")
NUMBER, SIZE = 30, 16


class Model(nn.Module):
    """A small convolutional net; a `fixed` one can only be traced for batches of one size."""

    def __init__(self, *, fixed: bool = False) -> None:
        super().__init__()
        self.fixed = fixed
        self.first, self.norm = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.last = nn.Linear(8 * 49, 12)

    def forward(self, images: Tensor) -> Tensor:
        rows = self.norm(self.first(images)).relu()
        return self.last(rows.reshape(len(rows), -1) if self.fixed else rows.flatten(1))


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    for name in ("SECONDS_TO_OPEN", "LEAST_PASSES"):
        monkeypatch.setattr(module, name, 0)
    monkeypatch.setattr(module, "SECONDS_FOR_TRIALS", dict.fromkeys(("image", "text"), 0))


def make_encoder(engine: Any, *, fixed: bool = False, **settings: Any) -> Encoder:
    torch.manual_seed(0)
    model = freeze(Model(fixed=fixed), CPU)
    transform = EvaluationTransform(size=SIZE, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    return image_encoder(model, CPU, model, transform, engine=engine, **settings)


def encode_pairs(encoder: Encoder, folder: Path | None = None) -> np.ndarray:
    """Features of tiny pairs, in batches of 4 of which the last is smaller."""
    folder = folder or Path(tempfile.mkdtemp(dir=cache_folder().parent))
    images = tiny_pairs(NUMBER)["image"].to_pylist()
    store, hashes = Store(folder, dtype=FULL), hash_ids(map(str, range(NUMBER)))

    def read(row: int) -> Sample:
        return Sample(sample_id=str(row), image=images[row], captions=(), where="")

    assert encode_missing(store, encoder, hashes, read, batch_size=4) == {}
    return store.read(store.find(hashes))


def needs(engine: str) -> None:
    if not all(map(find_spec, PACKAGES[engine])):  # nothing is imported
        pytest.skip(f"needs {PACKAGES[engine]}")


def list_cache() -> list[str]:
    """The names of files except locks."""
    return sorted(path.name for path in cache_folder().rglob("*.*") if path.suffix != ".lock")


@pytest.mark.parametrize("engine", PACKAGES)
@pytest.mark.parametrize("unit_norm", [True, False])
def test_an_engine_gives_the_features_of_pytorch(engine, unit_norm, tmp_path):
    """By the same key; the store says what made them."""
    needs(engine)
    plain, fast = (make_encoder(name, unit_norm=unit_norm) for name in ("torch", engine))
    expected = encode_pairs(plain, tmp_path / "torch")
    np.testing.assert_allclose(encode_pairs(fast, tmp_path / "fast"), expected, atol=1e-5)
    assert plain.key() == fast.key()
    assert not (tmp_path / "torch" / "engines.txt").exists()
    assert (tmp_path / "fast" / "engines.txt").read_text().startswith(PACKAGES[engine][-1])
    assert sys.modules.get("openvino_telemetry") is None  # nothing is sent


def test_the_fastest_is_taken_once_and_for_all(monkeypatch, capsys):
    """Later passes time nothing. If PyTorch is nearly as fast it stays, and nothing is kept."""
    needs("onnx")
    monkeypatch.setattr(module, "PACKAGES", {"onnx": PACKAGES["onnx"]})
    rates = iter([100.0, 120.0])
    monkeypatch.setattr(module, "measure_rate", lambda *_: next(rates))
    first = encode_pairs(make_encoder("auto"))
    assert "engine onnx (images a second: torch 100, onnx 120)" in capsys.readouterr().err
    assert np.array_equal(encode_pairs(make_encoder("auto")), first)
    assert "note" not in capsys.readouterr().err
    folder = next((cache_folder() / "engines").iterdir())
    assert list_cache() == ["choice.json", "model.onnx"]
    assert json.loads((folder / "choice.json").read_text())["engine"] == "onnx"

    (folder / "choice.json").unlink()
    rates = iter([100.0, 109.0])
    assert np.array_equal(encode_pairs(make_encoder("auto")), encode_pairs(make_encoder("torch")))
    assert list_cache() == ["choice.json"]


def test_an_engine_that_differs_is_not_used(monkeypatch, capsys):
    """With a note, and with the same bits."""
    needs("onnx")
    expected = encode_pairs(make_encoder("torch"))

    def open_wrong(*arguments: Any) -> Any:
        run = module.open_onnx(*arguments)
        return lambda inputs: run(inputs) + 1e-3

    monkeypatch.setitem(module.OPENERS, "onnx", open_wrong)
    assert np.array_equal(encode_pairs(make_encoder("onnx")), expected)
    assert "engine onnx is not used (it differs from PyTorch by" in capsys.readouterr().err


def test_a_model_that_no_engine_can_run_stays_with_pytorch(capsys):
    """With a note, also where the setting names the engine."""
    needs("onnx")
    encoder = make_encoder("onnx", fixed=True, name="mine")
    assert np.array_equal(encode_pairs(encoder), encode_pairs(make_encoder("torch")))
    assert "note: mine: engine onnx is not used ([ONNXRuntimeError]" in capsys.readouterr().err


def test_little_work_stays_with_pytorch(monkeypatch):
    """By the seconds that it takes; an engine that was chosen before opens for less work."""
    needs("onnx")
    monkeypatch.setitem(module.SECONDS_FOR_TRIALS, "image", 1e9)
    expected = encode_pairs(make_encoder("torch"))
    assert np.array_equal(encode_pairs(make_encoder("auto")), expected)
    assert list_cache() == []
    encode_pairs(make_encoder("onnx"))  # which is named, so it is used
    assert list_cache() == ["model.onnx"]
    rates = count(100, 50)  # PyTorch comes first
    monkeypatch.setattr(module, "measure_rate", lambda *_: next(rates))
    monkeypatch.setitem(module.SECONDS_FOR_TRIALS, "image", 0)
    encode_pairs(make_encoder("auto"))
    monkeypatch.setitem(module.SECONDS_FOR_TRIALS, "image", 1e9)
    encoder = accelerate(make_encoder("auto"), NUMBER)
    encoder.encode([*encoder.examples])
    assert encoder.forward.chosen != "torch"
    monkeypatch.setattr(module, "SECONDS_TO_OPEN", 1e9)
    encoder = accelerate(make_encoder("auto"), NUMBER)
    encoder.encode([*encoder.examples])
    assert encoder.forward.chosen == "torch"


class TextModel(nn.Module):
    """Means of embeddings, through attention; padding is 0."""

    ignores_padding = True

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(300, 32)
        self.layer = nn.Linear(32, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        words, mask = self.words(tokens), (tokens != 0).unsqueeze(1)
        scores = (words @ words.transpose(1, 2)).masked_fill(~mask, -1e4)
        return (self.layer(scores.softmax(-1) @ words) * mask.transpose(1, 2)).sum(1)


def tokenize(texts: list[str]) -> Tensor:
    rows = torch.zeros(len(texts), 40, dtype=torch.int64)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = torch.tensor([*map(ord, text)])
    return rows


@pytest.mark.parametrize("engine", PACKAGES)
@pytest.mark.parametrize("is_reduced", [False, True])
def test_captions_of_any_length_pass_an_engine(engine, is_reduced):
    """At bfloat16 too, where it is as near to float32 as PyTorch."""
    needs(engine)
    torch.manual_seed(0)
    model = freeze(TextModel(), CPU)
    captions = [[("a bird " * 5)[:length]] for length in range(30, 1, -3)]
    reduced = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    settings: dict[str, Any] = {"autocast": reduced} if is_reduced else {}
    exact = text_encoder(model, CPU, tokenize, model, engine="torch")
    encoder = accelerate(
        text_encoder(model, CPU, tokenize, model, engine=engine, **settings), len(captions)
    )
    expected = torch.cat([exact.encode(texts) for texts in captions])
    features = torch.cat([encoder.encode(texts) for texts in captions])
    assert encoder.forward.chosen == engine
    torch.testing.assert_close(features, expected, rtol=0, atol=2e-2 if is_reduced else 1e-5)


def test_models_on_a_card_stay_with_pytorch():
    encoder = make_encoder("onnx")
    encoder.device = torch.device("cuda")
    assert accelerate(encoder, 10**9) is encoder
    assert accelerate(plain := make_encoder("torch"), 10**9) is plain


def test_an_engine_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda package: None)
    encoder = make_encoder("auto")
    assert accelerate(encoder, 10**9) is encoder
    with pytest.raises(ValueError, match=r"^encode\.engine: openvino needs: pip install onnx"):
        accelerate(make_encoder("openvino"), 1)
