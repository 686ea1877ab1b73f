"""What does a training step save whose tokens end with its longest caption?

A step is a forward pass and a backward pass of open_clip's ViT-B-32 with new weights, on drawn
images and on captions of the bundled emoji or of a table; as many tokens as the text tower can read
against as many as `without_padding` leaves. Both ways take turns in one process of one thread.

    python benchmarks/padding.py [--model ViT-B-32] [--batch 64] [--data TABLE] [--out FILE]
"""

import argparse
import datetime
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from protoclip.config import DataConfig, ModelConfig, SourceConfig
from protoclip.data.captions import without_padding
from protoclip.data.sources import open_source
from protoclip.models import loading
from protoclip.training import run_folder

STEPS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", default="ViT-B-32", help="one of open_clip")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--data", default="emoji", help="pairs whose captions are drawn")
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = ModelConfig(name=given.model)
    model, tokenizer = loading.model(config, seed=0).train(), loading.tokenizer(config)
    source = open_source(DataConfig(), SourceConfig(path=given.data))
    rows = np.random.default_rng(0).permutation(len(source))[: given.batch]
    tokens = tokenizer([source.sample_captions(int(row))[0] for row in rows])
    size = loading.evaluation_transform(model).size
    images = torch.randn(given.batch, 3, size, size)
    ways = {"whole length": tokens, "of the longest caption": without_padding(tokens)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(STEPS):
        for way, read in ways.items():
            began = time.process_time()
            found = model(images, read)
            (found.image_features @ found.text_features.T).square().mean().backward()
            seconds[way].append(time.process_time() - began)
    facts = run_folder.environment(torch.device("cpu"))
    plain = statistics.median(seconds["whole length"])
    lines = [
        "# Padding in a training step",
        "",
        f"`python benchmarks/padding.py --model {given.model} --batch {given.batch}`, "
        f"{datetime.date.today().isoformat()}; {facts['device'].split(',')[0]}, one thread, torch "
        f"{facts['torch']}, fp32. Seconds of processor time of a forward and a backward pass, "
        f"median of {STEPS} [least, most].",
        "",
        "| tokens | columns | seconds | of the whole length |",
        "|---|---|---|---|",
    ]
    for way, each in seconds.items():
        median = statistics.median(each)
        said = f"{median:.2f} [{min(each):.2f}, {max(each):.2f}] | {median / plain:.2f}"
        lines.append(f"| {way} | {ways[way].shape[1]} | {said} |")
    text = "\n".join([*lines, ""])
    print(text)
    if given.out:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
