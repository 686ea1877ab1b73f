"""The pairs that a run is measured and shown on, and their embeddings by its model.

`checkpoints.py` measures how they are grouped, and `looks.py` shows what lies where.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
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
from protoclip.evaluation import datasets
from protoclip.evaluation.datasets import EvaluationData
from protoclip.evaluation.encoders import encoder_of
from protoclip.evaluation.features import Encoder, Reader
from protoclip.evaluation.grouping import measure
from protoclip.evaluation.validation import changed_since, is_asked, judged
from protoclip.files import checksum, to_json
from protoclip.models import loading, saved
from protoclip.models.protoclip import ProtoCLIP
from protoclip.training.plan import choose_few

T = TypeVar("T")
PAIRS_PER_GROUP = 5  # at least, in the mean
BATCH_SIZE = 256
CACHE_BYTES = 1 << 31  # of decoded images
# Unit-norm rows, by space (features, projections) and by `images` or `texts`.
Spaces = dict[str, dict[str, Float[Tensor, "n _"]]]


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Pairs to measure a model and to show it on.

    Attributes:
        images: Encoded.
        classes: The class of each pair, where the data have classes; then with `class_names`.
        groups: Pairs of one group fit each other, where the data say so.
        is_held_out: Whether the run was not trained on them, unless its data have `changed`.
        skipped: Number of samples that could not be read; `reason` is why one of them could not.
        changed: How the data of the run differ from those that it was trained on.
        key: Identifies the images, as `Images.key`; if empty, it is computed from them.
    """

    name: str
    images: Sequence[bytes]
    captions: Sequence[str]
    classes: Int[Tensor, " n"] | None = None
    class_names: Sequence[str] = ()
    templates: Sequence[str] = ("{c}",)
    groups: Sequence[int] | None = None
    is_held_out: bool = True
    skipped: int = 0
    reason: str = ""
    changed: str = ""
    key: str = ""
    _readers: "list[CachingReader]" = field(default_factory=list, repr=False)

    @property
    def notes(self) -> list[str]:
        """Warnings about these pairs, in sentences without a full stop."""
        lost = f"{self.skipped:,} pairs of {self.name} could not be read, such as {self.reason}"
        trained = f"its data have changed since it was trained ({self.changed}), so it may have "
        trained += f"been trained on pairs of {self.name}"
        return [lost] * bool(self.skipped) + [trained] * bool(self.changed)

    @property
    def digest(self) -> str:
        """Identifies the pairs by their content, in any order and under any name."""
        facts = [
            (checksum(image), caption)
            for image, caption in zip(self.images, self.captions, strict=True)
        ]
        return checksum(to_json(sorted(facts)).encode())

    def reader(self, transform: Callable[[Image.Image], Tensor]) -> "CachingReader":
        """Reads the images; for several models of one transform it is the same reader."""
        if not self._readers or self._readers[0].transform != transform:
            table = pa.table({"image": pa.array(self.images, pa.large_binary())})
            images = ImageTextPairs(table, name=self.name, caption_columns=())
            self._readers[:] = [CachingReader(images, transform, self.key)]
        return self._readers[0]

    def measure_grouping(
        self, rows: Mapping[str, Float[Tensor, "n _"]], num_groups: int, **more: Any
    ) -> tuple[dict[str, float], dict[str, Int[Tensor, "s n"]]]:
        """`grouping.measure` of a model's rows of `images` and `texts`."""
        return measure(
            rows["images"],
            rows["texts"],
            num_groups=num_groups,
            captions=self.captions,
            concepts=self.groups,
            content=self.images,
            **more,
        )


def open_examples(
    run: Path,
    config: Config,
    samples: int,
    *,
    data: DataConfig | None = None,
    allow_training: bool = False,
) -> Examples:
    """Pairs of a run's validation set, drawn evenly.

    It is the run's held-out pairs or, for the emoji, their validation split.

    Args:
        config: Settings of the run.
        samples: Most pairs to take.
        data: Other pairs, as `data.train`; the first ones of a stream.
        allow_training: If none are held out, take pairs that the run was trained on; for a run
            with `run.overfit`, those that it learned by heart.

    Raises:
        ValueError: The data are gone, cannot be read or hold too few pairs, or none are held out.
    """
    if data is not None and data.is_emoji:
        examples = draw_from_split(datasets.emoji(), samples)
    elif data is not None:
        examples = draw_from_source(sources.pairs(sources.allow_bad(Config(data=data))), samples)
    else:
        settings = sources.allow_bad(config)
        training, validation, _ = judged(settings, sources.pairs(settings))
        if allow_training and config.run.overfit is not None:
            training, validation = choose_few(training, config), []
        if validation:
            changed = find_changed_data(run, training)
            examples = replace(draw_from_split(validation[0], samples), changed=changed)
        elif allow_training:
            examples = replace(draw_from_source(training, samples), is_held_out=False)
        else:
            raise ValueError(f"{run}: no pairs are held out; name some with --data")
    if len(examples.images) < 2 * PAIRS_PER_GROUP:
        raise ValueError(
            f"{examples.name}: {len(examples.images)} pairs are too few; needs "
            + "; ".join([f"{2 * PAIRS_PER_GROUP}", *examples.notes])
        )
    return examples


def examples_key(config: Config, checkpoints: Sequence[Path]) -> str:
    """Identifies the pairs that a run is shown on: equal for runs that share their examples."""
    model = config.model  # its start may have been trained on some of the pairs
    starts = (model.start, model.image.name, model.text.name)
    few = config.run.overfit and (config.run.overfit, config.run.seed)
    trained_on: list[Any] = []
    with suppress(ValueError):  # damaged
        trained_on = [saved.facts_of(path, "content").get("sources") for path in checkpoints[-1:]]
    return repr((config.data, starts, config.loss.positives, is_asked(config), few, trained_on))


def find_changed_data(run: Path, training: Pairs | SampleStream) -> str:
    """How a run's data differ from those that it was trained on; empty if they are the same.

    If they differ, pairs that are held out now may have been trained on.
    """
    if not (isinstance(training, Pairs) and len(training.left_out)):
        return ""  # the validation set is another source
    with suppress(ValueError, LookupError, TypeError, AttributeError):  # its state is damaged
        return changed_since(run, training) or ""
    return ""


decode_image = partial(decode, max_pixels=MAX_IMAGE_PIXELS)


def read_all(
    read: Callable[[Any], T], items: Iterable[Any]
) -> tuple[list[T | None], dict[str, Any]]:
    """Read items by threads, with None for one that cannot be read.

    Also returns the number of those and the reason of the first, as fields of `Examples`.
    """

    def read_or_none(item: Any) -> tuple[T | None, str]:
        try:
            return read(item), ""
        except ValueError as error:  # BadSample too
            return None, str(error)

    with ThreadPoolExecutor() as pool:
        outcomes = list(pool.map(read_or_none, items))
    reasons = [reason for _, reason in outcomes if reason]
    lost = {"skipped": len(reasons), "reason": next(iter(reasons), "")}
    return [item for item, _ in outcomes], lost


def draw_from_source(source: Pairs | SampleStream, samples: int) -> Examples:
    """Pairs of a source, drawn evenly; of a stream the first ones."""
    if isinstance(source, Pairs):
        items: Iterable[Any] = evenly_spaced(len(source), min(samples, len(source)), seed=0)
    else:
        items = islice(source.samples(), samples)
    samples_read, lost = read_all(lambda item: read_image(source, item, decode_image)[0], items)
    good: dict[str, Sample] = {}  # a stream starts again at its end
    for sample in samples_read:
        if sample is not None:
            good.setdefault(sample.sample_id, sample)
    whole = isinstance(source, Pairs) and len(good) == len(source)
    return Examples(
        name=source.name,
        images=[sample.image for sample in good.values()],
        captions=[sample.captions[0] for sample in good.values()],
        key=getattr(source, "key", "") if whole else "",
        **lost,
    )


def draw_from_split(data: EvaluationData, samples: int) -> Examples:
    """Pairs of a run's validation set, drawn evenly."""
    split = data.splits["validation"]
    source: Any = split.images  # the data of a run always have encoded images and captions
    assert split.captions is not None

    def read_encoded(row: int) -> bytes:
        image: bytes = source.encoded(row)
        decode_image(image)  # raises if it is damaged
        return image

    chosen = evenly_spaced(len(source), min(samples, len(source)), seed=0)
    encoded, lost = read_all(read_encoded, chosen)
    images = {row: image for row, image in zip(chosen, encoded, strict=True) if image is not None}
    rows = [*images]
    return Examples(
        name=data.name,
        images=[*images.values()],
        captions=[split.captions[row][0] for row in rows],
        classes=None if split.labels is None else split.labels[rows],
        class_names=() if split.labels is None else data.class_names,
        templates=data.templates,
        groups=None if split.groups is None else [split.groups[row] for row in rows],
        key=source.key if rows == [*range(len(source))] else "",
        **lost,
    )


class CachingReader(Reader):
    """Decodes images only once, unless they take more memory than `CACHE_BYTES`."""

    def __init__(
        self, images: ImageTextPairs, transform: Callable[[Image.Image], Tensor], key: str
    ) -> None:
        super().__init__(images, transform)
        self.known_key = key
        self.cache: dict[int, tuple[Tensor | None, int]] = {}
        self.size = 0

    @property
    def key(self) -> str:
        return self.known_key or super().key

    def read(self, row: int) -> tuple[Tensor | None, int]:
        if row in self.cache:
            image, content = self.cache[row]
            return (None if self.knows(content) else image), content
        image, content = super().read(row)
        if image is not None and self.size + image.nbytes <= CACHE_BYTES:
            self.cache[row] = image, content
            self.size += image.nbytes
        return image, content


def embed_checkpoint(
    checkpoint: Path, pairs: Examples, *, project: bool, device: torch.device
) -> Spaces:
    """Load the model of a checkpoint and embed pairs, as `embed_examples`."""
    loaded, transform, tokenizer = loading.load(checkpoint)
    assert isinstance(loaded, ProtoCLIP)
    try:
        return embed_examples(loaded, transform, tokenizer, pairs, project=project, device=device)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from error


@torch.inference_mode()
def embed_examples(
    model: ProtoCLIP,
    transform: Callable[[Image.Image], Tensor],
    tokenizer: Callable[[list[str]], Tensor],
    pairs: Examples,
    *,
    project: bool,
    device: torch.device,
) -> Spaces:
    """`images` and `texts` of unit norm on the CPU: the `features`, and perhaps `projections`."""
    model = loading.to_device(model, device).eval()
    encoder = make_encoder(model, transform, tokenizer)
    images = encoder.images(pairs.reader(transform), stage="images").features
    texts = encoder.texts(pairs.captions, stage="texts")
    parts: dict[str, list[Tensor]] = {}
    batches = zip(torch.split(images, BATCH_SIZE), torch.split(texts, BATCH_SIZE), strict=True)
    for image, text in batches:
        embeddings = model.embeddings(image.to(device), text.to(device), project)
        for name, rows in vars(embeddings).items():
            if isinstance(rows, Tensor) and rows.ndim == 2:
                parts.setdefault(name, []).append(rows.float().cpu())
    tensors = {name: torch.cat(rows) for name, rows in parts.items()}
    if not all(rows.isfinite().all() for rows in tensors.values()):
        raise ValueError("the model's projections are not finite; it has diverged")
    return {
        space: {"images": tensors[f"image_{space}"], "texts": tensors[f"text_{space}"]}
        for space in ("features", "projections")
        if f"image_{space}" in tensors
    }


def make_encoder(
    model: ProtoCLIP,
    transform: Callable[[Image.Image], Tensor],
    tokenizer: Callable[[list[str]], Tensor],
) -> Encoder:
    """An encoder on the store that `evaluate` and `explore` use, too."""
    return encoder_of(
        model,
        transform,
        tokenizer,
        batch_size=BATCH_SIZE,
        workers=0,
        cache=cache_folder() / "features",
    )
