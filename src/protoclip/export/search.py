"""A search by text for pages that no server answers: one script with all that it runs.

It holds the text model, its tokenizer, features, and the libraries that run them in a browser. A
page that is opened from a folder may run scripts, but read no other file.
"""

import gzip
import io
import json
import os
import tarfile
from base64 import b64encode
from collections.abc import Mapping
from hashlib import sha512
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from protoclip.data.access import cache_folder, describe_error, download
from protoclip.data.pairs import evenly_spaced
from protoclip.encode.engine import write_graph
from protoclip.export.huggingface import make_graphs, run_graph
from protoclip.export.immich import TextualGraph, open_tokenizer, read_tokens
from protoclip.export.open_clip import open_source
from protoclip.export.run import NEEDS
from protoclip.files import read_toml
from protoclip.models.opening import quiet_libraries
from protoclip.terminal import say

REGISTRY = "https://registry.npmjs.org"
# Captions, and the recall@10 that int8 may lose.
ASKED, FOUND, MOST_LOST, BATCH = 1000, 10, 0.01, 64


def make_search(
    reference: str, features: Mapping[str, Float[Tensor, "n d"]], captions: list[str]
) -> bytes:
    """The script that finds what is nearest to a text among images and texts, by their features.

    The model is int8 unless that costs more than a point of recall@10 among these pairs. Raises
    `ValueError` if the model has no such form, or a package is missing or cannot be fetched.
    """
    for package in NEEDS["onnx"]:
        if find_spec(package) is None:
            raise ValueError(f"{package} is missing; pip install 'protoclip[export]'")
    files = fetch_packages()
    say("computing: the search of the pages")
    source = open_source(reference)
    tokenizer, padding = open_tokenizer(source)
    length, settings = source.context_length, json.loads(tokenizer.to_str())
    files["tokenizer.json"] = json.dumps(settings | {"truncation": None, "padding": None}).encode()
    some = evenly_spaced(len(captions), ASKED, 0)
    tokens = read_tokens(tokenizer, padding, length, [captions[row] for row in some])
    graph, inputs = make_graphs(source)[1]
    masked = tokenizer.token_to_id(padding) if "attention_mask" in inputs else None
    textual = TextualGraph(graph, features["text"].shape[1], masked)
    with TemporaryDirectory() as scratch, quiet_libraries(offline=True):
        from onnxruntime.quantization import QuantType, quantize_dynamic

        whole, small = Path(scratch, "whole.onnx"), Path(scratch, "small.onnx")
        write_graph(textual, {"text": inputs["input_ids"].int()}, "features", whole)
        quantize_dynamic(whole, small, weight_type=QuantType.QInt8, per_channel=True)
        queries = [run_graph(small, {"text": part}) for part in torch.split(tokens, BATCH)]
        rounded = {modality: round_features(rows) for modality, rows in features.items()}
        recall = find_recall(features["text"][some], features["image"], some)
        small_recall = find_recall(torch.cat(queries), rounded["image"].float(), some)
        is_small = small_recall >= recall - MOST_LOST
        files["model.onnx"] = (small if is_small else whole).read_bytes()
    say(
        f"note: the pages find {100 * small_recall:.1f}% of images among the first {FOUND} by "
        f"their caption as int8, {100 * recall:.1f}% as float32; "
        f"{'int8' if is_small else 'float32'} is written"
    )
    files |= {modality: rows.numpy().tobytes() for modality, rows in rounded.items()}
    return pack_script({"length": length, "padding": tokenizer.token_to_id(padding)}, files)


def fetch_packages() -> dict[str, bytes]:
    """The files of packages, which are fetched once, as npm would, and kept in the cache."""
    files, registry = dict[str, bytes](), os.environ.get("NPM_CONFIG_REGISTRY", REGISTRY)
    for path, names in read_toml(Path(__file__).parent / "packages.toml").items():
        url, copy = f"{registry.rstrip('/')}/{path}", cache_folder() / "npm" / Path(path).name
        if not copy.is_file():
            say(f"note: fetching {url}")
            try:
                download(url, copy)
            except Exception as error:  # clients have exceptions of their own
                reason = describe_error(error)
                raise ValueError(f"{url}: {reason}; put a copy at {copy}") from None
        content = copy.read_bytes()
        if b64encode(sha512(content).digest()).decode() != names.pop("sha512"):
            raise ValueError(f"{copy}: is not what npm publishes; delete it")
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for name, inside in names.items():
                files[name] = cast("IO[bytes]", archive.extractfile(f"package/{inside}")).read()
    return files


def round_features(rows: Float[Tensor, "n d"]) -> Int[Tensor, "n d"]:
    """Rows as int8, which keep their direction."""
    return (127 * F.normalize(rows.float(), p=torch.inf)).round().to(torch.int8)


def find_recall(
    queries: Float[Tensor, "q d"], images: Float[Tensor, "n d"], own: list[int]
) -> float:
    """The share of queries whose own image is among the `FOUND` nearest."""
    cosines = F.normalize(queries.float()) @ F.normalize(images.float()).T
    is_nearer = cosines > cosines.gather(1, torch.tensor(own)[:, None])
    return float((is_nearer.sum(1) < FOUND).float().mean())


def pack_script(settings: Mapping[str, Any], files: Mapping[str, bytes]) -> bytes:
    """A script in UTF-16 that hands `settings` and files to `openSearch`.

    A character holds 15 bits of them, and is no quote, line end or half of another one.
    """
    packed = gzip.compress(b"".join(files.values()), mtime=0)
    bits = np.unpackbits(np.frombuffer(packed, np.uint8))
    rows = np.pad(bits, (0, -len(bits) % 15)).reshape(-1, 15)
    codes = np.packbits(np.pad(rows, ((0, 0), (1, 0)))).view(">u2") + np.uint16(0x4000)
    sizes = {name: len(content) for name, content in files.items()}
    facts = json.dumps({**settings, "size": len(packed), "files": sizes})
    text = codes.astype("<u2").tobytes().decode("utf-16-le")
    return f"openSearch({facts}, '{text}')".encode("utf-16")
