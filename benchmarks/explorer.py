"""How quickly the explorer shows its first screen and answers, and what memory it takes.

Pairs are synthetic: one image, captions of a few words, features drawn around centres. So only the
explorer is measured, and no model encodes anything. Each size runs in a process of its own:

    python benchmarks/explorer.py 10000 100000 1000000

prints for each: seconds to compute the map and prototypes (once, then kept); seconds from there to
the first screen when they are kept (opening, and the first request for the page and its map);
seconds of the first question, which opens the features, and of later ones; and memory.
"""

import argparse
import http.client
import io
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from protoclip.data.pairs import ImageTextPairs
from protoclip.evaluation.features import Encoder
from protoclip.explore.atlas import Features, keep, make_atlas, read_kept
from protoclip.explore.explorer import Explorer
from protoclip.explore.pairs import ExploredPairs
from protoclip.explore.render import Pages
from protoclip.explore.server import cookie_name, listen, server
from protoclip.testing import resident

WIDTH, CENTRES, QUESTIONS = 256, 500, 10
WORDS = ("a", "the", "red", "green", "blue", "small", "large", "cat", "dog", "house", "car", "hill")


def one_image() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 40, 40)).save(buffer, "JPEG")
    return buffer.getvalue()


def synthetic(number: int, folder: Path) -> ExploredPairs:
    """Pairs in a memory-mapped table, as those of shards are."""
    (folder / "image.jpg").write_bytes(one_image())
    draw = np.random.default_rng(0)
    path = folder / "pairs.arrow"
    schema = pa.schema({"image": pa.string(), "caption": pa.string(), "sample_id": pa.string()})
    with pa.ipc.new_file(str(path), schema) as writer:
        for start in range(0, number, 10_000):
            rows = range(start, min(start + 10_000, number))
            words = draw.choice(WORDS, (len(rows), 6))
            columns = {
                "image": ["image.jpg"] * len(rows),
                "caption": [" ".join(each) for each in words],
                "sample_id": [f"synthetic/{row:09d}" for row in rows],
            }
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema))
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    source = ImageTextPairs(table, name="synthetic", root=str(folder), table_key=str(number))
    return ExploredPairs(name="synthetic", sources=[source], starts=[0, number])


def features_of(number: int, folder: Path) -> None:
    """Write features of both modalities around the same centres."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CENTRES, WIDTH, generator=generator)
    for modality in ("image", "text"):
        path = folder / f"{modality}.npy"
        found = np.lib.format.open_memmap(path, "w+", np.float32, (number, WIDTH))
        for start in range(0, number, 50_000):
            rows = torch.arange(start, min(start + 50_000, number))
            noise = torch.randn(len(rows), WIDTH, generator=generator)
            found[start : start + len(rows)] = (centres[rows % CENTRES] + noise).numpy()
        found.flush()


def open_features(number: int, folder: Path) -> Features:
    def read(modality: str) -> torch.Tensor:
        return torch.from_numpy(np.load(folder / f"{modality}.npy", mmap_mode="c"))

    return Features(rows=torch.arange(number), image=read("image"), text=read("text"))


class Towers(torch.nn.Module):
    """A text becomes a fixed random feature; nothing else is asked of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(1, WIDTH))

    def encode_text(self, tokens: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        generator = torch.Generator().manual_seed(int(tokens.sum()))
        return torch.randn(len(tokens), WIDTH, generator=generator)


def tokens_of(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[sum(map(ord, text))] for text in texts])


def measure(number: int) -> dict[str, Any]:
    found: dict[str, Any] = {"pairs": number}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        features_of(number, folder)
        pairs = synthetic(number, folder)
        started = time.perf_counter()
        keep(folder / "atlas.npz", make_atlas(open_features(number, folder), heads=None))
        found["computed_once_s"] = time.perf_counter() - started
        before = resident()

        started = time.perf_counter()
        atlas = read_kept(folder / "atlas.npz")
        assert atlas is not None
        encoder = Encoder(model=Towers(), transform=lambda image: image, tokenizer=tokens_of)
        explorer = Explorer(
            name="synthetic",
            pairs=pairs,
            encoder=encoder,
            atlas=atlas,
            features=lambda: open_features(number, folder),
        )
        listening = listen("127.0.0.1", 0)
        serving = server(Pages([explorer]), host="127.0.0.1", token="t")
        thread = threading.Thread(target=serving.run, kwargs={"sockets": [listening]})
        thread.start()
        port = listening.getsockname()[1]
        page, drawn = ask(port, "/1/index.html"), ask(port, "/1/map.json")
        found["first_screen_s"] = time.perf_counter() - started
        found["map_mb"] = len(drawn) / 1e6
        assert b"<h1>Map</h1>" in page
        times = []
        for question in range(QUESTIONS + 1):
            started = time.perf_counter()
            ask(port, f"/1/search.html?text={quote(f'question {question * 7}')}")
            times.append(time.perf_counter() - started)
        found["first_answer_s"], found["later_answers_s"] = times[0], median(times[1:])
        started = time.perf_counter()
        ask(port, "/1/prototypes-image.html")
        found["prototypes_page_s"] = time.perf_counter() - started
        found["exact"] = explorer.space("image").exact
        found["memory_gb"] = (resident() - before) / 1e9
        serving.should_exit = True
        thread.join()
    return found


def ask(port: int, path: str) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("GET", path, headers={"Cookie": f"{cookie_name('t')}=t"})
    answer = connection.getresponse()
    body = answer.read()
    assert answer.status == 200, (path, answer.status)
    return body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", type=int, nargs="+")
    arguments = parser.parse_args()
    if len(arguments.pairs) == 1:
        print(json.dumps(measure(arguments.pairs[0])))
        return
    for number in arguments.pairs:
        subprocess.run([sys.executable, __file__, str(number)], check=True)


if __name__ == "__main__":
    main()
