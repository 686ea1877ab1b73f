"""The pairs that a run is measured and shown on, and what its model makes of them.

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
KEPT_BYTES = 1 << 31  # of decoded images
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
        changed: In what the data of the run differ from those that it was trained on.
        key: Of the images, as `Images.key`; empty, it is made of them.
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

    def measure_grouping(
        self, rows: Mapping[str, Float[Tensor, "n _"]], num_groups: int, **more: Any
    ) -> tuple[dict[str, float], dict[str, Int[Tensor, "s n"]]]:
        """`grouping.measure` of what a model makes of the `images` and `texts`."""
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
    """Pairs of a run, drawn evenly; of a stream the first ones.

    Those that the run is judged by: its held-out pairs or, of the emoji, the validation split.

    Args:
        config: Of the run.
        samples: Pairs at most.
        data: Other pairs, as `data.train`.
        allow_training: Where none are held out, take pairs that the run was trained on; of a run
            that learns few pairs by heart take these.

    Raises:
        ValueError: The data are gone, cannot be read or hold too few pairs, or none are held out.
    """
    if data is not None and data.is_emoji:
        examples = draw_from_split(datasets.emoji(), samples)
    elif data is not None:
        examples = draw_from_source(sources.pairs(sources.to_look_at(Config(data=data))), samples)
    else:
        settings = sources.to_look_at(config)
        training, judged_by, _ = judged(settings, sources.pairs(settings))
        if allow_training and config.run.overfit is not None:
            training, judged_by = choose_few(training, config), []
        if judged_by:
            changed = changed_data(run, training)
            examples = replace(draw_from_split(judged_by[0], samples), changed=changed)
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
    """What decides which pairs a run is shown on: equal for runs that share their examples."""
    model = config.model  # what it starts from may have learned some of the pairs
    starts = (model.start, model.image.name, model.text.name)
    few = config.run.overfit and (config.run.overfit, config.run.seed)
    trained_on: list[Any] = []
    with suppress(ValueError):  # damaged
        trained_on = [saved.facts_of(each, "content").get("sources") for each in checkpoints[-1:]]
    return repr((config.data, starts, config.loss.positives, is_asked(config), few, trained_on))


def changed_data(run: Path, training: Pairs | SampleStream) -> str:
    """In what a run's data differ from those that it was trained on; empty if they are the same.

    Pairs held out of others need not be those that were held out of these.
    """
    if not (isinstance(training, Pairs) and len(training.left_out)):
        return ""  # pairs of another source judge the run
    with suppress(ValueError, LookupError, TypeError, AttributeError):  # its state is damaged
        return changed_since(run, training) or ""
    return ""


decode_image = partial(decode, max_pixels=MAX_IMAGE_PIXELS)


def read_all(
    read: Callable[[Any], T], items: Iterable[Any]
) -> tuple[list[T | None], dict[str, Any]]:
    """What `read` makes of each item, by threads; None for one that cannot be read.

    And how many these are, and why the first one is, as fields of `Examples`.
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
    """Pairs of what a run is judged by on the way, drawn evenly."""
    split = data.splits["validation"]
    source: Any = split.images  # the data of a run always have encoded images and captions
    assert split.captions is not None

    def read_encoded(row: int) -> bytes:
        image: bytes = source.encoded(row)
        decode_image(image)  # raises if it cannot be
        return image

    chosen = evenly_spaced(len(source), min(samples, len(source)), seed=0)
    encoded, lost = read_all(read_encoded, chosen)
    images = {row: each for row, each in zip(chosen, encoded, strict=True) if each is not None}
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


class KeptReader(Reader):
    """Decodes images only once, unless they take more memory than `KEPT_BYTES`."""

    def __init__(
        self, images: ImageTextPairs, transform: Callable[[Image.Image], Tensor], key: str
    ) -> None:
        super().__init__(images, transform)
        self.given_key = key
        self.decoded: dict[int, tuple[Tensor | None, int]] = {}
        self.size = 0

    @property
    def key(self) -> str:
        return self.given_key or super().key

    def read(self, row: int) -> tuple[Tensor | None, int]:
        if row in self.decoded:
            image, content = self.decoded[row]
            return (None if self.knows(content) else image), content
        image, content = super().read(row)
        if image is not None and self.size + image.nbytes <= KEPT_BYTES:
            self.decoded[row] = image, content
            self.size += image.nbytes
        return image, content


def embed_checkpoint(
    checkpoint: Path, pairs: Examples, *, project: bool, device: torch.device
) -> Spaces:
    """What the model of a checkpoint makes of pairs, as `embed_examples`."""
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
    joined = {name: torch.cat(rows) for name, rows in parts.items()}
    if not all(rows.isfinite().all() for rows in joined.values()):
        raise ValueError("the model's projections are not finite; it has diverged")
    return {
        space: {"images": joined[f"image_{space}"], "texts": joined[f"text_{space}"]}
        for space in ("features", "projections")
        if f"image_{space}" in joined
    }


def make_encoder(
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
