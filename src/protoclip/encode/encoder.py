"""Frozen models that turn captions or images into teacher features, and the pass over a data set.

The pass writes parts (see `parts.py`). At the end the first rank joins them into a teacher folder
(see `store.py`), after PCA if asked. The features of data sets that judge a model are made in
`evaluation/features.py`.
"""

import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from protoclip.data.access import is_url
from protoclip.data.captions import trim_padding
from protoclip.data.content import Facts, content
from protoclip.data.decode import decode
from protoclip.data.loader import Item, read_sample
from protoclip.data.pairs import MAX_IMAGE_PIXELS, BadSample, Pairs, Sample, SampleStream
from protoclip.distributed import parallel
from protoclip.distributed.collectives import raise_on_all_ranks, rank0_first
from protoclip.encode import store, teachers
from protoclip.encode.parts import (
    PARTS,
    Part,
    Show,
    begun_precision,
    claim,
    encode_missing,
    identity,
    parts_of,
    prepare_images,
    read_note,
    read_part,
    write_skipped,
)
from protoclip.encode.teachers import local_copy
from protoclip.encode.whiten import Features, fit_pca
from protoclip.files import checksum, file_checksum, locked
from protoclip.models import loading
from protoclip.models.batch_norm import layers_of
from protoclip.models.frozen import Pooling, open_frozen_encoder
from protoclip.models.loading import to_device
from protoclip.models.precision import (
    Autocast,
    Precision,
    autocast_encoding,
    autocast_on_card,
    resolve_encoding,
)
from protoclip.models.tokenizers import TELLING
from protoclip.terminal import without_secrets

PART_ROWS = {"text": 8192, "image": 2048}
EXAMPLES = ("a photo of a red dog", "two words")  # texts that tell models apart
RAMP = np.arange(96 * 64 * 3, dtype=np.uint8).reshape(64, 96, 3)  # an image that does
SKIPPED = "skipped.jsonl"
# Ids of samples that could be read, their features, and what is wrong with the others.
EncodedSamples = tuple[list[str], Float[Tensor, "n q"], list[dict[str, str]]]


@dataclass(kw_only=True)
class Encoder:
    """A frozen model of one modality.

    Attributes:
        module: In evaluation mode, on its device.
        reads: What it encodes, `image` or `text`.
        prepare: The input that a sample is; raises `ValueError` for a bad one.
        forward: Inputs to features of any norm, on the device.
        examples: Inputs that tell one model from another.
        facts: What the inputs depend on, as text.
        unit_norm: Bring features to norm 1.
        autocast: Makes the context of forward passes.
    """

    module: Any
    device: torch.device
    reads: Literal["image", "text"]
    prepare: Callable[[Sample], Any]
    forward: Callable[[list[Any]], Tensor]
    examples: Sequence[Any]
    facts: Callable[[], str]
    unit_norm: bool = True
    autocast: Autocast = nullcontext

    def encode(self, inputs: list[Any]) -> Float[Tensor, "b q"]:
        """Features in float32 on the CPU."""
        with parallel.without_gradients(self.module):
            with self.autocast():
                features = self.forward(inputs)
            features = features.float()
            return (F.normalize(features, dim=-1) if self.unit_norm else features).cpu()

    @cached_property
    def width(self) -> int:
        return self.encode([*self.examples]).shape[1]

    def key(self, weights: str | None = None) -> str:
        """Identifies the model, and how it reads images or captions.

        Weights alone do not: activations and numbers of heads have none. So the structure counts
        too, and the features of examples, to three digits, since the last ones depend on the
        hardware.

        Args:
            weights: Their `checksum`, if it is known.
        """
        values = self.encode([*self.examples])[:, :16].flatten().tolist()
        first = " ".join(f"{value:.3g}" for value in values)
        facts = f"{self.reads} {layers_of(self.module)} {self.facts()}"
        facts += "" if self.autocast is nullcontext else repr(self.autocast)
        facts = re.sub(r" at 0x[0-9a-f]+", "", facts)  # functions show their address in memory
        return checksum(f"{weights or self.checksum()} {facts} {first}".encode())

    def checksum(self, *, without: str | None = None) -> str:
        """A checksum of the weights, except those with these letters in their names."""
        weights = sorted(self.module.state_dict().items())
        weights = [(name, w) for name, w in weights if without is None or without not in name]
        raw = ((name, value.cpu().reshape(-1).view(torch.uint8)) for name, value in weights)
        return checksum(
            "".join(name + checksum(one.numpy().tobytes()) for name, one in raw).encode()
        )


def freeze(module: Any, device: torch.device) -> Any:
    """A model in float32 for evaluation alone, on the device."""
    module = module.float().eval().requires_grad_(False)
    return to_device(module, device) if device.type == "cuda" else module.to(device)


def text_encoder(
    module: Any,
    device: torch.device,
    tokenizer: Callable[[list[str]], Any],
    forward: Callable[[Any], Tensor],
    *,
    facts: str = "",
    **settings: Any,
) -> Encoder:
    """The encoder of a frozen text model.

    Args:
        tokenizer: Texts to a batch.
        forward: A batch to features.
        facts: What else tells it from other models.
        settings: Those of `Encoder`.
    """
    cuts_padding = getattr(module, "ignores_padding", False)

    def encode(texts: list[str]) -> Tensor:
        batch = tokenizer(texts)
        return forward((trim_padding(batch) if cuts_padding else batch).to(device))

    return Encoder(
        module=module,
        device=device,
        reads="text",
        prepare=lambda sample: sample.captions[0],
        forward=encode,
        examples=EXAMPLES,
        facts=lambda: f"{facts} {as_text(tokenizer([*EXAMPLES, TELLING]))}",
        **settings,
    )


def as_text(batch: Any) -> str:
    """What a tokenizer makes of texts, as text."""
    values = {"tokens": batch} if isinstance(batch, Tensor) else batch
    return str({name: each.tolist() for name, each in values.items()})


def image_encoder(
    module: Any,
    device: torch.device,
    forward: Callable[[Tensor], Tensor],
    transform: Callable[[Image.Image], Tensor],
    *,
    max_pixels: int = MAX_IMAGE_PIXELS,
    **settings: Any,
) -> Encoder:
    """The encoder of a frozen image model; images with more than `max_pixels` are bad."""

    def prepare(sample: Sample) -> Tensor:
        return transform(Image.fromarray(decode(sample.image, max_pixels=max_pixels)))

    return Encoder(
        module=module,
        device=device,
        reads="image",
        prepare=prepare,
        forward=lambda images: forward(torch.stack(images).to(device)),
        examples=[transform(Image.fromarray(RAMP))],
        facts=lambda: repr(transform),
        **settings,
    )


def open_encoder(
    teacher: str,
    *,
    modality: str,
    pooling: Pooling,
    device: torch.device,
    setting: str = "",
) -> Encoder:
    """Open a frozen model on a device; the arguments are those of `open_frozen_encoder`."""
    opened = open_frozen_encoder(teacher, modality=modality, pooling=pooling, setting=setting)
    module, autocast = freeze(opened.module, device), autocast_on_card("auto", device)
    if opened.prepare is None:
        return text_encoder(
            module, device, opened.collate, opened.forward, facts=pooling, autocast=autocast
        )
    return image_encoder(module, device, opened.forward, opened.prepare, autocast=autocast)


def embed_teacher(
    teacher: str,
    samples: Pairs | SampleStream,
    out: Path,
    *,
    modality: Literal["auto", "text", "image"] = "auto",
    pooling: Pooling = "mean",
    width: int | None = None,
    batch_size: int = 256,
    device: torch.device,
    precision: Literal["auto"] | Precision = "auto",
    num_samples: int | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Make a teacher folder for a data set, or finish one. All ranks call it.

    A sample with several captions gets the mean of their features.

    Args:
        teacher: A frozen model (see `open_encoder`), or a file of features (see `read_teacher`).
        out: A new folder, or that of an earlier call with the same arguments.
        modality: What the model reads; `auto` takes the image tower of a model with two.
        pooling: How a Hugging Face model's tokens become one feature.
        width: Dimensions kept by PCA; all if unset.
        precision: Of forward passes; `auto` is that of what was begun there, else bf16 or fp16 on a
            card, as in training, and fp32 elsewhere.
        num_samples: Samples to read of a stream.
        threads: How many read images; one a core if unset.

    Returns:
        The facts: settings, `rows`, `width`, `bad` (samples without features,
        listed in `skipped.jsonl`), and after PCA `variance_kept`.

    Raises:
        ValueError: The teacher, the ids or the folder cannot be used.
    """
    is_stream = isinstance(samples, SampleStream)

    def identified() -> tuple[list[str], dict[str, Any]]:
        ids = [] if isinstance(samples, SampleStream) else list(samples.sample_ids())
        store.build_index(
            store.hash_ids(ids), ids.__getitem__, name=samples.name
        )  # refuses duplicates
        return ids, identity(samples, ids, num_samples)

    ids, known = raise_on_all_ranks(identified)
    settings = {"teacher": without_secrets(teacher), **known, "reduced_to": width}
    with ExitStack() as stack:
        rank0_first(lambda: stack.enter_context(locked(out)))
        if Path(teacher.partition("?")[0] if is_url(teacher) else teacher).suffix in teachers.FILES:
            if is_stream:
                raise ValueError(
                    f"{teacher}: a file of features needs pairs that can be read in any order, "
                    "not a stream; leave data.read at auto"
                )
            return rank0_first(lambda: convert(local_copy(teacher), ids, out, settings))
        newest = loading.pin_newest(teacher)
        encoder = raise_on_all_ranks(
            lambda: open_encoder(
                newest,
                modality=modality,
                pooling=pooling,
                device=device,
            )
        )
        settings |= {
            "content": rank0_first(lambda: read_content(samples, encoder.reads)),
            "weights": encoder.checksum(),
            "modality": encoder.reads,
            "pooling": pooling,
            "part_rows": PART_ROWS[encoder.reads],
        }
        begun = rank0_first(lambda: begun_precision(store.read_facts(out), settings, precision))
        settings["precision"] = begun or resolve_encoding(precision, device)
        encoder.autocast = autocast_encoding(settings["precision"], device)
        return finish(encoder, samples, out, settings, batch_size, threads)


def read_content(samples: Pairs | SampleStream, modality: str) -> list[Facts]:
    """The facts of what a tower reads of samples, wherever they lie."""
    unread = {"classes", *{"image": ["captions"], "text": ["images", "sample"]}[modality]}
    return [{k: v for k, v in of.items() if k not in unread} for of in content(samples)]


def finish(
    encoder: Encoder,
    samples: Any,
    out: Path,
    settings: Mapping[str, Any],
    batch_size: int,
    threads: int | None = None,
) -> dict[str, Any]:
    """The facts of the folder, once the ranks have encoded what it lacks."""
    facts = encode_parts(encoder, samples, out, settings, batch_size, threads)
    return facts or rank0_first(lambda: join_parts(out, settings))


def encode_parts(
    encoder: Encoder,
    samples: Any,
    out: Path,
    settings: Mapping[str, Any],
    batch_size: int,
    threads: int | None,
) -> dict[str, Any]:
    """The facts of a folder that is finished; otherwise none, once the ranks wrote all parts."""

    def claimed() -> tuple[dict[str, Any], list[Path]]:
        require_width(settings, encoder.width)
        return claim(out, settings, name=out)

    def encode(items: Sequence[Item], show: Show) -> Part:
        ids, features, bad = encode_items(encoder, samples, items, batch_size, show, threads)
        half = store.to_half(features.numpy(), ids, name=settings["teacher"])
        return Part(ids=ids, bad=bad, arrays={"features": half})

    return encode_missing(encode, samples, claimed, out, settings, label=settings["teacher"])


def require_width(settings: Mapping[str, Any], full_width: int) -> None:
    """Refuse to reduce features to a width that they do not have."""
    width = settings["reduced_to"]
    if width is not None and not 0 < width <= full_width:
        teacher = settings["teacher"]
        raise ValueError(f"--width: {width} is not between 1 and {full_width}, {teacher}'s own")


def encode_items(
    encoder: Encoder,
    samples: Any,
    items: Sequence[Item],
    batch_size: int,
    show: Show,
    threads: int | None = None,
) -> EncodedSamples:
    """The features of samples that can be read, and what is wrong with the others."""
    if encoder.reads == "text":
        return encode_captions(encoder, samples, items, batch_size, show)
    return encode_images(encoder, samples, items, batch_size, show, threads)


def encode_captions(
    encoder: Encoder, samples: Any, items: Sequence[Item], batch_size: int, show: Show
) -> EncodedSamples:
    """The mean feature of each sample's captions. Images are left alone."""
    ids, captions, bad = [], [], []
    for item in items:
        try:
            if isinstance(item, int):
                sample_id, texts = samples.sample_id(item), samples.sample_captions(item)
            else:
                sample = read_sample(samples, item)
                sample_id, texts = sample.sample_id, sample.captions
        except BadSample as error:
            bad.append(vars(error))
            continue
        ids.append(sample_id)
        captions.append(texts)
    rows = torch.tensor([row for row, texts in enumerate(captions) for _ in texts])
    sums = torch.zeros(len(ids), encoder.width)
    done = 0
    for numbers, features in encode_texts(encoder, list(chain(*captions)), batch_size):
        sums.index_add_(0, rows[numbers], features)
        done += len(numbers)
        show(len(items) * done // len(rows))
    return ids, F.normalize(sums) if encoder.unit_norm else sums, bad


def encode_texts(
    encoder: Encoder, texts: Sequence[str], batch_size: int
) -> Iterator[tuple[list[int], Float[Tensor, "b q"]]]:
    """The numbers and features of texts, a batch at a time.

    A text shares its batch with those of similar length, so that little is padding.
    """
    numbers = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
    for start in range(0, len(numbers), batch_size):
        batch = numbers[start : start + batch_size]
        yield batch, encoder.encode([texts[number] for number in batch])


def encode_images(
    encoder: Encoder,
    samples: Any,
    items: Sequence[Item],
    batch_size: int,
    show: Show,
    threads: int | None,
) -> EncodedSamples:
    """The feature of each sample's image."""
    ids, features, bad, done = [], [torch.zeros(0, encoder.width)], [], 0
    for batch in prepare_images(samples, items, encoder.prepare, batch_size, threads):
        bad += [vars(one) for _, one in batch if isinstance(one, BadSample)]
        good = [one for _, one in batch if not isinstance(one, BadSample)]
        ids += [sample.sample_id for sample, _ in good]
        if good:
            features.append(encoder.encode([pixels for _, pixels in good]))
        done += len(batch)
        show(done)
    return ids, torch.cat(features), bad


def join_parts(out: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Make the parts a teacher folder."""
    files = parts_of(out)
    _, bad = write_skipped(files, out / SKIPPED, settings["source"])
    hashes = np.concatenate([store.hash_ids(read_note(file)["ids"]) for file in files])
    return write(
        out, hashes, lambda: (read_part(file)[1]["features"] for file in files), settings, bad
    )


def convert(
    file: Path, ids: Sequence[str], out: Path, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Make a teacher folder of a file's features of these samples; `bad` counts those without."""
    stored = teachers.read_teacher(file, sample_ids=ids)
    bad = stored.missing(ids)  # refuses features of other data
    require_width(settings, stored.width)
    facts, _ = claim(out, {**settings, "weights": file_checksum(file)}, name=out)
    if "rows" in facts:
        return facts
    rows = stored.find(ids)
    known = [sample_id for sample_id, row in zip(ids, rows, strict=True) if row >= 0]
    parts = np.array_split(rows[rows >= 0], -(-len(known) // PART_ROWS["text"]))
    return write(out, known, lambda: (stored.features[part] for part in parts), facts, bad)


def write(
    out: Path,
    ids: Sequence[str] | store.Hashes,
    blocks: Callable[[], Iterable[Features]],
    settings: Mapping[str, Any],
    bad: int,
) -> dict[str, Any]:
    """Make blocks of features a teacher folder, after PCA if asked, and remove its parts."""
    features, facts, width = blocks(), {**settings, "bad": bad}, settings["reduced_to"]
    if width is not None:
        mean, axes, facts["variance_kept"] = fit_pca(features, width)
        features = ((block.astype(np.float64) - mean) @ axes.T for block in blocks())
    facts = store.write_folder(out, ids, features, facts)
    shutil.rmtree(out / PARTS, ignore_errors=True)  # or the next call does
    return facts
