"""Features of a data set's images and texts, encoded once, whoever asks.

The loop is in `encode/run.py`, and what is kept on disk in `encode/store.py`. `encoders.py` says
which encoder a model gets, and what a task needs is chosen in `task_features.py`.
"""

import hashlib
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing, suppress
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

from protoclip.data.captions import trim_padding
from protoclip.data.decode import decode, decode_crop
from protoclip.data.pairs import MAX_IMAGE_PIXELS, BadSample
from protoclip.data.transforms import EvaluationTransform, PillowTransform
from protoclip.distributed.collectives import (
    all_gather_object,
    any_rank,
    rank,
    rank0_first,
    world_size,
)
from protoclip.encode.encoder import Encoder as FrozenEncoder
from protoclip.encode.encoder import image_encoder, text_encoder
from protoclip.encode.run import Round, encode, units_of_rank
from protoclip.encode.store import DAMAGED, FULL, Hashes, Store, hash_ids
from protoclip.evaluation.datasets import Images
from protoclip.files import checksum, read_sealed, sealed, to_json, write_atomically
from protoclip.models.precision import Autocast, autocast_on_card
from protoclip.models.protoclip import evaluation_mode
from protoclip.progress import Progress

RETRIED = 20  # bad images that are tried again before kept features are used

Transform = Callable[[Image.Image], Tensor]
Tokenizer = Callable[[list[str]], Tensor]
Bad = tuple[int, str]  # the row of an image that cannot be used, and why


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
        workers: Threads that read images; unset, one a core.
        cache: Folder of the store in which features are kept; `None` for none.
        show: Show progress.
        autocast: Makes the context of a forward pass, such as one of less precision; unset, that of
            `autocast_on_card`.
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
        return self.autocast or autocast_on_card("auto", self.device)

    @cached_property
    def towers(self) -> dict[str, FrozenEncoder]:
        """What encodes `images` and `texts`, of any norm."""
        settings: dict[str, Any] = {"unit_norm": False, "autocast": self.context}
        encode_image = partial(self.model.encode_image, normalize=False)
        encode_text = partial(self.model.encode_text, normalize=False)
        return {
            "images": image_encoder(
                self.model, self.device, encode_image, self.transform, **settings
            ),
            "texts": text_encoder(self.model, self.device, self.tokenizer, encode_text, **settings),
        }

    @cached_property
    def key(self) -> str:
        """Identifies the model and its transforms by content."""
        weights = self.towers["images"].checksum()
        with evaluation_mode(self.model):
            keys = [tower.key(weights) for tower in self.towers.values()]
        return checksum(" ".join(keys).encode())

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
        if self.cache is None or not reader.key:
            return self._encode_images(reader, stage, Store(None, dtype=FULL))[0]
        store = Store(self._folder("images"), dtype=FULL, is_optional=True)
        listed = read_list(store, reader.key)
        if listed is not None:
            # Bad for a moment, as without a network, must not be bad for ever. Some are enough to
            # notice that, and quick to try.
            some = listed.bad[:: len(listed.bad) // RETRIED + 1]
            if any_rank([any(reader.is_readable(row) for row, _ in some)])[0]:
                listed = None
        while listed is None or not store.has_whole(listed.hashes):
            reader.known = store
            encoded, hashes = self._encode_images(reader, stage, store)
            reader.known = None
            listed = Listed(hashes=hashes, content=encoded.content.numpy(), bad=encoded.bad)
            write_list(store, reader.key, listed)
        features = store.read_or_map(store.find(listed.hashes))
        content = torch.from_numpy(listed.content)
        return Encoded(features=torch.from_numpy(features), bad=listed.bad, content=content)

    def _encode_images(self, reader: "Reader", stage: str, store: Store) -> tuple[Encoded, Hashes]:
        """Encode the images that the reader does not know: what they hold, and their hashes.

        Features are added to the store, or returned where that has no folder.
        """

        def finish_and_encode(images: list[Tensor]) -> Tensor:
            batch = torch.stack(images).to(self.device, non_blocking=True)
            return self.model.encode_image(reader.finish(batch), normalize=False)

        def prepare(row: int) -> tuple[int, Tensor | None]:
            image, content = reader.read(row)
            contents[row] = content
            return hash_of_content(content), image

        contents, bad = dict[int, int](), list[Bad]()
        tower = replace(self.towers["images"], forward=finish_and_encode)
        number = len(reader.images)
        units = units_of_rank(range(number), self.batch_size)
        progress, features = self._progress(stage, number), list[Tensor]()
        rounds = encode(tower, units, prepare, threads=self.workers, blank=reader.blank)
        for made in self.check_rounds(rounds, stage, progress, number):
            bad += [(row, str(one)) for row, one in made.items if isinstance(one, BadSample)]
            if store.folder is None:
                features.append(made.features)
            else:
                store.add_new(made.hashes, made.features.numpy())
        ranks = all_gather_object((bad, contents))
        good = sorted(entry for _, of_rank in ranks for entry in of_rank.items())
        content = torch.tensor([key for _, key in good], dtype=torch.long)
        hashes = np.array([hash_of_content(key) for _, key in good], np.uint64)
        store.flush()
        encoded = Encoded(
            features=torch.cat([each for each in features if len(each)] or [torch.zeros(0, 0)]),
            bad=sorted(entry for of_rank, _ in ranks for entry in of_rank),
            content=content,
        )
        return encoded, hashes

    def check_rounds(
        self, rounds: Iterator[Round], stage: str, progress: Progress | None, number: int
    ) -> Iterator[Round]:
        """Rounds of finite features, with progress."""
        done = 0
        with evaluation_mode(self.model), closing(rounds):  # type: ignore[type-var]
            for made in rounds:
                if not bool(torch.isfinite(made.features).all()):  # the same bits on every rank
                    raise ValueError(
                        f"{stage}: the model's features are not finite; it has diverged"
                    )
                yield made
                done += self.batch_size * world_size()
                if progress:
                    progress.update(min(done, number))

    def texts(self, texts: Iterable[str], *, stage: str, content: str = "") -> Float[Tensor, "n d"]:
        """Features of texts. With a cache each is encoded once, whoever asks, and kept by itself.

        Args:
            content: Identifies the texts; then kept features are found without reading these.
        """
        if self.cache is None:
            return self._encode_texts([*texts], stage)
        store = Store(self._folder("texts"), dtype=FULL, is_optional=True)
        listed = read_list(store, content) if content else None
        if listed is None or not store.has_whole(listed.hashes):
            texts = [*texts]
            hashes = hash_ids(texts)
            listed = Listed(hashes=hashes, content=np.zeros(0, np.int64))
            store.has_whole(hashes)  # what is damaged is forgotten
            is_kept = store.has(hashes)
            missing = [text for text, known in zip(texts, is_kept, strict=True) if not known]
            if missing := [*dict.fromkeys(missing)]:
                store.add_new(hash_ids(missing), self._encode_texts(missing, stage).numpy())
                store.flush()
            if content:
                write_list(store, content, listed)
        return torch.from_numpy(store.read_or_map(store.find(listed.hashes)))

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
        return trim_padding(tokens) if getattr(self.model, "ignores_padding", False) else tokens

    def _encode_texts(self, texts: list[str], stage: str) -> Float[Tensor, "n d"]:
        units, number = units_of_rank(texts, self.batch_size), len(texts)
        rounds = encode(
            self.towers["texts"], units, lambda text: (0, text), threads=0, blank=lambda: texts[0]
        )
        watched = self.check_rounds(rounds, stage, self._progress(stage, number), number)
        return torch.cat([made.features for made in watched] or [torch.zeros(0, 0)])

    def showing(self, show: bool) -> "Encoder":
        """The same encoder, with or without progress."""
        return replace(self, show=show)

    def _progress(self, stage: str, number: int) -> Progress | None:
        return Progress(f"evaluate: {stage}", number) if self.show and rank() == 0 else None

    def _folder(self, kind: str) -> Path:
        """Where this model's features of images, or of texts, are kept."""
        assert self.cache is not None
        return self.cache / checksum(f"{self.key} {kind}".encode())


@dataclass(frozen=True, kw_only=True)
class Listed:
    """What a list of images or texts has, as it was when all of it was kept.

    Attributes:
        hashes: Of the ids by which the good ones are kept, in their order.
        content: Of images, 64 bits for each good one.
        bad: The bad ones.
    """

    hashes: Hashes
    content: npt.NDArray[np.int64]
    bad: Sequence[Bad] = ()


def read_list(store: Store, name: str) -> Listed | None:
    """What a list had when it was last seen whole; None if that is not known. Collective."""

    def read() -> Listed | None:
        try:
            listed = read_sealed(path_of_list(store, name))
            hashes, content = (bytearray.fromhex(listed[x]) for x in ("hashes", "content"))
            return Listed(
                hashes=np.frombuffer(hashes, np.uint64),
                content=np.frombuffer(content, np.int64),
                bad=[(row, why) for row, why in listed["bad"]],
            )
        except DAMAGED:
            return None

    return rank0_first(read)


def write_list(store: Store, name: str, listed: Listed) -> None:
    hashes, content = (one.tobytes().hex() for one in (listed.hashes, listed.content))
    sealing = sealed({"hashes": hashes, "content": content, "bad": listed.bad})

    def write() -> None:
        with suppress(OSError):  # the store has said so
            write_atomically(path_of_list(store, name), to_json(sealing) + "\n")

    rank0_first(write)


def path_of_list(store: Store, name: str) -> Path:
    assert store.folder is not None
    return store.folder / f"{checksum(name.encode())}.json"


class Reader:
    """Images by row, as the model's input or one step before.

    Our own transforms finish on the device of the model, so that threads make bytes, not floats. Of
    images that give their encoded bytes, `EvaluationTransform` needs the crop alone.

    Attributes:
        known: Has the features of images that are not needed; of these only the content is.
    """

    def __init__(self, images: Images, transform: Transform) -> None:
        self.images, self.transform = images, transform
        self.known: Store | None = None
        crops = isinstance(transform, EvaluationTransform) and hasattr(images, "encoded")
        self.as_bytes = crops or isinstance(transform, PillowTransform)

    @property
    def key(self) -> str:
        """Identifies the images, as `Images.key`."""
        return self.images.key

    def is_readable(self, row: int) -> bool:
        try:
            self.read(row)
        except BadSample:
            return False
        return True

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

    def knows(self, content: int) -> bool:
        if self.known is None:
            return False
        return bool(self.known.has(np.array([hash_of_content(content)], np.uint64))[0])

    def finish(self, batch: Tensor) -> Tensor:
        """The model's input, of what `read` gave."""
        if not self.as_bytes:
            return batch
        assert isinstance(self.transform, EvaluationTransform | PillowTransform)
        return self.transform.finish(batch, torch.zeros(len(batch), 0))

    def blank(self) -> Tensor:
        """A black image."""
        if self.as_bytes:
            assert isinstance(self.transform, EvaluationTransform | PillowTransform)
            size = self.transform.size
            return torch.zeros(size, size, 3, dtype=torch.uint8)
        return self.transform(Image.new("RGB", (224, 224)))


def hash_of_content(content: int) -> int:
    """The hash by which an image of this content is kept."""
    return int(hash_ids([str(content)])[0])


def hash_of(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)
