"""The script by which pages without a server answer texts; tests/browser runs it."""

import numpy as np
import pytest
import torch
from exported import save_run

import protoclip
from packed import read_script
from protoclip.export import search
from testing import tiny_model

CAPTIONS = [f"a {colour} {shape}" for colour in ("red", "green") for shape in ("dog", "cat", "eye")]


def test_the_script_holds_a_text_model_of_few_bits_and_the_features(tmp_path, monkeypatch, capsys):
    """A byte a weight, before these are packed; the same captions are found."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(search, "fetch_packages", dict)
    reference = str(save_run(tmp_path / "run", tiny_model()))
    model, _, tokenizer = protoclip.load(reference)
    with torch.no_grad():
        features = model.encode_text(tokenizer(CAPTIONS))
    named = dict.fromkeys(("image", "text", "words"), features)
    script = search.make_search(reference, named, CAPTIONS, [0.5, 0.7])
    assert "find 100.0% of images among the first 10 of 6 by" in capsys.readouterr().err
    facts, files = read_script(script)
    assert facts["length"] == tokenizer(["a"]).shape[1]
    assert facts["byChance"] == [0.5, 0.7]
    assert len(files["image"]) == features.numel()
    named = model.towers.named_parameters()
    weights = sum(value.numel() for name, value in named if not name.startswith("visual"))
    assert len(files["model.onnx"]) < 2 * weights + 300_000


def test_weights_are_rounded_row_by_row_or_column_by_column(tmp_path):
    """Each to the nearest of the steps of its row or column, whichever errs less; small matrices
    stay as they are."""
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    draws = np.random.default_rng(0)
    matrices = {
        "tall": draws.normal(size=(300, 80)) * np.geomspace(1, 100, 80),
        "wide": draws.normal(size=(80, 300)) * np.geomspace(1, 100, 80)[:, None],
        "small": draws.normal(size=(300, 4)),
    }
    matrices = {name: rows.astype(np.float32) for name, rows in matrices.items()}
    names, made = ["x", "hidden", "back", "y"], onnx.helper.make_tensor_value_info
    nodes = [
        onnx.helper.make_node("MatMul", [names[at], name], [names[at + 1]])
        for at, name in enumerate(matrices)
    ]
    ends = [[made(name, onnx.TensorProto.FLOAT, [1, n])] for name, n in (("x", 300), ("y", 4))]
    tensors = [onnx.numpy_helper.from_array(rows, name) for name, rows in matrices.items()]
    graph = onnx.helper.make_graph(nodes, "graph", *ends, tensors)
    whole = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    whole.ir_version = 10
    onnx.save(whole, tmp_path / "whole.onnx")
    search.round_weights(tmp_path / "whole.onnx", tmp_path / "small.onnx", 15)
    x = draws.normal(size=(1, 300)).astype(np.float32)
    wanted = x
    for name, rows in matrices.items():
        if name != "small":
            scale = np.abs(rows).max(int(name == "wide"), keepdims=True) / 15
            rows = np.round(rows / scale) * scale
        wanted = wanted @ rows
    options = runtime.SessionOptions()  # at its usual level it rounds what is multiplied too
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(tmp_path / "small.onnx", options)
    found = session.run(None, {"x": x})[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_rounded_features_keep_their_direction():
    rows = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    cosines = torch.cosine_similarity(search.round_features(rows, 15).float(), rows)
    np.testing.assert_allclose(cosines, 1, atol=5e-3)


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
