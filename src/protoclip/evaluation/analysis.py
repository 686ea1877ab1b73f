"""The grouping of a run's representations over its checkpoints: what `protoclip analyze` does.

The measures are in `grouping.py`, and their figures in `analysis_figure.py`.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from protoclip.config import Config, DataConfig
from protoclip.data import sources
from protoclip.data.decode import decode
from protoclip.data.index import cache_folder
from protoclip.data.loader import read_image
from protoclip.data.pairs import MAX_IMAGE_PIXELS, ImageTextPairs, Pairs, Sample, SampleStream
from protoclip.data.sampler import evenly_spaced
from protoclip.data.view import PairsView
from protoclip.evaluation import datasets
from protoclip.evaluation.datasets import EvaluationData
from protoclip.evaluation.encoders import encoder_of
from protoclip.evaluation.features import NONE, Batch, Encoder, Reader
from protoclip.evaluation.grouping import MODALITIES, Assignments, group_sizes, measure
from protoclip.evaluation.validation import changed_since, judged
from protoclip.files import checksum, to_json
from protoclip.models import loading, saved
from protoclip.models.protoclip import ProtoCLIP
from protoclip.progress import Progress
from protoclip.prototypes.nearest import nearest

T = TypeVar("T")
PAIRS_PER_GROUP = 5  # at least, in the mean
BATCH_SIZE = 256
KEPT_BYTES = 1 << 31  # of decoded images
# Unit-norm rows, by space (features, projections) and by `images` or `texts`.
Spaces = dict[str, dict[str, Float[Tensor, "n _"]]]
HINT = "train with --run.save_steps N --run.keep_checkpoints 100"


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Pairs to analyse, and the class of each where the data has classes."""

    name: str
    images: Sequence[bytes]  # encoded
    captions: Sequence[str]
    classes: Int[Tensor, " n"] | None
    skipped: int  # samples that could not be read
    reason: str = ""  # why one of these could not
    changed: str = ""  # in what the run's data differ from those that it was trained on
    groups: Sequence[int] | None = None  # pairs of one group fit each other, where data say so
    key: str = ""  # of the images, as `Images.key`; unset, it is made of them
    _readers: "list[KeptReader]" = field(default_factory=list, repr=False)

    @property
    def notes(self) -> list[str]:
        """What to know of these pairs, in sentences without an end."""
        lost = f"{self.skipped:,} pairs of {self.name} could not be read, such as {self.reason}"
        trained = f"its data have changed since it was trained ({self.changed}), so it may have "
        trained += f"been trained on pairs of {self.name}"
        return [lost] * bool(self.skipped) + [trained] * bool(self.changed)

    @property
    def digest(self) -> str:
        """Identifies the pairs by their content, in any order, whatever they are called."""
        facts = [
            (checksum(image), caption)
            for image, caption in zip(self.images, self.captions, strict=True)
        ]
        return checksum(to_json(sorted(facts)).encode())

    def reader(self, transform: Callable[[Image.Image], Tensor]) -> "KeptReader":
        """Reads the images; for several models of one transform it is the same reader."""
        if not self._readers or self._readers[0].transform != transform:
            table = pa.table({"image": pa.array(self.images, pa.large_binary())})
            images = ImageTextPairs(table, name=self.name, caption_columns=())
            self._readers[:] = [KeptReader(images, transform, self.key)]
        return self._readers[0]


class KeptReader(Reader):
    """Decodes images by threads, and only once unless they take more memory than `KEPT_BYTES`."""

    def __init__(
        self, images: ImageTextPairs, transform: Callable[[Image.Image], Tensor], key: str
    ) -> None:
        super().__init__(images, transform)
        self.given_key = key
        self.kept: dict[range, tuple[Tensor, tuple[int, ...]]] = {}

    @property
    def key(self) -> str:
        return self.given_key or super().key

    def __getitem__(self, rows: range) -> Batch:
        pixels, keys = self.kept[rows] if rows in self.kept else self._decode(rows)
        needed = [row for row, key in enumerate(keys) if not self.knows(key)]
        return pixels[needed], [], [*zip(rows, keys, strict=True)]

    def _decode(self, rows: range) -> tuple[Tensor, tuple[int, ...]]:
        """All of these images, and their content."""
        with ThreadPoolExecutor() as pool:
            pixels, keys = zip(*pool.map(self.without(NONE).read, rows), strict=True)
        decoded = torch.stack(pixels), keys
        kept = sum(tensor.nbytes for tensor, _ in self.kept.values())
        if kept + decoded[0].nbytes <= KEPT_BYTES:
            self.kept[rows] = decoded
        return decoded


def analyze(
    run: Path,
    *,
    data: DataConfig | None = None,
    samples: int = 5000,
    num_groups: int | None = None,
    allow_links: bool = False,
    device: torch.device,
) -> dict[str, Any]:
    """Measure every checkpoint of a run on held-out pairs.

    Features always; projections too if the run trains its heads. `prototypes/...` are the sizes of
    the run's own prototypes, where a checkpoint has some: how many held-out samples are nearest to
    each. `measure` describes the other values.

    Args:
        run: A run folder.
        data: The pairs as `data.train`, and how they are read, with an `allow_links` of its own; of
            the emoji their validation split. Unset, what the run is judged by: its held-out pairs,
            or that split.
        samples: Pairs to use at most, drawn evenly; of a stream the first ones.
        num_groups: Groups of each modality; else the run's number of prototypes, but at least five
            pairs to a group.
        allow_links: As in `data`, for the run's own pairs; its folder does not grant it.

    Returns:
        A JSON value. Its `digest` is equal for equal pairs; versions up to 1.0.0 wrote none.

    Raises:
        ValueError: This is no run, it has no checkpoint or no held-out data, or pairs or groups are
            too few.
    """
    config, checkpoints = open_run(run)
    config = replace(config, data=replace(config.data, allow_links=allow_links))
    pairs = held_out(run, config, data, samples)
    if len(pairs.images) < 2 * PAIRS_PER_GROUP:
        least = 2 * PAIRS_PER_GROUP
        notes = "".join(f"; {note}" for note in pairs.notes)
        raise ValueError(
            f"{pairs.name}: {len(pairs.images)} pairs are too few; needs {least}{notes}"
        )
    most = len(pairs.images) // PAIRS_PER_GROUP
    number = num_groups or min(config.prototypes.number or most, most)
    if not 2 <= number <= most:
        raise ValueError(f"{number} groups: choose from 2 to {most} with --groups")
    entries, before = [], dict[str, Assignments]()
    progress = Progress(f"analyze {config.run.name}", len(checkpoints))
    for done, checkpoint in enumerate(checkpoints, 1):
        step = int(checkpoint.name.removeprefix("step-"))
        entry: dict[str, Any] = {"step": step, "samples": step * config.episodes.batch_size}
        spaces = embed(checkpoint, pairs, project=config.uses_prototypes, device=device)
        for space, rows in spaces.items():
            entry[space], before[space] = measure(
                **rows,
                num_groups=number,
                captions=pairs.captions,
                concepts=pairs.groups,
                content=pairs.images,
                classes=pairs.classes,
                previous=before.get(space),
                seed=config.run.seed,
            )
        of_run = run_prototypes(checkpoint) if "projections" in spaces else {}
        for modality, centroids in of_run.items():
            projections = spaces["projections"][f"{modality}s"]
            sizes = group_sizes(nearest(projections, centroids)[0], len(centroids))
            named = {f"prototypes/{name}/{modality}": size for name, size in sizes.items()}
            entry["projections"].update(named)
        entries.append(entry)
        progress.update(done)
    return {
        "name": config.run.name,
        "seed": config.run.seed,
        "folder": str(run),
        "data": pairs.name,
        "pairs": len(pairs.images),
        "digest": pairs.digest,
        "skipped": pairs.skipped,
        "notes": pairs.notes,
        "groups": number,
        "checkpoints": entries,
    }


def open_run(run: Path) -> tuple[Config, list[Path]]:
    """The settings of a run and its checkpoints, oldest first.

    Raises:
        ValueError: This is no run, or it has no checkpoint.
    """
    if not (run / saved.SETTINGS).is_file():
        raise ValueError(f"{run}: not a run folder, which has a {saved.SETTINGS}")
    config = saved.read_config(run)
    checkpoints = saved.checkpoints(run)
    if not checkpoints:
        raise ValueError(f"{run}: no checkpoint to analyse; {HINT}")
    return config, checkpoints


def held_out(run: Path, config: Config, data: DataConfig | None, samples: int) -> HeldOut:
    """Pairs that the run has not trained on, as `analyze` describes them."""
    if data is not None and data.is_emoji:
        return of_split(datasets.emoji(), samples)
    if data is not None:
        named = sources.to_look_at(Config(data=data))
        return of_source(sources.pairs(named), samples)
    config = sources.to_look_at(config)
    training, judged_by, _ = judged(config, sources.pairs(config))
    if not judged_by:
        raise ValueError(f"{run}: no pairs are held out; name some with --data")
    return replace(of_split(judged_by[0], samples), changed=changed_data(run, training))


def changed_data(run: Path, training: Pairs | SampleStream) -> str:
    """In what a run's data differ from those that it was trained on; empty if they are the same.

    Pairs held out of others need not be those that were held out of these.
    """
    if not (isinstance(training, PairsView) and len(training.left_out)):
        return ""  # pairs of another source judge the run
    with suppress(ValueError, LookupError, TypeError, AttributeError):  # its state is damaged
        return changed_since(run, training) or ""
    return ""


decoded = partial(decode, max_pixels=MAX_IMAGE_PIXELS)


def read_all(
    read: Callable[[Any], T], items: Iterable[Any]
) -> tuple[list[T | None], dict[str, Any]]:
    """What `read` makes of each item, by threads; None for one that cannot be read.

    And how many these are, and why the first one is, as fields of `HeldOut`.
    """

    def read_or_none(item: Any) -> tuple[T | None, str]:
        try:
            return read(item), ""
        except ValueError as error:  # BadSample too
            return None, str(error)

    with ThreadPoolExecutor() as pool:
        made = list(pool.map(read_or_none, items))
    reasons = [reason for _, reason in made if reason]
    lost = {"skipped": len(reasons), "reason": next(iter(reasons), "")}
    return [each for each, _ in made], lost


def of_source(source: Pairs | SampleStream, samples: int) -> HeldOut:
    """Pairs of a source, drawn evenly; of a stream the first ones."""
    if isinstance(source, Pairs):
        items: Iterable[Any] = evenly_spaced(len(source), min(samples, len(source)), seed=0)
    else:
        items = islice(source.samples(), samples)
    read, lost = read_all(lambda item: read_image(source, item, decoded)[0], items)
    good: dict[str, Sample] = {}  # a stream starts again at its end
    for sample in read:
        if sample is not None:
            good.setdefault(sample.sample_id, sample)
    whole = isinstance(source, Pairs) and len(good) == len(source)
    return HeldOut(
        name=source.name,
        images=[sample.image for sample in good.values()],
        captions=[sample.captions[0] for sample in good.values()],
        classes=None,
        key=getattr(source, "key", "") if whole else "",
        **lost,
    )


def of_split(data: EvaluationData, samples: int) -> HeldOut:
    """Pairs of what a run is judged by on the way, drawn evenly."""
    split = data.splits["validation"]
    source: Any = split.images  # the data of a run always have encoded images and captions
    assert split.captions is not None

    def encoded(row: int) -> bytes:
        image: bytes = source.encoded(row)
        decoded(image)  # raises if it cannot be
        return image

    chosen = evenly_spaced(len(source), min(samples, len(source)), seed=0)
    read, lost = read_all(encoded, chosen)
    images = {row: each for row, each in zip(chosen, read, strict=True) if each is not None}
    rows = [*images]
    return HeldOut(
        name=data.name,
        images=[*images.values()],
        captions=[split.captions[row][0] for row in rows],
        classes=None if split.labels is None else split.labels[rows],
        groups=None if split.groups is None else [split.groups[row] for row in rows],
        key=source.key if rows == [*range(len(source))] else "",
        **lost,
    )


def embed(checkpoint: Path, pairs: HeldOut, *, project: bool, device: torch.device) -> Spaces:
    """What the model of a checkpoint makes of pairs, as `embed_with`."""
    loaded, transform, tokenizer = loading.load(checkpoint)
    assert isinstance(loaded, ProtoCLIP)
    try:
        return embed_with(loaded, transform, tokenizer, pairs, project=project, device=device)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from error


@torch.inference_mode()
def embed_with(
    model: ProtoCLIP,
    transform: Callable[[Image.Image], Tensor],
    tokenizer: Callable[[list[str]], Tensor],
    pairs: HeldOut,
    *,
    project: bool,
    device: torch.device,
) -> Spaces:
    """`images` and `texts` of unit norm on the CPU: the `features`, and perhaps `projections`."""
    model = loading.to_device(model, device).eval()
    encoder = keeping_encoder(model, transform, tokenizer)
    images = encoder.images(pairs.reader(transform), stage="images").features
    texts = encoder.texts(pairs.captions, stage="texts")
    parts: dict[str, list[Tensor]] = {}
    for image, text in zip(*(torch.split(of, BATCH_SIZE) for of in (images, texts)), strict=True):
        embeddings = model.embeddings(image.to(device), text.to(device), project)
        for name, rows in vars(embeddings).items():
            if isinstance(rows, Tensor) and rows.ndim == 2:
                parts.setdefault(name, []).append(rows.float().cpu())
    joined = {name: torch.cat(rows) for name, rows in parts.items()}
    if not all(rows.isfinite().all() for rows in joined.values()):
        raise ValueError("the model's projections are not finite; it has diverged")
    return {
        space: {"images": joined[f"image_{space}"], "texts": joined[f"text_{space}"]}
        for space in ("features", "projections")
        if f"image_{space}" in joined
    }


def keeping_encoder(
    model: ProtoCLIP,
    transform: Callable[[Image.Image], Tensor],
    tokenizer: Callable[[list[str]], Tensor],
) -> Encoder:
    """Encodes what `evaluate` and `explore` have not encoded yet, since all share a store."""
    return encoder_of(
        model,
        transform,
        tokenizer,
        batch_size=BATCH_SIZE,
        workers=0,
        cache=cache_folder() / "features",
    )


def run_prototypes(checkpoint: Path) -> dict[str, Float[Tensor, "k p"]]:
    """The prototypes of images and of texts that a checkpoint of a run holds."""
    clusters = saved.read_clusters(checkpoint)
    return {name: clusters[name][0].float() for name in MODALITIES if name in clusters}
