"""How fast are pictures decoded? Against open_clip's own pipeline and the reference's augmentation.

Makes photo-like JPEG files of 512 pixels (about 52 KB) in a temporary folder, and takes them to
normalised batches at 224 pixels in two ways, in turn: as open_clip does (PIL, then torchvision's
transforms one picture at a time; for `light` those of ProtoCLIP's reference implementation), and as
`decode_crop` and the views do, with `finish` on the same core. Then how far our pixels are from
PIL's, larger files, and the loaders with worker processes.

    python benchmarks/loading.py [--pictures 128] [--repeats 9] [--workers 2] [--out FILE]
"""

import argparse
import datetime
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import torch
import torchvision
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from protoclip.data.cache import (
    DiskCache,
    ImageCache,
    MemoryCache,
    crop,
)
from protoclip.data.decode import decode_crop
from protoclip.data.loader import EpisodeLoader
from protoclip.data.pairs import ImageTextPairs
from protoclip.data.sampler import Episode
from protoclip.data.transforms import TrainingTransform, clip_transform, light_transform
from protoclip.progress import Progress
from protoclip.training import run

# Of small copies for inputs of 224 pixels: the shorter side that `data.small_copies` gives them.
SIZE, BATCH, COPY_SIDE = 224, 32, 320
SIDES = (512, 1024, 2048)
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
VIEWS = {
    "clip": clip_transform(size=SIZE, mean=MEAN, std=STD),
    "light": light_transform(size=SIZE, mean=MEAN, std=STD),
}
REFERENCES: dict[str, Callable[[Image.Image], Tensor]] = {
    "clip": open_clip.image_transform(SIZE, is_train=True, mean=MEAN, std=STD),
    "light": transforms.Compose(
        [
            transforms.RandomResizedCrop(
                SIZE, scale=(0.5, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.Lambda(lambda image: image.convert("RGB")),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.2),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([transforms.GaussianBlur(kernel_size=21)], p=0.2),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    ),
}


def write_photo(path: Path, seed: int, side: int) -> None:
    """Noise with the spectrum of photographs, and outlines on it; quality 90, half the colour."""
    draw = np.random.default_rng(seed)
    down, across = np.meshgrid(np.fft.fftfreq(side), np.fft.rfftfreq(side), indexing="ij")
    spectrum = np.maximum(np.hypot(down, across), 1 / side) ** -1.75

    def noise() -> np.ndarray:
        waves = np.fft.rfft2(draw.standard_normal((side, side))) * spectrum
        field = np.fft.irfft2(waves, s=(side, side))
        return field / field.std()

    luma = 45 * noise()
    pixels = np.stack([128 + luma + 15 * noise() for _ in range(3)], axis=-1)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = (int(v) for v in draw.integers(0, side, 2))
        reach = int(draw.integers(side // 40, side // 5))
        colour = tuple(int(v) for v in draw.integers(0, 256, 3))
        shape = pen.ellipse if draw.random() < 0.5 else pen.rectangle
        shape((x - reach, y - reach, x + reach, y + reach), outline=colour, width=3)
    image.save(path, "JPEG", quality=90, subsampling="4:2:0")


def batches(paths: list[Path]) -> Iterator[list[Path]]:
    for first in range(0, len(paths), BATCH):
        yield paths[first : first + BATCH]


def theirs(paths: list[Path], transform: Callable[[Image.Image], Tensor]) -> None:
    for batch in batches(paths):
        torch.stack([transform(Image.open(path)) for path in batch])


def ours(
    paths: list[Path],
    transform: TrainingTransform,
    *,
    finish: bool = True,
    cache: ImageCache | None = None,
    small_side: int | None = None,
) -> None:
    for batch in batches(paths):
        draws = torch.rand(len(batch), transform.num_draws)
        crops = []
        for path, drawn in zip(batch, draws.numpy(), strict=True):
            box = partial(transform.box, draws=drawn)
            crops.append(
                crop(
                    path.read_bytes(),
                    box,
                    SIZE,
                    max_pixels=10**8,
                    small_side=small_side,
                    cache=cache,
                )
            )
        images = torch.from_numpy(np.stack(crops))
        if finish:
            transform.finish(images, draws)


def rate(work: Callable[[], None], pictures: int) -> float:
    """Pictures a second of processor time, which other programs do not lengthen."""
    start = time.process_time()
    work()
    return pictures / (time.process_time() - start)


def psnr(paths: list[Path], transform: TrainingTransform, seed: int) -> list[float]:
    """Our crops against PIL's: all pixels, the same box, one bicubic resize."""
    ratios = []
    for path, drawn in zip(
        paths, np.random.default_rng(seed).random((len(paths), 13), dtype=np.float32), strict=True
    ):
        crop = decode_crop(
            path.read_bytes(), partial(transform.box, draws=drawn), SIZE, max_pixels=10**8
        )
        image = Image.open(path).convert("RGB")
        cropped = image.crop(transform.box(*image.size, drawn))
        expected = np.asarray(cropped.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        error = ((crop.astype(np.float64) - expected) ** 2).mean()
        ratios.append(float(10 * np.log10(255**2 / max(error, 1e-9))))
    return ratios


class CsvPictures(Dataset[tuple[Tensor, Tensor]]):
    """What open_clip's CSV data set does to a row."""

    def __init__(self, paths: list[Path], transform: Callable[[Image.Image], Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.transform(Image.open(self.paths[row])), tokens([""])[0]


def tokens(captions: list[str]) -> Tensor:
    """No tokenizer: this is about pictures."""
    return torch.zeros(len(captions), 8, dtype=torch.int64)


def their_loader(paths: list[Path], name: str, workers: int, samples: int) -> float:
    many = [paths[row % len(paths)] for row in range(samples)]
    start = time.perf_counter()
    loader = DataLoader(CsvPictures(many, REFERENCES[name]), batch_size=BATCH, num_workers=workers)
    seen = sum(len(images) for images, _ in loader)
    return seen / (time.perf_counter() - start)


def our_loader(paths: list[Path], name: str, workers: int, samples: int) -> float:
    table = pa.table({"path": [str(path) for path in paths], "caption": ["a"] * len(paths)})
    rows = torch.arange(samples) % len(paths)
    start = time.perf_counter()
    loader = EpisodeLoader(
        pairs=ImageTextPairs(table, name="pictures"),
        tokenizer=tokens,
        transform=VIEWS[name],
        batch_size=BATCH,
        seed=0,
        device=torch.device("cpu"),
        workers=workers,
    )
    seen = sum(len(batch.image) for batch in loader.batches(Episode(index=0, rows=rows)))
    return seen / (time.perf_counter() - start)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} [{min(values):.0f}, {max(values):.0f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, help="also write the tables to this Markdown file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    count, workers = arguments.pictures, arguments.workers
    larger = max(8, count // 8)
    samples = 8 * count
    with tempfile.TemporaryDirectory() as folder:
        paths: dict[int, list[Path]] = {}
        progress = Progress("benchmark: pictures", count + (len(SIDES) - 1) * larger)
        for side in SIDES:
            numbers = range(count if side == SIDES[0] else larger)
            paths[side] = [Path(folder) / f"{side}_{number}.jpg" for number in numbers]
            for number, path in enumerate(paths[side]):
                write_photo(path, number, side)
                progress.update(sum(map(len, paths.values())) - len(numbers) + number + 1)

        small = paths[SIDES[0]]
        caches: dict[str, ImageCache | None] = {
            "no cache": None,
            "disk": DiskCache(Path(folder) / "cache", max_bytes=10**10),
            "memory": MemoryCache(max_bytes=10**10),
        }
        arms: dict[tuple[str, str], Callable[[], None]] = {}
        for name, view in VIEWS.items():
            arms["open_clip" if name == "clip" else "reference", name] = partial(
                theirs, small, REFERENCES[name]
            )
            arms["protoclip", name] = partial(ours, small, transform)
            arms["without finish", name] = partial(ours, small, transform, finish=False)
            for kept, cache in caches.items():
                if cache is not None:
                    arms[f"whole, {kept}", name] = partial(
                        ours, small, transform, finish=False, cache=cache
                    )
                arms[f"small, {kept}", name] = partial(
                    ours, small, transform, finish=False, cache=cache, small_side=COPY_SIDE
                )
        for side in SIDES[1:]:
            arms["open_clip", str(side)] = partial(theirs, paths[side], REFERENCES["clip"])
            arms["protoclip", str(side)] = partial(ours, paths[side], VIEWS["clip"])
        rates: dict[tuple[str, str], list[float]] = {arm: [] for arm in arms}
        progress = Progress("benchmark: loading", (1 + arguments.repeats) * len(arms))
        for repeat in range(1 + arguments.repeats):
            for number, (arm, work) in enumerate(arms.items()):
                value = rate(work, larger if arm[1] in map(str, SIDES[1:]) else count)
                if repeat > 0:  # the first round warms up, and fills the caches
                    rates[arm].append(value)
                progress.update(repeat * len(arms) + number + 1, " ".join(arm))
        progress = Progress("benchmark: comparing pixels", len(SIDES) * len(VIEWS))
        noise: dict[tuple[int, str], list[float]] = {}
        for side in SIDES:
            for name, view in VIEWS.items():
                noise[side, name] = psnr(paths[side], transform, seed=side)
                progress.update(len(noise))
        progress = Progress("benchmark: loaders", 4 * 3)
        loaders: dict[tuple[str, str], list[float]] = {}
        for repeat in range(3):
            for name in VIEWS:
                for owner, loader in (("theirs", their_loader), ("ours", our_loader)):
                    value = loader(small, name, workers, samples)
                    loaders.setdefault((owner, name), []).append(value)
                    progress.update(repeat * 4 + sum(map(bool, loaders)), f"{owner} {name}")
        kilobytes = {
            side: statistics.mean(path.stat().st_size for path in found) / 1000
            for side, found in paths.items()
        }

    def row(label: str, values: dict[str, list[float]], base: dict[str, list[float]]) -> str:
        cells = [
            f"{spread(values[name])} | "
            f"{statistics.median(values[name]) / statistics.median(base[name]):.2f}"
            for name in VIEWS
        ]
        return f"| {label} | {' | '.join(cells)} |"

    base = {"clip": rates["open_clip", "clip"], "light": rates["reference", "light"]}
    facts = run.environment(torch.device("cpu"))
    lines = [
        "# Loading: pictures a second for a core",
        "",
        f"`python benchmarks/loading.py --pictures {count} --repeats {arguments.repeats} "
        f"--workers {workers}`, {datetime.date.today().isoformat()}; {facts['device']}, torch "
        f"{facts['torch']}, torchvision {torchvision.__version__}, Pillow {Image.__version__}, "
        f"open_clip {open_clip.__version__}. {count} JPEG files of {SIDES[0]} pixels and "
        f"{kilobytes[SIDES[0]]:.0f} KB on average, to batches of {BATCH} at {SIZE} pixels. Median "
        f"[least, most] of {arguments.repeats} rounds, pipelines in turn, per second of processor "
        "time of one thread; ratios are of medians, to the first row.",
        "",
        "| one core | `clip` | ratio | `light` | ratio |",
        "|---|---|---|---|---|",
        row("PIL and torchvision: open_clip; the reference's light augmentation", base, base),
    ]
    for arm, label in (
        ("protoclip", "protoclip, finished on the same core"),
        ("without finish", "protoclip, the workers' part (an accelerator finishes)"),
        ("whole, disk", "the workers' part, pictures kept on disk (`data.cache`)"),
        ("whole, memory", "the workers' part, pictures kept in memory"),
        ("small, no cache", "the workers' part, small copies made each time (`data.small_copies`)"),
        ("small, disk", "the workers' part, small copies kept on disk"),
        ("small, memory", "the workers' part, small copies kept in memory"),
    ):
        lines.append(row(label, {name: rates[arm, name] for name in VIEWS}, base))
    slow = {name: loaders["theirs", name] for name in VIEWS}
    lines += [
        "",
        f"End to end with {workers} worker processes on {os.cpu_count()} cores: {samples} samples, "
        "start of the processes included; of 3 rounds.",
        "",
        "| pictures a second | `clip` | ratio | `light` | ratio |",
        "|---|---|---|---|---|",
        row("PyTorch's loader over open_clip's CSV data set", slow, slow),
        row("`EpisodeLoader`", {name: loaders["ours", name] for name in VIEWS}, slow),
        "",
        "Pixels against PIL's (all pixels decoded, the same crop, bicubic): least, median. Larger "
        f"files ({larger} of each) are decoded at a fraction of their size.",
        "",
        "| side | KB | open_clip, `clip` | protoclip, `clip` | dB, `clip` | dB, `light` |",
        "|---|---|---|---|---|---|",
    ]
    for side in SIDES:
        column = "clip" if side == SIDES[0] else str(side)
        decibels = [
            f"{min(noise[side, name]):.1f}, {statistics.median(noise[side, name]):.1f}"
            for name in VIEWS
        ]
        lines.append(
            f"| {side} | {kilobytes[side]:.0f} | {spread(rates['open_clip', column])} | "
            f"{spread(rates['protoclip', column])} | {' | '.join(decibels)} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
