"""A search by text for pages that no server answers: one script with all that it runs.

It holds the text model, its tokenizer, features, and the libraries that run them in a browser.
"""

import io
import json
import os
import tarfile
from base64 import b64encode
from collections.abc import Mapping
from hashlib import sha512
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from protoclip.data.access import cache_folder, describe_error, download
from protoclip.data.pairs import evenly_spaced
from protoclip.encode.engine import write_graph
from protoclip.explore.pack import pack_script
from protoclip.export.huggingface import make_graphs, run_graph
from protoclip.export.immich import TextualGraph, open_tokenizer, read_tokens
from protoclip.export.open_clip import open_source
from protoclip.export.run import NEEDS
from protoclip.files import read_toml
from protoclip.models.opening import quiet_libraries
from protoclip.terminal import say

REGISTRY = "https://registry.npmjs.org"
# Captions, and the recall@10 that rounded weights may lose.
ASKED, FOUND, MOST_LOST, BATCH = 1000, 10, 0.01, 64
# Steps of weights to either side of 0, by their name in notes. Tables of tokens and features have
# half as many. Smaller matrices than `LEAST_ROUNDED` stay as they are.
STEPS, LEAST_ROUNDED = {"6 bits": 31, "8 bits": 127}, 20_000


def make_search(
    reference: str,
    features: Mapping[str, Float[Tensor, "n d"]],
    captions: list[str],
    by_chance: list[float],
) -> bytes:
    """The script that finds what is nearest to a text among images and texts, by their features.

    It doubts a text that is no nearer than `by_chance` to an image and to a word of captions.
    Weights have 6 bits; 8 or all where that costs more than a point of recall@10 among these pairs.
    Raises `ValueError` if the model has no such form, or a package is missing or cannot be fetched.
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
        written, small = Path(scratch, "whole.onnx"), Path(scratch, "small.onnx")
        write_graph(textual, {"text": inputs["input_ids"].int()}, "features", written)
        recall = find_recall(features["text"][some], features["image"], some)
        for kept, steps in STEPS.items():
            rounded = {m: round_features(rows, steps // 2) for m, rows in features.items()}
            round_weights(written, small, steps)
            queries = [run_graph(small, {"text": part}) for part in torch.split(tokens, BATCH)]
            found = find_recall(torch.cat(queries), rounded["image"].float(), some)
            say(
                f"note: weights of {kept} find {100 * found:.1f}% of images among the first "
                f"{FOUND} of {len(rounded['image']):,} by their caption, the model's own "
                f"{100 * recall:.1f}%; this compares weights, on pairs that may have trained them"
            )
            if found >= recall - MOST_LOST:
                written = small
                break
        files["model.onnx"] = written.read_bytes()
    files |= {modality: rows.numpy().tobytes() for modality, rows in rounded.items()}
    settings = {"length": length, "padding": tokenizer.token_to_id(padding), "byChance": by_chance}
    return pack_script(settings, files)


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


def round_weights(whole: Path, small: Path, steps: int) -> None:
    """Write a graph anew, with int8 matrices of at most `steps` to either side of 0 in each row or
    column, whichever errs less. Tables of tokens have half as many."""
    import onnx

    model = onnx.load(whole)
    graph, scaled = model.graph, []
    tables = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    for entry in list(graph.initializer):
        weights, name = onnx.numpy_helper.to_array(entry), entry.name
        if weights.ndim != 2 or weights.size < LEAST_ROUNDED or weights.dtype != np.float32:
            continue
        ways = []
        for axis in (0, 1):
            largest = np.abs(weights).max(1 - axis, keepdims=True).clip(1e-30)
            scale = largest / (steps // 2 if name in tables else steps)
            numbers = np.round(weights / scale)
            ways.append((np.square(numbers * scale - weights).sum(), axis, numbers, scale))
        _, axis, numbers, scale = min(ways, key=itemgetter(0))
        graph.initializer.remove(entry)
        parts = {f"{name} rounded": numbers.astype(np.int8), f"{name} scale": scale.ravel()}
        for part, values in parts.items():
            graph.initializer.append(onnx.numpy_helper.from_array(values, part))
        scaled.append(onnx.helper.make_node("DequantizeLinear", [*parts], [name], axis=axis))
    nodes = [*scaled, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, small)


def round_features(rows: Float[Tensor, "n d"], steps: int) -> Int[Tensor, "n d"]:
    """Rows as whole numbers of at most `steps` to either side of 0, which keep their direction."""
    return (steps * F.normalize(rows.float(), p=torch.inf)).round().to(torch.int8)


def find_recall(
    queries: Float[Tensor, "q d"], images: Float[Tensor, "n d"], own: list[int]
) -> float:
    """The share of queries whose own image is among the `FOUND` nearest."""
    cosines = F.normalize(queries.float()) @ F.normalize(images.float()).T
    is_nearer = cosines > cosines.gather(1, torch.tensor(own)[:, None])
    return float((is_nearer.sum(1) < FOUND).float().mean())
