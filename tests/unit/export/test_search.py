"""The script by which pages without a server answer texts; tests/browser runs it."""

import json
import re

import numpy as np
import pytest
import torch
from exported import save_run

import protoclip
from protoclip.export import search
from testing import tiny_model

CAPTIONS = [f"a {colour} {shape}" for colour in ("red", "green") for shape in ("dog", "cat", "eye")]


def test_the_script_holds_a_text_model_in_int8_and_the_features(tmp_path, monkeypatch, capsys):
    """One bit in eight of those of float32, and no character that would end its text."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(search, "fetch_packages", dict)
    reference = str(save_run(tmp_path / "run", tiny_model()))
    model, _, tokenizer = protoclip.load(reference)
    with torch.no_grad():
        features = model.encode_text(tokenizer(CAPTIONS))
    script = search.make_search(reference, {"image": features, "text": features}, CAPTIONS)
    assert "the pages find 100.0% of images among the first 10" in capsys.readouterr().err
    text = script.decode("utf-16")
    settings, held = re.fullmatch(r"openSearch\((\{.*\}), '(.*)'\)", text).groups()
    assert min(map(ord, held)) >= 0x4000
    assert max(map(ord, held)) < 0xD800
    facts = json.loads(settings)
    assert facts["length"] == tokenizer(["a"]).shape[1]
    assert facts["files"]["image"] == features.numel()
    named = model.towers.named_parameters()
    weights = sum(value.numel() for name, value in named if not name.startswith("visual"))
    assert facts["files"]["model.onnx"] < 2 * weights + 300_000


def test_rounded_features_keep_their_direction():
    rows = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    cosines = torch.cosine_similarity(search.round_features(rows).float(), rows)
    np.testing.assert_allclose(cosines, 1, atol=1e-3)


def test_packages_that_cannot_be_fetched_or_are_others_are_refused(tmp_path, monkeypatch):
    """The first says where to put a copy, the second what to delete."""
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path))
    copy = tmp_path / "npm" / "onnxruntime-web-1.31.1.tgz"
    with pytest.raises(ValueError, match=f"^/nowhere/onnxruntime-web.*; put a copy at {copy}$"):
        search.fetch_packages()
    copy.parent.mkdir(exist_ok=True)
    copy.write_bytes(b"another one")
    with pytest.raises(ValueError, match=f"^{copy}: is not what npm publishes; delete it$"):
        search.fetch_packages()
