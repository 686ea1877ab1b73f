"""Tiny models and data sets for tests: of this package, and of those who build on it."""

import io

import numpy as np
import pyarrow as pa
from PIL import Image

from protoclip.config import (
    Config,
    DataConfig,
    EpisodeConfig,
    HeadConfig,
    ImageTowerConfig,
    ModelConfig,
    PrototypeConfig,
    RunConfig,
    TeacherConfig,
    TextTowerConfig,
)

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 60, 220)}
SHAPES = ("square", "stripe", "corner")


def tiny_pairs(num_samples: int = 96, *, side: int = 24, seed: int = 0) -> pa.Table:
    """Coloured shapes with captions such as "a red square": columns image, caption, sample_id."""
    generator = np.random.default_rng(seed)
    images, captions = [], []
    for _ in range(num_samples):
        colour, shape = generator.choice(list(COLOURS)), generator.choice(SHAPES)
        pixels = np.full((side, side, 3), 255, dtype=np.uint8)
        top, left = generator.integers(1, side // 3, 2)
        size = side // 2
        region = {
            "square": (slice(top, top + size), slice(left, left + size)),
            "stripe": (slice(top, top + size // 3), slice(None)),
            "corner": (slice(0, size), slice(0, size)),
        }[str(shape)]
        pixels[region] = COLOURS[str(colour)]
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        images.append(buffer.getvalue())
        captions.append(f"a {colour} {shape}")
    return pa.table(
        {
            "image": pa.array(images, pa.binary()),
            "caption": captions,
            "sample_id": [f"tiny/{row}" for row in range(num_samples)],
        }
    )


def tiny_model() -> ModelConfig:
    """A tower pair that trains a step in a few milliseconds."""
    return ModelConfig(
        embed_dim=16,
        image=ImageTowerConfig(name="resnet10t", size=32),
        text=TextTowerConfig(context_length=8, width=16, heads=2, layers=1),
        heads=HeadConfig(hidden_dim=32, projection_dim=8),
    )


def tiny_config(train: str = "emoji", *, out: str, teacher: str | None = None) -> Config:
    """A run of four episodes (warm-up, two prototypical, locked image) in seconds, in fp32."""
    return Config(
        run=RunConfig(name="tiny", out=out, device="cpu", precision="fp32", log_every=1),
        data=DataConfig(train=train),
        model=tiny_model(),
        episodes=EpisodeConfig(size=64, count=4, batch_size=16),
        prototypes=PrototypeConfig(number=8, iterations=5),
        teacher=TeacherConfig(features=teacher, number=8),
    )
