"""How quickly the explorer shows its first screen and answers, and what memory it takes.

Pairs are synthetic: one image, captions of a few words, features drawn around centres. So only the
explorer is measured, and no model encodes anything. Each size runs in a process of its own:

    python benchmarks/explorer.py 10000 100000 1000000

prints for each: seconds to compute map positions and prototypes, and to draw the map (once, then
kept); seconds from there to the first screen (opening what is kept, and the first request for the
page and its map); seconds of the first question, which opens the features and checks them, and of
later ones; and memory: what the explorer adds, and the most that the whole process held. Beside
each time stands `_cpu`, the processor time of this process, which other jobs of the machine change
less.
`--drawn` draws map positions and prototypes at random instead of computing them; no later time
depends on what they are. `--browser` adds the seconds from asking Chromium for the page to the
drawn map.
"""

import argparse
import http.client
import io
import json
import resource
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
from protoclip.encode.store import hash_ids
from protoclip.evaluation.features import Encoder
from protoclip.evaluation.kept import Kept
from protoclip.explore.address import listen
from protoclip.explore.atlas import (
    COMPARED_ROWS,
    MAP_PAIRS,
    MOST_DUPLICATES,
    Atlas,
    Features,
    keep,
    make_atlas,
    num_prototypes,
    read_kept,
)
from protoclip.explore.explorer import Explorer
from protoclip.explore.pairs import ExploredPairs
from protoclip.explore.render import Pages
from protoclip.explore.server import cookie_name, server

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from testing import resident

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
    return ExploredPairs([(source, range(number))], "synthetic")


def features_of(number: int, folder: Path) -> None:
    """Keep features of both modalities around the same centres, as an encoder does."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CENTRES, WIDTH, generator=generator)
    for modality in ("image", "text"):
        found = torch.randn(number, WIDTH, generator=generator)
        for rows in torch.split(torch.arange(number), 50_000):
            found[rows] += centres[rows % CENTRES]
        Kept(folder / modality).add([*map(str, range(number))], found)


def open_features(number: int, folder: Path) -> Features:
    def read(modality: str) -> torch.Tensor:
        kept, hashes = Kept(folder / modality), hash_ids(map(str, range(number)))
        assert kept.has(hashes).all()
        return kept.features(hashes)

    rows = torch.arange(number)
    return Features(captioned=rows, rows=rows, image=read("image"), text=read("text"))


def drawn_atlas(pairs: int) -> Atlas:
    """An atlas of the right size whose values are drawn at random."""
    draw = np.random.default_rng(0)
    number = num_prototypes(pairs)

    def values(*shape: int) -> Any:
        return draw.random(shape, dtype=np.float32)

    return Atlas(
        captioned=np.arange(pairs),
        rows=np.arange(pairs),
        drawn=np.sort(draw.choice(pairs, min(pairs, MAP_PAIRS), replace=False)),
        image_map_position=values(pairs, 2),
        text_map_position=values(pairs, 2),
        image_prototype=draw.integers(0, number, pairs, dtype=np.int32),
        text_prototype=draw.integers(0, number, pairs, dtype=np.int32),
        image_similarity=values(pairs),
        text_similarity=values(pairs),
        distance=values(pairs),
        loss=values(pairs),
        duplicates=draw.integers(0, pairs, (MOST_DUPLICATES, 2)),
        duplicate_likeness=values(MOST_DUPLICATES),
        number=number,
        space="features",
        layout="pca",
        compared=min(pairs, COMPARED_ROWS),
        run_prototypes={},
    )


class Stopwatch:
    """Seconds since it was made: on the wall, and of this process's processor time."""

    def __init__(self) -> None:
        self.started = time.perf_counter(), time.process_time()

    def into(self, found: dict[str, Any], name: str) -> None:
        wall, cpu = self.started
        found[f"{name}_s"] = round(time.perf_counter() - wall, 4)
        found[f"{name}_cpu_s"] = round(time.process_time() - cpu, 4)


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


def in_browser(port: int) -> dict[str, float]:
    """Seconds from asking for the page to the drawn map: the browser's first, and a later one."""
    from playwright.sync_api import sync_playwright

    times = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        for _ in range(4):
            started = time.perf_counter()
            page.goto(f"http://127.0.0.1:{port}/1/index.html?token=t")
            page.wait_for_selector("#map[data-ready]", timeout=120_000)
            times.append(time.perf_counter() - started)
        browser.close()
    return {"browser_first_s": round(times[0], 2), "browser_later_s": round(median(times[1:]), 2)}


def measure(number: int, *, drawn: bool, browser: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"pairs": number}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        features_of(number, folder)
        pairs = synthetic(number, folder)
        watch = Stopwatch()
        atlas = (
            drawn_atlas(number) if drawn else make_atlas(open_features(number, folder), heads=None)
        )
        keep(folder / "atlas.npz", atlas)
        if not drawn:
            watch.into(found, "computed_once")
        del atlas
        before = resident()

        watch = Stopwatch()
        _ = Pages([opened(pairs, folder)]).site(1).map  # with Bokeh's import
        watch.into(found, "map_drawn_once")

        watch = Stopwatch()
        explorer = opened(pairs, folder)
        watch.into(found, "opened")
        listening = listen("127.0.0.1", 0)
        serving = server(Pages([explorer]), host="127.0.0.1", token="t")
        thread = threading.Thread(target=serving.run, kwargs={"sockets": [listening]})
        thread.start()
        port = listening.getsockname()[1]
        page, shown = ask(port, "/1/index.html"), ask(port, "/1/map.json")
        watch.into(found, "first_screen")
        found["map_mb"] = len(shown) / 1e6
        assert b"<h1>Map</h1>" in page
        times = []
        for question in range(QUESTIONS + 1):
            one: dict[str, Any] = {}
            watch = Stopwatch()
            ask(port, f"/1/search.html?text={quote(f'question {question * 7}')}")
            watch.into(one, "answer")
            times.append(one)
        for suffix in ("s", "cpu_s"):
            found[f"first_answer_{suffix}"] = times[0][f"answer_{suffix}"]
            later = [one[f"answer_{suffix}"] for one in times[1:]]
            found[f"later_answers_{suffix}"] = round(median(later), 4)
        for page_name in ("prototypes-image", "prototype-image-1", "odd-loss", "odd-distance"):
            watch = Stopwatch()
            ask(port, f"/1/{page_name}.html")
            watch.into(found, f"page_{page_name}")
        found["exact"] = explorer.space("image").exact
        found["memory_gb"] = (resident() - before) / 1e9
        found["most_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        if browser:
            found |= in_browser(port)
        serving.should_exit = True
        thread.join()
    return found


def opened(pairs: ExploredPairs, folder: Path) -> Explorer:
    """The explorer of what is kept."""
    atlas = read_kept(folder / "atlas.npz")
    assert atlas is not None
    return Explorer(
        name="synthetic",
        pairs=pairs,
        encoder=Encoder(model=Towers(), transform=lambda image: image, tokenizer=tokens_of),
        atlas=atlas,
        features=lambda: open_features(len(pairs), folder),
        kept=folder / "atlas.npz",
    )


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
    parser.add_argument("--drawn", action="store_true")
    parser.add_argument("--browser", action="store_true")
    arguments = parser.parse_args()
    if len(arguments.pairs) == 1:
        (number,) = arguments.pairs
        found = measure(number, drawn=arguments.drawn, browser=arguments.browser)
        print(json.dumps(found, indent=1))
        return
    more = [f"--{name}" for name in ("drawn", "browser") if getattr(arguments, name)]
    for number in arguments.pairs:
        subprocess.run([sys.executable, __file__, str(number), *more], check=True)


if __name__ == "__main__":
    main()
