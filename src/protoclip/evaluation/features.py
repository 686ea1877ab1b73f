"""Features of a data set's images and texts: read, and encoded by all ranks.

`kept.py` keeps them on disk, `encoders.py` says which encoder a model gets, and what a task needs
is chosen in `task_features.py`. Frozen models that teach, or that `align` joins, encode in
`encode/encoder.py` and `encode/halves.py`.
"""

import hashlib
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from protoclip.data.captions import without_padding
from protoclip.data.decode import decode, decode_crop
from protoclip.data.loader import items_of
from protoclip.data.pairs import MAX_IMAGE_PIXELS, BadSample
from protoclip.data.transforms import EvaluationTransform, PillowTransform
from protoclip.distributed import parallel
from protoclip.distributed.collectives import (
    all_gather,
    all_gather_object,
    any_rank,
    raise_on_all_ranks,
    rank,
    rank0_first,
    world_size,
)
from protoclip.distributed.cores import cores
from protoclip.encode import store
from protoclip.evaluation.datasets import Images
from protoclip.evaluation.kept import Bad, Kept, Listed
from protoclip.files import checksum
from protoclip.models.batch_norm import layers_of
from protoclip.models.precision import Autocast, on_card
from protoclip.models.protoclip import evaluation_mode
from protoclip.models.tokenizers import TELLING
from protoclip.progress import Progress

FEW_IMAGES = 300  # are read faster than worker processes start
KEPT_FIRST, KEPT_MOST = 4096, 32_768  # images at once, which a call that is killed may lose
RETRIED = 20  # bad images that are tried again before kept features are used

Transform = Callable[[Image.Image], Tensor]
Tokenizer = Callable[[list[str]], Tensor]
Content = tuple[int, int]  # the row of a good image, and a hash of it
Batch = tuple[Tensor, list[Bad], list[Content]]
NONE = np.zeros(0, np.uint64)


@runtime_checkable
class Model(Protocol):
    """What the suite needs of a model: a module with two encoders into one space."""

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor: ...
    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def eval(self) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Features of the good rows, of any norm, in float32 on the CPU; and the bad rows.

    Of images (not of texts) also a hash of each: of its encoded bytes, or where there are none of
    its pixels.
    """

    features: Float[Tensor, "n d"]
    bad: Sequence[Bad] = ()
    content: Int[Tensor, " c"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A model with its transforms, which encodes images and texts on the model's device.

    All ranks call it with the same arguments and get the same bits, for any number of them.

    Attributes:
        batch_size: Images or texts encoded at once.
        workers: Processes that read images; unset, one a core if there are many images.
        cache: Folder of the store in which features are kept; `None` for none.
        show: Show progress.
        autocast: Makes the context of a forward pass, such as one of less precision; unset, that of
            `on_card`.
    """

    model: Model
    transform: Transform
    tokenizer: Tokenizer
    batch_size: int = 256
    workers: int | None = None
    cache: Path | None = None
    show: bool = False
    autocast: Autocast | None = None

    @cached_property
    def device(self) -> torch.device:
        return next(iter(self.model.parameters())).device

    @cached_property
    def context(self) -> Autocast:
        """Makes the context of a forward pass."""
        return self.autocast or on_card("auto", self.device)

    @cached_property
    def key(self) -> str:
        """Identifies the model and its transforms by content.

        Weights alone do not: activations and numbers of heads have none. So the features of an
        image and a text count too, to three digits, since the last ones depend on the hardware.
        """
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in self.model.state_dict().items():
            content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(content.numpy())
        # Functions and objects without a text show their address in memory.
        facts = f"{layers_of(self.model)} {self.transform!r}"
        facts += "" if self.context is nullcontext else repr(self.context)
        digest.update(re.sub(r" at 0x[0-9a-f]+", "", facts).encode())
        ramp = np.arange(96 * 64 * 3, dtype=np.uint8).reshape(64, 96, 3)
        with evaluation_mode(self.model), torch.inference_mode():
            image = self.transform(Image.fromarray(ramp)).unsqueeze(0).to(self.device)
            tokens = self.tokenizer(["a photo of a red dog"])  # as many as are read of a caption
            digest.update(str([tokens.tolist(), self.tokenizer([TELLING]).tolist()]).encode())
            text = tokens.to(self.device)
            for features in (self.model.encode_image(image), self.model.encode_text(text)):
                first = features.float().flatten()[:16].tolist()
                digest.update(" ".join(f"{value:.3g}" for value in first).encode())
        return digest.hexdigest()

    def images(self, images: "Images | Reader", *, stage: str) -> Encoded:
        """Features of all images that can be used. With a cache each is encoded once, whoever asks.

        Args:
            images: Or what reads them by this encoder's transform.

        Raises:
            ValueError: No image can be used, or features are not finite; on every rank.
        """
        encoded = self.readable_images(images, stage=stage)
        if not len(encoded.features):
            reason = f", such as {encoded.bad[0][1]}" if encoded.bad else ""
            raise ValueError(f"{stage}: no image can be used{reason}")
        return encoded

    def readable_images(self, images: "Images | Reader", *, stage: str) -> Encoded:
        """The same, where there may be none that can be used."""
        reader = images if isinstance(images, Reader) else Reader(images, self.transform)
        if self.cache is not None and reader.key:
            return self._kept_images(reader, Kept(self._folder("images")), stage)
        number = len(reader.images)
        (encoded,) = self._encode_images(reader, stage, number, number)
        return encoded

    def _kept_images(self, reader: "Reader", kept: Kept, stage: str) -> Encoded:
        """Features of images, of which those that are not kept yet are encoded, and kept."""
        listed = kept.read_list(reader.key)
        if listed is not None:
            # Bad for a moment, as without a network, must not be bad for ever. Some are enough to
            # notice that, and quick to try.
            some = listed.bad[:: len(listed.bad) // RETRIED + 1]
            hold = all(len(reader[range(row, row + 1)][1]) for row, _ in some)
            if any_rank([not hold])[0] or not kept.has(listed.hashes).all():
                listed = None
        if listed is None:
            listed = self._encode_missing(reader, kept, stage)
            kept.write_list(reader.key, listed)
        features, content = kept.features(listed.hashes), torch.from_numpy(listed.content)
        return Encoded(features=features, bad=listed.bad, content=content)

    def _encode_missing(self, reader: "Reader", kept: Kept, stage: str) -> Listed:
        """Encode and keep what is missing, some thousand images at a time; returns what there is.

        So a call that is killed loses little: the next one finds what was kept.
        """
        known, content, bad = kept.hashes(), [np.zeros(0, np.int64)], list[Bad]()
        for part in self._encode_images(reader.without(known), stage, KEPT_FIRST, KEPT_MOST):
            keys = part.content.numpy()
            content.append(keys)
            bad += part.bad
            hashes = hashes_of(keys)
            encoded = np.flatnonzero(~np.isin(hashes, known))  # the others have no features here
            first = np.sort(np.unique(hashes[encoded], return_index=True)[1])
            new = first[~kept.has(hashes[encoded[first]])]
            kept.add([str(key) for key in keys[encoded[new]]], part.features[new])
        joined = np.concatenate(content)
        return Listed(hashes=hashes_of(joined), content=joined, bad=bad)

    def _encode_images(
        self, reader: "Reader", stage: str, first: int, most: int
    ) -> Iterator[Encoded]:
        """Features of the images that the reader does not know, and what all of them hold.

        The `first` images come together, then each time twice as many, up to `most`.
        """

        def forward(batch: Tensor) -> Tensor:
            return self.model.encode_image(reader.finish(batch), normalize=False)

        number, stride = len(reader.images), self.batch_size * world_size()
        batches, progress = self._read(reader, number), self._progress(stage, number)
        begin, size = 0, max(1, -(-first // stride)) * stride
        while begin < max(1, number):
            rows = range(begin, min(begin + size, number))
            yield self.encode(forward, batches, reader.blank, rows, stage, progress)
            begin, size = begin + size, min(2 * size, max(most // stride * stride, size))

    def texts(self, texts: Iterable[str], *, stage: str, content: str = "") -> Float[Tensor, "n d"]:
        """Features of texts. With a cache each is encoded once, whoever asks, and kept by itself.

        Args:
            content: Identifies the texts; then kept features are found without reading these.
        """
        if self.cache is None:
            return self._encode_texts([*texts], stage)
        kept = Kept(self._folder("texts"))
        listed = kept.read_list(content) if content else None
        hashes = None if listed is None else listed.hashes
        if hashes is None or not kept.has(hashes).all():
            texts = [*texts]
            hashes = store.hash_ids(texts)
            known = kept.has(hashes)
            missing = [text for text, is_kept in zip(texts, known, strict=True) if not is_kept]
            if missing := [*dict.fromkeys(missing)]:
                kept.add(missing, self._encode_texts(missing, stage))
            if content:
                kept.write_list(content, Listed(hashes=hashes, content=np.zeros(0, np.int64)))
        return kept.features(hashes)

    @property
    def folders(self) -> set[Path]:
        """Where features of this model are kept; none without a cache."""
        return set() if self.cache is None else {*map(self._folder, ("images", "texts"))}

    def forget(self, staying: Collection[Path] = ()) -> None:
        """Remove what is kept of this model, which no one will judge again.

        Folders that are `staying` remain: models may share a half.
        """

        def remove() -> None:
            for folder in self.folders.difference(staying):
                shutil.rmtree(folder, ignore_errors=True)

        rank0_first(remove)

    def tokens(self, texts: list[str]) -> Int[Tensor, "n c"]:
        """What the text tower reads of texts, on the CPU."""
        tokens = self.tokenizer(texts)
        return without_padding(tokens) if getattr(self.model, "ignores_padding", False) else tokens

    def _encode_texts(self, texts: list[str], stage: str) -> Float[Tensor, "n d"]:
        def batches() -> Iterator[Batch]:
            for rows in self._shares(len(texts)):
                yield self.tokens(texts[rows.start : rows.stop]), [], []

        forward = partial(self.model.encode_text, normalize=False)
        blank = partial(self.tokens, texts[:1])
        progress = self._progress(stage, len(texts))
        return self.encode(forward, batches(), blank, range(len(texts)), stage, progress).features

    def encode(
        self,
        forward: Callable[[Tensor], Tensor],
        batches: Iterator[Batch],
        blank: Callable[[], Tensor],
        rows: range,
        stage: str,
        progress: Progress | None = None,
    ) -> Encoded:
        """Features of some rows, in whose batches the ranks take turns.

        A batch has the same rows, and so its features the same bits, for any number of ranks. The
        forward of a sharded model is collective, so a rank without good rows encodes a blank one
        and drops it.

        Args:
            forward: A batch of inputs to features.
            batches: This rank's batches, of `batch_size` rows without the bad ones.
            blank: A batch of one row that stands in.
        """
        sharded = parallel.is_sharded(self.model)
        features: list[Tensor] = []
        bad: list[Bad] = []
        content: list[Content] = []

        def read(first: int) -> tuple[Tensor, int]:
            """This rank's input, and how many of its rows count."""
            has_batch = first < rows.stop
            ready, left_out, keys = next(batches) if has_batch else (torch.zeros(0), [], [])
            bad.extend((row, why) for row, why in left_out)  # workers make lists of tuples
            content.extend((row, key) for row, key in keys)
            return (ready, len(ready)) if len(ready) else (blank(), 0)

        stride = self.batch_size * world_size()
        with evaluation_mode(self.model):
            for first in range(rows.start, rows.stop, stride):
                ready, good = raise_on_all_ranks(partial(read, first + rank() * self.batch_size))
                if any_rank([good > 0])[0]:
                    with parallel.without_gradients(self.model), self.context():
                        sent = ready.to(self.device, non_blocking=True)
                        # A rank that fails in a sharded forward ends, since others wait in it.
                        run = partial(forward, sent)
                        made = run() if sharded else raise_on_all_ranks(run)
                    features.append(all_gather(made.float()[:good]).cpu())
                if progress:
                    progress.update(min(first + stride, rows.stop))
        encoded = torch.cat(features or [torch.zeros(0, 0)])
        if not bool(torch.isfinite(encoded).all()):  # the same bits on every rank
            raise ValueError(f"{stage}: the model's features are not finite; it has diverged")
        ranks = all_gather_object((bad, content))
        keys = sorted(entry for _, of_rank in ranks for entry in of_rank)
        return Encoded(
            features=encoded,
            bad=sorted(entry for of_rank, _ in ranks for entry in of_rank),
            content=torch.tensor([key for _, key in keys], dtype=torch.long),
        )

    def showing(self, show: bool) -> "Encoder":
        """The same encoder, with or without progress."""
        return replace(self, show=show)

    def _progress(self, stage: str, number: int) -> Progress | None:
        return Progress(f"evaluate: {stage}", number) if self.show and rank() == 0 else None

    def _folder(self, kind: str) -> Path:
        """Where this model's features of images, or of texts, are kept."""
        assert self.cache is not None
        return self.cache / checksum(f"{self.key} {kind}".encode())

    def _shares(self, number: int) -> list[range]:
        """The rows of this rank's batches."""
        starts = range(0, number, self.batch_size)[rank() :: world_size()]
        return [range(start, min(start + self.batch_size, number)) for start in starts]

    def _read(self, reader: "Reader", number: int) -> Iterator[Batch]:
        """This rank's batches of images."""
        workers = self.workers
        if workers is None:
            workers = cores() if number > FEW_IMAGES else 0
        shares = self._shares(number)
        loader = DataLoader(
            reader,
            sampler=shares,
            batch_size=None,
            num_workers=min(workers, len(shares)),
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # or it would draw from the global one
        )
        return items_of(loader)


class Reader(Dataset[Batch]):
    """Images by ranges of rows, as the model's input or one step before.

    Our own transforms finish on the device of the model, so that workers send bytes, not floats. Of
    images that give their encoded bytes, `EvaluationTransform` needs the crop alone.

    Attributes:
        known: The hashes of images that are not needed, in order; of these only the content is.
    """

    def __init__(self, images: Images, transform: Transform) -> None:
        self.images, self.transform, self.known = images, transform, NONE
        crops = isinstance(transform, EvaluationTransform) and hasattr(images, "encoded")
        self.as_bytes = crops or isinstance(transform, PillowTransform)

    @property
    def key(self) -> str:
        """Identifies the images, as `Images.key`."""
        return self.images.key

    def without(self, known: store.Hashes) -> "Reader":
        """The same without images that are known."""
        reader = copy(self)
        reader.known = known
        return reader

    def __getitem__(self, rows: range) -> Batch:
        good: list[Tensor] = []
        bad: list[Bad] = []
        content: list[Content] = []
        for row in rows:
            try:
                image, key = self.read(row)
            except BadSample as error:
                bad.append((row, str(error)))
            else:
                if image is not None:
                    good.append(image)
                content.append((row, key))
        return torch.stack(good) if good else torch.zeros(0), bad, content

    def read(self, row: int) -> tuple[Tensor | None, int]:
        """One image if it is needed, and a hash of it; raises `BadSample`."""
        transform, images = self.transform, self.images
        try:
            if not hasattr(images, "encoded"):
                image = images.image(row)
                key = hash_of(b"%d %d " % image.size + image.tobytes())
                if self.knows(key):
                    return None, key
            else:
                encoded = images.encoded(row)
                key = hash_of(encoded)
                if self.knows(key):
                    return None, key
                if isinstance(transform, EvaluationTransform):
                    box = partial(transform.box, draws=np.zeros(0, np.float32))
                    pixels = decode_crop(encoded, box, transform.size, max_pixels=MAX_IMAGE_PIXELS)
                    return torch.from_numpy(np.require(pixels, requirements="W")), key
                image = Image.fromarray(decode(encoded, max_pixels=MAX_IMAGE_PIXELS))
            if isinstance(transform, PillowTransform):
                return transform.pixels(image), key
            return transform(image), key
        except BadSample:
            raise
        except (ValueError, OSError) as error:
            source = images.where(row) if hasattr(images, "where") else images.name
            raise BadSample(images.sample_id(row), source, str(error)) from error

    def knows(self, key: int) -> bool:
        if not len(self.known):
            return False
        (wanted,) = hashes_of(np.array([key]))
        at = np.searchsorted(self.known, wanted)
        return bool(at < len(self.known) and self.known[at] == wanted)

    def finish(self, batch: Tensor) -> Tensor:
        """The model's input, of what `read` gave."""
        if not self.as_bytes:
            return batch
        assert isinstance(self.transform, EvaluationTransform | PillowTransform)
        return self.transform.finish(batch, torch.zeros(len(batch), 0))

    def blank(self) -> Tensor:
        """A batch of one black image."""
        if self.as_bytes:
            assert isinstance(self.transform, EvaluationTransform | PillowTransform)
            size = self.transform.size
            return torch.zeros(1, size, size, 3, dtype=torch.uint8)
        return self.transform(Image.new("RGB", (224, 224))).unsqueeze(0)


def hashes_of(content: npt.NDArray[np.int64]) -> store.Hashes:
    """The hashes by which images of this content are kept."""
    return store.hash_ids(map(str, content.tolist()))


def hash_of(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)
