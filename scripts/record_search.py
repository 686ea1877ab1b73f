"""Record searches in the explorer as an animated WebP: `python scripts/record_search.py RUN`.

Starts `protoclip explore RUN` on this machine, opens it in Chromium, types each query and takes
pictures of what the window shows. With `--page` it takes one picture of that page instead. Needs
playwright, and a Chromium: at $CHROMIUM, or on the path.

The pictures in docs show bundled emoji whose licences let everybody show them, Noto's and Fluent's,
without flags and symbols. To make the runs, and the pictures of pages:

    python scripts/record_search.py --write-pairs pairs.parquet
    python scripts/record_search.py --write-pairs swapped.parquet --swap 0.05
    protoclip align --data.train pairs.parquet --run.name emoji --model.image.size 128 \
        --model.image.name timm:tf_efficientnet_lite0 --model.text.name minilm
    protoclip align --data.train swapped.parquet --run.name swapped --model.image.size 128 \
        --model.image.name timm:tf_efficientnet_lite0 --model.text.name minilm
    protoclip align --data.train pairs.parquet --run.name e5 --model.image.size 128 \
        --model.image.name timm:tf_efficientnet_lite0 --model.text.name e5-small
    python scripts/record_search.py runs/swapped-0 --page odd-distance.html --height 727 \
        --out docs/odd.webp
    python scripts/record_search.py runs/emoji-0 --page "search.html?text=winter+shoes" \
        --height 727 --out docs/shop.webp
    python scripts/record_search.py runs/emoji-0 --page prototypes-image.html --height 640 \
        --out docs/groups.webp
    python scripts/record_search.py runs/e5-0 --page "search.html?text=Wintersport" --height 727 \
        --out docs/german.webp

docs/tasks/language.md says how to get `e5-small`.
"""

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from protoclip.data.emoji import emoji_table

ROOT = Path(__file__).resolve().parent.parent
QUERIES = ["winter sports", "a birthday party", "animals of the sea"]
WIDTH, HEIGHT = 960, 600
LARGEST = 3_000_000  # bytes, so that a page with the picture still opens quickly
# Milliseconds that a picture stays: the map, some typed letters, what was found.
MAP, LETTERS, FOUND = 1_500, 110, 2_800


def write_pairs(path: Path, swap: float) -> None:
    """Write the bundled emoji that the pictures in docs show, a share of them with the caption of
    another."""
    table = emoji_table("train")
    free = pc.is_in(table["style"], pa.array(["noto", "fluent-emoji", "fluent-emoji-flat"]))
    plain = pc.invert(pc.is_in(table["group"], pa.array(["flags", "symbols"])))
    table = table.filter(pc.and_(free, plain))
    captions = np.array(table["caption"].to_pylist(), dtype=object)
    chosen = np.random.default_rng(0).permutation(len(captions))[: round(swap * len(captions))]
    captions[chosen] = captions[np.roll(chosen, 1)]
    column = table.schema.get_field_index("caption")
    pq.write_table(table.set_column(column, "caption", pa.array(captions)), path)


def record(page: Any, queries: list[str]) -> tuple[list[Image.Image], list[int]]:
    """What the window shows while each query is typed and answered, and for how long."""
    frames: list[Image.Image] = []
    times: list[int] = []

    def take(time: int) -> None:
        frames.append(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))
        times.append(time)

    page.wait_for_selector("#map[data-ready]")
    page.wait_for_timeout(1_000)  # the map draws its names
    take(MAP)
    for query in queries:
        field = page.locator("input[name=text]")
        field.fill("")
        for start in range(0, len(query), 2):
            field.press_sequentially(query[start : start + 2])
            take(LETTERS)
        field.press("Enter")
        page.wait_for_url(re.compile(r"search\.html"))
        page.wait_for_function(
            "document.querySelector('input[name=text]').value === " + repr(query)
        )
        page.wait_for_load_state("networkidle")
        take(FOUND)
    return frames, times


def picture(page: Any, name: str) -> Image.Image:
    """One page of the explorer, without what the window does not show."""
    page.wait_for_url("**/1/index.html")  # where the address leads
    page.goto(urljoin(page.url, name))
    page.wait_for_load_state("networkidle")
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", nargs="?", help="a run of align, or any model with --data")
    parser.add_argument("--data", help="pairs to search in; else the run's own")
    parser.add_argument("--queries", nargs="+", default=QUERIES)
    parser.add_argument("--page", help="a page to take one picture of, such as odd-distance.html")
    parser.add_argument("--height", type=int, default=HEIGHT, help="of the window")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "search.webp")
    parser.add_argument("--write-pairs", type=Path, help="write the pairs of the pictures, and end")
    parser.add_argument("--swap", type=float, default=0.0, help="share of wrong captions in them")
    options = parser.parse_args()
    if options.write_pairs:
        write_pairs(options.write_pairs, options.swap)
        return
    from playwright.sync_api import sync_playwright

    command = [sys.executable, "-m", "protoclip", "explore", options.run]
    command += ["--data", options.data] if options.data else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            lines = iter(server.stdout or ())
            address = next(found[0] for line in lines if (found := re.search(r"http://\S+", line)))
            with sync_playwright() as playwright:
                chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
                browser = playwright.chromium.launch(
                    executable_path=chromium, args=["--no-sandbox"]
                )
                page = browser.new_page(viewport={"width": WIDTH, "height": options.height})
                page.goto(address)
                if options.page:
                    frames, times = [picture(page, options.page)], [0]
                else:
                    frames, times = record(page, options.queries)
                browser.close()
        finally:
            server.terminate()
    frames[0].save(
        options.out, save_all=True, append_images=frames[1:], duration=times, loop=0, quality=70
    )
    size = options.out.stat().st_size
    print(f"{options.out}: {len(frames)} pictures, {sum(times) / 1000:.0f} s, {size / 1e6:.2f} MB")
    if size > LARGEST:
        sys.exit(f"{options.out} is above {LARGEST / 1e6:.0f} MB: give fewer queries")


if __name__ == "__main__":
    main()
