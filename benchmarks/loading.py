"""How fast are images decoded? Against open_clip's own pipeline and the reference's augmentation.

Makes photo-like JPEG files of 512 pixels (about 52 KB) in a temporary folder, and takes them to
normalised batches at 224 pixels in two ways, in turn: as open_clip does (PIL, then torchvision's
transforms one image at a time; for `light` those of ProtoCLIP's reference implementation), and as
`decode_crop` and our transforms do, with `finish` on the same core. Then how far our pixels are
from PIL's, larger files, and the loaders with worker processes.

    python benchmarks/loading.py [--images 128] [--repeats 9] [--workers 2] > FILE

With `--store` it compares something else: the same images as local files and in an S3 bucket, one
object each and in tar shards. The bucket is that of a server (moto's) on this machine.

    python benchmarks/loading.py --store [--images 128] [--repeats 9] > FILE
"""

import argparse
import datetime
import os
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import open_clip
import pyarrow as pa
import torch
import torchvision
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

from protoclip.data.access import read_file
from protoclip.data.decode import MemoryCache, decode_crop
from protoclip.data.loader import EpisodeLoader, Pass
from protoclip.data.pairs import ImageTextPairs, Sample
from protoclip.data.sampler import Episode
from protoclip.data.shards import ShardStream
from protoclip.data.tools import convert_image
from protoclip.data.transforms import TrainingTransform, clip_transform, light_transform
from protoclip.progress import Progress
from protoclip.training import watch

SIZE, BATCH, PACKED_SIDE = 224, 32, 256
PACKED = "the workers' part, images packed with `data pack --resize 256`"
SIDES = (512, 1024, 2048)
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
OURS = {
    "clip": clip_transform(size=SIZE, mean=MEAN, std=STD),
    "light": light_transform(size=SIZE, mean=MEAN, std=STD),
}
Rates = dict[tuple[str, str], list[float]]
THEIRS: dict[str, Callable[[Image.Image], Tensor]] = {
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
    for x, y, reach, *colour in draw.integers(0, (side, side, side // 5, 256, 256, 256), (12, 6)):
        pen.ellipse((x, y, x + reach, y + reach), outline=tuple(colour), width=3)
    image.save(path, "JPEG", quality=90, subsampling="4:2:0")


def collate(paths: list[Path], transform: Callable[[Image.Image], Tensor]) -> Tensor:
    """What open_clip's CSV data set and PyTorch's loader do to a batch."""
    return torch.stack([transform(Image.open(path)) for path in paths])


def theirs(paths: list[Path], transform: Callable[[Image.Image], Tensor]) -> None:
    for first in range(0, len(paths), BATCH):
        collate(paths[first : first + BATCH], transform)


def ours(
    paths: list[Path],
    transform: TrainingTransform,
    *,
    finish: bool = True,
    memory: MemoryCache | None = None,
) -> None:
    crop = memory.crop if memory else decode_crop
    for first in range(0, len(paths), BATCH):
        batch = paths[first : first + BATCH]
        draws = torch.rand(len(batch), transform.num_draws)
        crops = []
        for path, drawn in zip(batch, draws.numpy(), strict=True):
            box = partial(transform.box, draws=drawn)
            crops.append(crop(path.read_bytes(), box, SIZE))
        images = torch.from_numpy(np.stack(crops))
        if finish:
            transform.finish(images, draws)


def rate(work: Callable[[], None], images: int) -> float:
    """Images a second of processor time, which other programs do not lengthen."""
    start = time.process_time()
    work()
    return images / (time.process_time() - start)


def psnr(path: Path, transform: TrainingTransform, draws: np.ndarray) -> float:
    """Our crop against PIL's: all pixels, the same box, one bicubic resize."""
    box = partial(transform.box, draws=draws)
    found = decode_crop(path.read_bytes(), box, SIZE)
    image = Image.open(path).convert("RGB")
    cropped = image.crop(box(*image.size))
    expected = np.asarray(cropped.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    error = ((found.astype(np.float64) - expected) ** 2).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def their_loader(paths: list[Path], name: str, workers: int) -> int:
    load = partial(collate, transform=THEIRS[name])
    loader = DataLoader(paths, batch_size=BATCH, num_workers=workers, collate_fn=load)  # type: ignore[arg-type]
    return sum(map(len, loader))


def our_loader(paths: list[Path], name: str, workers: int) -> int:
    table = pa.table({"path": [str(path) for path in paths], "caption": ["a"] * len(paths)})
    loader = EpisodeLoader(
        pairs=ImageTextPairs(table, name="images", root=str(paths[0].parent)),
        tokenizer=lambda texts: torch.zeros(len(texts), 8, dtype=torch.int64),
        transform=OURS[name],
        batch_size=BATCH,
        seed=0,
        device=torch.device("cpu"),
        workers=workers,
    )
    episode = Episode(index=0, rows=torch.arange(len(paths)))
    return sum(len(batch.image) for batch in loader.batches(Pass(episode)))


@contextmanager
def bucket() -> Iterator[str]:
    """The URL of an empty bucket, of a server in a process of its own, as s3fs finds it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port]
    names = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
    values = (f"http://127.0.0.1:{port}", "anybody", "anything", "us-east-1")
    os.environ.update(zip(names, values, strict=True))
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(240):
                with suppress(OSError), socket.create_connection(("127.0.0.1", int(port)), 1):
                    break
                time.sleep(0.25)
            fsspec.filesystem("s3").mkdir("bucket")
            yield "s3://bucket"
        finally:
            server.terminate()


def from_files(locations: list[str]) -> Iterator[bytes]:
    return (read_file(location) for location in locations)


def from_shards(pattern: str, count: int) -> Iterator[bytes]:
    stream = ShardStream(pattern, seed=0, shuffle=BATCH)
    items = stream.samples()
    for item in islice(items, count):
        assert isinstance(item, Sample), item
        yield item.image
    items.close()


def decoded(images: Callable[[], Iterator[bytes]]) -> None:
    """The workers' part: reading, decoding, cropping."""
    transform = OURS["clip"]
    for data in images():
        draws = torch.rand(1, transform.num_draws).numpy()[0]
        decode_crop(data, partial(transform.box, draws=draws), SIZE)


def compare_stores(count: int, repeats: int) -> None:
    """Print images a second from local files and from a bucket."""
    rates: Rates = {}
    with tempfile.TemporaryDirectory() as temporary, bucket() as url:
        folder = Path(temporary)
        paths = [folder / f"{number}.jpg" for number in range(count)]
        for number, path in enumerate(paths):
            write_photo(path, number, SIDES[0])
        for shard, first in enumerate(range(0, count, BATCH)):
            with tarfile.open(folder / f"{shard}.tar", "w") as tar:
                for path in paths[first : first + BATCH]:
                    caption = path.with_suffix(".txt")
                    caption.write_text("a")
                    for member in (path, caption):
                        tar.add(member, member.name)
        fsspec.filesystem("s3").put([*map(str, [*paths, *folder.glob("*.tar")])], f"{url}/")
        arms: dict[tuple[str, str], Callable[[], Iterator[bytes]]] = {}
        for place, root in (("local", temporary), ("s3", url)):
            arms[place, "files"] = partial(from_files, [f"{root}/{path.name}" for path in paths])
            shards = f"{root}/{{0..{(count - 1) // BATCH}}}.tar"
            arms[place, "shards"] = partial(from_shards, shards, count)
        progress = Progress("benchmark: stores", 1 + repeats)
        for repeat in range(1 + repeats):
            for arm, images in arms.items():
                value = rate(partial(decoded, images), count)
                if repeat > 0:
                    rates.setdefault(arm, []).append(value)
            progress.update(repeat + 1)
    print(
        "# Loading from a store: images a second for a core\n\n"
        f"`python benchmarks/loading.py --store --images {count} --repeats {repeats}`, "
        f"{datetime.date.today().isoformat()}; s3fs {version('s3fs')}, moto {version('moto')} on "
        f"the same machine. {count} JPEG files of {SIDES[0]} pixels, read, decoded and cropped to "
        f"{SIZE}. Median [least, most] of {repeats} rounds, in turn, per second of processor time "
        "of the reading process, its client of S3 included and the server not; ratios are of "
        "medians, to local files. A network adds its delay to each request, of which an object "
        "takes one; workers wait for it side by side.\n\n"
        "| images a second | local | S3 | ratio |\n|---|---|---|---|"
    )
    for kind, label in (("files", "a file or object each"), ("shards", "tar shards, streamed")):
        local, there = rates["local", kind], rates["s3", kind]
        ratio = statistics.median(there) / statistics.median(local)
        print(f"| {label} | {spread(local)} | {spread(there)} | {ratio:.2f} |")


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} [{min(values):.0f}, {max(values):.0f}]"


def row(label: str, arm: str, base: str, rates: Rates) -> str:
    cells = [
        f"{spread(rates[arm, name])} | "
        f"{statistics.median(rates[arm, name]) / statistics.median(rates[base, name]):.2f}"
        for name in OURS
    ]
    return f"| {label} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--store", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.store:
        compare_stores(arguments.images, arguments.repeats)
        return
    count, workers = arguments.images, arguments.workers
    larger = max(8, count // 8)
    rates: Rates = {}
    with tempfile.TemporaryDirectory() as folder:
        paths: dict[int, list[Path]] = {}
        for side in SIDES:
            numbers = range(count if side == SIDES[0] else larger)
            paths[side] = [Path(folder) / f"{side}_{number}.jpg" for number in numbers]
            for number, path in enumerate(paths[side]):
                write_photo(path, number, side)
        small = paths[SIDES[0]]
        packed = [path.with_name(f"packed_{path.name}") for path in small]
        for path, target in zip(small, packed, strict=True):
            target.write_bytes(convert_image(path.read_bytes(), PACKED_SIDE)[1])
        memory = MemoryCache(max_bytes=10**10)
        variants: dict[str, dict[str, object]] = {
            "protoclip, finished on the same core": {},
            "protoclip, the workers' part (an accelerator finishes)": {"finish": False},
            "the workers' part, images kept in memory": {"finish": False, "memory": memory},
        }
        arms: dict[tuple[str, str], tuple[Callable[[], None], int]] = {}
        for name, transform in OURS.items():
            arms["theirs", name] = partial(theirs, small, THEIRS[name]), count
            for label, settings in variants.items():
                arms[label, name] = partial(ours, small, transform, **settings), count  # type: ignore[arg-type]
            arms[PACKED, name] = partial(ours, packed, transform, finish=False), count
        for side in SIDES[1:]:
            arms["theirs", str(side)] = partial(theirs, paths[side], THEIRS["clip"]), larger
            arms["ours", str(side)] = partial(ours, paths[side], OURS["clip"]), larger
        progress = Progress("benchmark: loading", 1 + arguments.repeats)
        for repeat in range(1 + arguments.repeats):
            for arm, (work, images) in arms.items():
                value = rate(work, images)
                if repeat > 0:  # the first round warms up, and fills the caches
                    rates.setdefault(arm, []).append(value)
            progress.update(repeat + 1)
        noise: Rates = {}
        for side in SIDES:
            for name, transform in OURS.items():
                draws = np.random.default_rng(side).random((len(paths[side]), 13), np.float32)
                pairs = zip(paths[side], draws, strict=True)
                noise[str(side), name] = [psnr(path, transform, drawn) for path, drawn in pairs]
        many = 8 * small
        loaders: Rates = {}
        for _ in range(3):
            for name in OURS:
                for owner, load in (("theirs", their_loader), ("ours", our_loader)):
                    start = time.perf_counter()
                    value = load(many, name, workers) / (time.perf_counter() - start)
                    loaders.setdefault((owner, name), []).append(value)

    facts = watch.describe_environment(torch.device("cpu"))
    lines = [
        "# Loading: images a second for a core",
        "",
        f"`python benchmarks/loading.py --images {count} --repeats {arguments.repeats} "
        f"--workers {workers}`, {datetime.date.today().isoformat()}; {facts['device']}, torch "
        f"{facts['torch']}, torchvision {torchvision.__version__}, Pillow {Image.__version__}, "
        f"open_clip {open_clip.__version__}. {count} JPEG files of {SIDES[0]} pixels "
        f"to batches of {BATCH} at {SIZE} pixels. Median [least, most] of {arguments.repeats} "
        "rounds, pipelines in turn, per "
        "second of processor time of one thread; ratios are of medians, to the first row.",
        "",
        "| one core | `clip` | ratio | `light` | ratio |",
        "|---|---|---|---|---|",
        row("PIL and torchvision: open_clip; the reference's light", "theirs", "theirs", rates),
        *(row(label, label, "theirs", rates) for label in (*variants, PACKED)),
        "",
        f"End to end with {workers} worker processes on {os.cpu_count()} cores: {len(many)} "
        "samples, start of the processes included; of 3 rounds.",
        "",
        "| images a second | `clip` | ratio | `light` | ratio |",
        "|---|---|---|---|---|",
        row("PyTorch's loader over open_clip's CSV data set", "theirs", "theirs", loaders),
        row("`EpisodeLoader`", "ours", "theirs", loaders),
        "",
        "Pixels against PIL's (all pixels decoded, the same crop, bicubic): least, median. Larger "
        f"files ({larger} of each) are decoded at a fraction of their size.",
        "",
        "| side | open_clip, `clip` | protoclip, `clip` | dB, `clip` | dB, `light` |",
        "|---|---|---|---|---|",
    ]
    first = next(iter(variants))
    rates["theirs", str(SIDES[0])], rates["ours", str(SIDES[0])] = (
        rates[arm, "clip"] for arm in ("theirs", first)
    )
    for side in map(str, SIDES):
        cells = [side, *(spread(rates[arm, side]) for arm in ("theirs", "ours"))]
        found = [noise[side, name] for name in OURS]
        cells += [f"{min(rates):.1f}, {statistics.median(rates):.1f}" for rates in found]
        lines.append(f"| {' | '.join(cells)} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
