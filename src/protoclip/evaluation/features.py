"""Features of a data set's images and texts: read, encoded by all ranks, and kept on disk."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

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
from protoclip.evaluation.datasets import Images
from protoclip.features import store
from protoclip.features.whiten import Features
from protoclip.files import checksum, locked, replacing
from protoclip.models.precision import Autocast, on_card
from protoclip.models.protoclip import evaluation_mode
from protoclip.progress import Progress
from protoclip.terminal import say

FEW_IMAGES = 300  # are read faster than worker processes start
PROJECTED = 8192  # rows at once
RETRIED = 20  # bad images that are tried again before kept features are used

Transform = Callable[[Image.Image], Tensor]
Tokenizer = Callable[[list[str]], Tensor]
Bad = tuple[int, str]  # the row of an image that cannot be used, and why
Content = tuple[int, int]  # the row of a good image, and a hash of it
Batch = tuple[Tensor, list[Bad], list[Content]]


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
        facts = f"{self.model!r} {self.transform!r}"
        facts += "" if self.context is nullcontext else repr(self.context)
        digest.update(re.sub(r" at 0x[0-9a-f]+", "", facts).encode())
        ramp = np.arange(96 * 64 * 3, dtype=np.uint8).reshape(64, 96, 3)
        with evaluation_mode(self.model), torch.inference_mode():
            image = self.transform(Image.fromarray(ramp)).unsqueeze(0).to(self.device)
            text = self.tokenizer(["a photo of a red dog"]).to(self.device)
            for features in (self.model.encode_image(image), self.model.encode_text(text)):
                first = features.float().flatten()[:16].tolist()
                digest.update(" ".join(f"{value:.3g}" for value in first).encode())
        return digest.hexdigest()

    def images(self, images: "Images | Reader", *, stage: str) -> Encoded:
        """Features of all images that can be used.

        Args:
            images: Or what reads them by this encoder's transform.

        Raises:
            ValueError: No image can be used, or features are not finite; on every rank.
        """
        reader = images if isinstance(images, Reader) else Reader(images, self.transform)
        images = reader.images

        def forward(batch: Tensor) -> Tensor:
            return self.model.encode_image(reader.finish(batch), normalize=False)

        def compute() -> Encoded:
            batches = self._read(reader, len(images))
            return self.encode(forward, batches, reader.blank, len(images), stage)

        def holds(kept: Encoded) -> bool:
            # Bad for a moment, as without a network, must not be bad for ever. Some are enough to
            # notice that, and quick to try.
            some = kept.bad[:: len(kept.bad) // RETRIED + 1]
            return all(len(reader[range(row, row + 1)][1]) for row, _ in some)

        encoded = self._kept(reader.key, compute, holds)
        if not len(encoded.features):
            reason = f", such as {encoded.bad[0][1]}" if encoded.bad else ""
            raise ValueError(f"{stage}: no image can be used{reason}")
        return encoded

    def texts(self, texts: Iterable[str], *, stage: str, content: str = "") -> Float[Tensor, "n d"]:
        """Features of texts. With a cache each is encoded once, whoever asks, and kept by itself.

        Args:
            content: Identifies the texts; then kept features are found without reading these.
        """
        if self.cache is None:
            return self._encode_texts([*texts], stage)
        folder = self.cache / checksum(f"{self.key} texts".encode())
        kept, listed = self._kept_texts(folder), folder / f".{checksum(content.encode())}.npy"
        hashes = rank0_first(lambda: read_hashes(listed)) if content else None
        if hashes is None or (kept.find(hashes) < 0).any():
            texts = [*texts]
            hashes = store.hash_ids(texts)
            known = kept.find(hashes) >= 0
            missing = [text for text, is_kept in zip(texts, known, strict=True) if not is_kept]
            if missing := [*dict.fromkeys(missing)]:
                encoded = self._encode_texts(missing, stage).numpy()
                segment = folder / checksum(json.dumps(missing).encode())
                self._keep(lambda: keep_texts(segment, missing, encoded))
                new = store.StoredFeatures.in_memory(
                    name=stage, sample_ids=missing, features=encoded
                )
                kept = store.Segments([*kept.segments, new], new.width)
            if content:
                self._keep(lambda: keep_hashes(listed, hashes))
        return torch.from_numpy(kept.rows(kept.find(hashes)))

    def _kept_texts(self, folder: Path) -> store.Segments:
        """What earlier calls kept in a folder, the same for all ranks."""
        names = rank0_first(lambda: sorted(path.name for path in folder.glob("[!.]*")))
        opened = [open_whole(folder / name) for name in names]
        damaged = any_rank([segment is None for segment in opened])
        segments = [one for one, bad in zip(opened, damaged, strict=True) if one and not bad]
        return store.Segments(segments, segments[0].width if segments else 0)

    def _encode_texts(self, texts: list[str], stage: str) -> Float[Tensor, "n d"]:
        def batches() -> Iterator[Batch]:
            for rows in self._shares(len(texts)):
                yield self.tokenizer(texts[rows.start : rows.stop]), [], []

        forward = partial(self.model.encode_text, normalize=False)
        blank = partial(self.tokenizer, texts[:1])
        return self.encode(forward, batches(), blank, len(texts), stage).features

    def encode(
        self,
        forward: Callable[[Tensor], Tensor],
        batches: Iterator[Batch],
        blank: Callable[[], Tensor],
        number: int,
        stage: str,
    ) -> Encoded:
        """Features of `number` rows; the ranks take turns at the batches.

        A batch has the same rows, and so its features the same bits, for any number of ranks. A
        sharded forward is collective, so a rank without good rows encodes a blank one and drops it.

        Args:
            forward: A batch of inputs to features.
            batches: This rank's batches, of `batch_size` rows without the bad ones.
            blank: A batch of one row that stands in.
        """
        progress = Progress(f"evaluate: {stage}", number) if self.show and rank() == 0 else None
        features: list[Tensor] = []
        bad: list[Bad] = []
        content: list[Content] = []

        def read(first: int) -> tuple[Tensor, int]:
            """This rank's input, and how many of its rows count."""
            ready, left_out, keys = next(batches) if first < number else (torch.zeros(0), [], [])
            bad.extend((row, why) for row, why in left_out)
            content.extend((row, key) for row, key in keys)
            return (ready, len(ready)) if len(ready) else (blank(), 0)

        def computed(ready: Tensor) -> Tensor:
            with self.context():
                return forward(ready)

        sharded, stride = parallel.is_sharded(self.model), self.batch_size * world_size()
        with evaluation_mode(self.model):
            for first in range(0, number, stride):
                own = first + rank() * self.batch_size
                ready, good = raise_on_all_ranks(partial(read, own))
                with parallel.without_gradients(self.model):
                    of_batch = partial(computed, ready.to(self.device, non_blocking=True))
                    # A rank that fails in a sharded forward ends, since others wait in it.
                    rows = of_batch() if sharded else raise_on_all_ranks(of_batch)
                    rows = rows.float()
                features.append(all_gather(rows[:good]).cpu())
                if progress:
                    progress.update(min(first + stride, number))
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

    def _kept(
        self, content: str, compute: Callable[[], Encoded], holds: Callable[[Encoded], bool]
    ) -> Encoded:
        """Features of images from the cache if they still hold, or computed and kept there."""
        if self.cache is None or not content:
            return compute()
        folder = self.cache / checksum(f"{self.key} image {content}".encode())
        kept = read_kept(folder)
        (missing,) = any_rank([kept is None or not holds(kept)])
        if kept is not None and not missing:
            return kept
        encoded = compute()
        self._keep(lambda: keep(folder, encoded))
        return encoded

    def _keep(self, write: Callable[[], None]) -> None:
        """Let the first rank write, unless another process writes the same."""
        if rank() == 0:
            try:
                write()
            except OSError as error:
                say(f"warning: features are not kept ({error})")
            except ValueError:
                pass


@dataclass(frozen=True, kw_only=True)
class AlignedEncoder(Encoder):
    """An encoder of two frozen halves with projections that train.

    Attributes:
        model: The projections, which read what the halves gave.
        frozen: Encodes by the halves alone. It keeps what it encoded, so that an image passes its
            half once however often a run is evaluated.
    """

    frozen: Encoder

    def images(self, images: "Images | Reader", *, stage: str) -> Encoded:
        encoded = self.frozen.images(images, stage=stage)
        return replace(encoded, features=self._projected(encoded.features, "image"))

    def texts(self, texts: Iterable[str], *, stage: str, content: str = "") -> Float[Tensor, "n d"]:
        features = self.frozen.texts(texts, stage=stage, content=content)
        return self._projected(features, "text")

    @torch.no_grad()
    def _projected(self, features: Float[Tensor, "n q"], kind: str) -> Float[Tensor, "n d"]:
        project = self.model.encode_image if kind == "image" else self.model.encode_text
        with evaluation_mode(self.model):
            parts = [
                project(rows.to(self.device)).cpu() for rows in torch.split(features, PROJECTED)
            ]
        return torch.cat(parts)


class Reader(Dataset[Batch]):
    """Images by ranges of rows, as the model's input or one step before.

    Our own transforms finish on the device of the model, so that workers send bytes, not floats. Of
    images that give their encoded bytes, `EvaluationTransform` needs the crop alone.
    """

    def __init__(self, images: Images, transform: Transform) -> None:
        self.images, self.transform = images, transform
        crops = isinstance(transform, EvaluationTransform) and hasattr(images, "encoded")
        self.as_bytes = crops or isinstance(transform, PillowTransform)

    @property
    def key(self) -> str:
        """Identifies the images, as `Images.key`."""
        return self.images.key

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
                good.append(image)
                content.append((row, key))
        return torch.stack(good) if good else torch.zeros(0), bad, content

    def read(self, row: int) -> tuple[Tensor, int]:
        """One image, and a hash of it; raises `BadSample`."""
        transform, images = self.transform, self.images
        try:
            if not hasattr(images, "encoded"):
                image = images.image(row)
                key = hash_of(b"%d %d " % image.size + image.tobytes())
            else:
                encoded = images.encoded(row)
                key = hash_of(encoded)
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


def hash_of(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def keep(folder: Path, encoded: Encoded) -> None:
    """Add features to the store, each by the number of its row, with what is bad.

    Raises:
        ValueError: Another process does so.
    """
    facts = {"bad": encoded.bad, "content": encoded.content.numpy().tobytes().hex()}
    features = encoded.features.numpy()
    with locked(folder):
        folder.mkdir(exist_ok=True)
        numbers = [*map(str, range(len(features)))]
        store.write_folder(folder, numbers, [features], facts, dtype=store.FULL)


def keep_texts(folder: Path, texts: Sequence[str], features: Features) -> None:
    """Add features of different texts to the store, each by its text; raises as `keep`."""
    with locked(folder):
        folder.mkdir(exist_ok=True)
        store.write_folder(folder, texts, [features], {}, dtype=store.FULL)


def keep_hashes(path: Path, hashes: store.Hashes) -> None:
    """Note which texts a list has."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, hashes)


def read_hashes(path: Path) -> store.Hashes | None:
    """What `keep_hashes` noted; None if that is missing or damaged."""
    try:
        hashes: store.Hashes = np.load(path)
    except store.DAMAGED:
        return None
    return hashes if hashes.dtype == np.uint64 and hashes.ndim == 1 else None


def open_whole(folder: Path) -> store.StoredFeatures | None:
    """Features that were kept; None if they are damaged, or another process still writes them."""
    try:
        kept = store.open_folder(folder)
        kept.whole()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kept


def read_kept(folder: Path) -> Encoded | None:
    """Features that `keep` wrote, mapped into memory; None if they are missing or damaged."""
    try:
        features = torch.from_numpy(store.open_folder(folder, mode="c").whole())
        facts = store.read_facts(folder)
        bad = [(int(row), str(why)) for row, why in facts["bad"]]
        content = np.frombuffer(bytearray.fromhex(facts["content"]), np.int64)
        return Encoded(features=features, bad=bad, content=torch.from_numpy(content))
    except (OSError, ValueError, KeyError, TypeError):
        return None
