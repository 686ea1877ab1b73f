"""Features of images and texts by a model of both, each encoded once into the store, whoever asks.

The encoders of one modality are in `encoder.py`, their loop in `run.py`, the store in `store.py`.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from protoclip.config import Config, EngineName
from protoclip.data.access import MISSING, cache_folder
from protoclip.data.pairs import BadSample, Pairs
from protoclip.data.transforms import EvaluationTransform
from protoclip.distributed.collectives import raise_on_all_ranks, rank0_first
from protoclip.encode import encoder as encoders
from protoclip.encode.rows import features_folder, open_side
from protoclip.encode.run import Prepared, encode_numbers, hash_images, images_at_once
from protoclip.encode.store import FULL, Hashes, Numbers, Store, hash_bytes, hash_ids
from protoclip.files import checksum, replacing
from protoclip.models import loading
from protoclip.models.projections import FrozenEncoders, Projections
from protoclip.models.protoclip import (
    Autocast,
    ProtoCLIP,
    autocast,
    evaluation_mode,
    resolve_encoding,
)

PROJECTED = 8192  # rows at once

Model = Any  # a module with `encode_image` and `encode_text` into one space
Transform = Callable[[Image.Image], Tensor]
Tokenizer = Callable[[list[str]], Tensor]
Bad = tuple[int, str]  # the row of an image that cannot be used, and why


@runtime_checkable
class Images(Protocol):
    """Images in a fixed order. `image` is upright and RGB, or raises `BadSample`.

    `key` identifies the content, for caches of features; if it is empty, nothing is cached.
    """

    @property
    def name(self) -> str: ...
    @property
    def key(self) -> str: ...
    def __len__(self) -> int: ...
    def sample_id(self, row: int) -> str: ...
    def image(self, row: int) -> Image.Image: ...


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Features of the good images, of any norm, on the CPU; and the bad ones.

    `content` has 64 bits for each good image: a hash of its encoded bytes, or else of its pixels.
    It is empty if `align` has encoded some, in half precision.
    """

    features: Float[Tensor, "n d"]
    bad: Sequence[Bad] = ()
    content: Int[Tensor, " c"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A model with its transforms, which encodes images and texts on the model's device.

    Of a model between two frozen encoders, these encode, once for all heads, and their features are
    projected. All ranks call it alike and get the same bits, for any number of them.
    """

    model: Model
    transform: Transform
    tokenizer: Tokenizer
    batch_size: int = 256  # images or texts encoded at once
    workers: int | None = None  # threads that read images; unset, one a core
    cache: Path | None = None  # folder of the store of features; `None` for none
    show: bool = False  # show progress
    # Makes the context of a forward pass, such as one of less precision; unset, that of
    # `resolve_encoding`.
    autocast: Autocast | None = None
    # As `encode.engine`. A model in training mode, whose weights will be others soon, stays with
    # PyTorch.
    engine: EngineName = "auto"
    # Encode by the whole model, whatever it is: sharded, compiled or with adapters.
    whole: bool = False
    # The settings of the run of `align` that made the model. What it encoded for training, by the
    # files of images and the words of captions, is read from its store.
    aligned_by: Config | None = None
    unit_norm: bool = False  # whether what the towers of a whole model give has unit norm; else any

    @cached_property
    def device(self) -> torch.device:
        device: torch.device = next(iter(self.model.parameters())).device
        return device

    @cached_property
    def frozen(self) -> FrozenEncoders | None:
        """The encoders that the model lies between; None where the whole model encodes."""
        joins = isinstance(self.model, ProtoCLIP) and self.model.joins_encoders and not self.whole
        is_ours = isinstance(self.transform, EvaluationTransform)
        return FrozenEncoders(self.model.towers) if joins and is_ours else None

    @cached_property
    def towers(self) -> dict[str, encoders.Encoder]:
        """What encodes each `image` and `text`, to features of any norm."""
        context = self.autocast or autocast(resolve_encoding("auto", self.device), self.device)
        model, transform, tokenizer = self.frozen or self.model, self.transform, self.tokenizer
        if isinstance(model, FrozenEncoders) and isinstance(transform, EvaluationTransform):
            return {
                "image": encoders.image_side(model, transform, autocast=context),
                "text": encoders.text_side(model, tokenizer, autocast=context),
            }
        encode_image, encode_text = (
            partial(encode, normalize=False) for encode in (model.encode_image, model.encode_text)
        )
        given: dict[str, Any] = {"unit_norm": self.unit_norm, "autocast": context}
        return {
            "image": encoders.image_encoder(model, self.device, encode_image, transform, **given),
            "text": encoders.text_encoder(model, self.device, tokenizer, encode_text, **given),
        }

    @cached_property
    def keys(self) -> dict[str, str]:
        """Identifies each tower and what it reads by content. Two towers may be of one module."""
        image, text = self.towers["image"], self.towers["text"]
        weights = image.checksum()
        text_key = text.key(weights if text.module is image.module else None)
        return {"image": image.key(weights), "text": text_key}

    @cached_property
    def weights(self) -> str:
        """A checksum of the whole model's weights."""
        return replace(self.towers["image"], module=self.model).checksum()

    @property
    def key(self) -> str:
        """Identifies the model, its projections too, and its transforms by content."""
        parts = [*self.keys.values(), *([] if self.frozen is None else [self.weights])]
        return checksum(" ".join(parts).encode())

    @property
    def folders(self) -> dict[str, Path]:
        """The stores of this model's features of each `image` and `text`; none without a cache."""
        if self.cache is None:
            return {}
        return {
            modality: self.cache / checksum(f"{key} {modality}s".encode())
            for modality, key in self.keys.items()
        }

    def encode_images(self, images: Images, *, stage: str, project: bool = True) -> Encoded:
        """Features of all images that can be used. With a cache each is encoded once, whoever asks.

        The hashes of the images are listed beside the store, so that these are found again without
        reading. What is not listed was bad; perhaps for a moment, as without a network.

        Args:
            project: False for features of the frozen encoders alone.

        Raises:
            ValueError: No image can be used, or features are not finite; on every rank.
        """
        aligned = self.open_aligned("image") if isinstance(images, Pairs) else None
        folder = self.folders.get("image") if images.key else None
        store = Store(folder, dtype=FULL, is_optional=True, before=aligned)
        path = None if folder is None else folder / f"{checksum(images.key.encode())}.hashes"
        hashes, is_aligned = np.zeros(len(images), np.uint64), False  # 0 where none is known

        def read_listed() -> Hashes:
            with suppress(OSError):
                if path is not None and len(listed := np.fromfile(path, np.uint64)) == len(images):
                    return listed
            return hashes

        def write_listed() -> None:
            assert path is not None
            with suppress(OSError), replacing(path) as temporary:
                hashes.tofile(temporary)

        hashes = rank0_first(read_listed)
        if aligned is not None and isinstance(images, Pairs):
            of_files = hash_images(images)
            is_stored = aligned.has(of_files)
            hashes[is_stored], is_aligned = of_files[is_stored], bool(is_stored.any())
        missing, bad = np.flatnonzero(~store.has(hashes)), dict[int, BadSample]()
        read_encoded: Any = getattr(images, "read_encoded", None)

        def read(row: int) -> tuple[int, Tensor | None]:
            try:
                if read_encoded is not None:
                    image = read_encoded(row)
                    hash_ = hash_bytes(image)
                else:
                    image = images.image(row)
                    hash_ = hash_bytes(b"%d %d " % image.size + image.tobytes())
                if store.has(np.array([hash_], np.uint64))[0]:
                    return hash_, None
                return hash_, encoders.prepare_image(image, self.transform)
            except BadSample:
                raise
            except (ValueError, OSError) as error:
                source = images.where(row) if hasattr(images, "where") else images.name
                raise BadSample(images.sample_id(row), source, str(error)) from error

        if len(missing):
            hashes[missing] = 0
            bad = self._encode("image", store, missing, read, stage, hashes)
            if path is not None:
                rank0_first(write_listed)
        good = hashes[hashes != 0]
        if not len(good):
            reason = "".join(f", such as {bad[row]}" for row in sorted(bad)[:1])
            way_out = "; set --root, or ,root= behind a table, to where its paths start"
            reason += way_out * reason.endswith(MISSING)
            raise ValueError(f"{stage}: no image can be used{reason}")
        features = torch.from_numpy(store.read(store.find(good)))
        return Encoded(
            features=self.project("image", features) if project else features,
            bad=[(row, str(error)) for row, error in sorted(bad.items())],
            content=torch.from_numpy(good.view(np.int64)[: 0 if is_aligned else None]),
        )

    def encode_texts(
        self, texts: Sequence[str], *, stage: str, project: bool = True
    ) -> Float[Tensor, "n d"]:
        """Features of texts. With a cache each is encoded once, whoever asks."""
        hashes = hash_ids(texts)
        aligned = self.open_aligned("text")
        store = Store(self.folders.get("text"), dtype=FULL, is_optional=True, before=aligned)
        new = np.flatnonzero(~store.has(hashes))
        new = new[np.sort(np.unique(hashes[new], return_index=True)[1])]
        # Frozen encoders take those of similar length at once, as samples of one text.
        is_sample = self.frozen is not None

        def read(row: int) -> tuple[int, Any]:
            return int(hashes[row]), [texts[row]] if is_sample else texts[row]

        if len(new):
            self._encode("text", store, new, read, stage)
        features = torch.from_numpy(store.read(store.find(hashes)))
        return self.project("text", features) if project else features

    def encode_inputs(self, modality: str, inputs: list[Any]) -> Float[Tensor, "b d"]:
        """Features of a batch of images, as `prepare_image` made them, or of texts."""
        return self.project(modality, self.towers[modality].encode(inputs))

    def _encode(
        self,
        modality: str,
        store: Store,
        rows: Numbers,
        read: Callable[[int], Prepared],
        stage: str,
        hashes: Hashes | None = None,
    ) -> dict[int, BadSample]:
        """Encode what a store lacks of some rows; what is wrong with those that cannot be used."""
        changes = self.model.training and self.frozen is None
        engine: EngineName = "torch" if changes else self.engine
        unit, texts_at_once = self.batch_size, None
        if self.frozen is not None and modality == "image":
            unit = min(unit, images_at_once(self.frozen))
        elif self.frozen is not None:  # those of similar length
            texts_at_once = min(unit, 4 * images_at_once(self.frozen))
        return encode_numbers(
            store,
            replace(self.towers[modality], name=stage, engine=engine),
            rows,
            read,
            label=f"encode {stage}" * self.show,
            unit=unit,
            batch_size=texts_at_once,
            hashes=hashes,
            threads=self.workers,
        )

    def open_aligned(self, modality: str) -> Store | None:
        """What `align` stored, by image files or by texts; None if nothing is read from there."""
        if self.aligned_by is None or self.cache is None or self.frozen is None:
            return None
        precision = resolve_encoding(self.aligned_by.run.precision, self.device)
        tower = replace(self.towers[modality], autocast=autocast(precision, self.device))
        return open_side(tower, features_folder(self.aligned_by))

    def project(self, modality: str, features: Float[Tensor, "n q"]) -> Float[Tensor, "n d"]:
        """Features in the joint space, of what the tower of a modality gave."""
        if self.frozen is None or not len(features):
            return features
        project = getattr(Projections(self.model.towers), f"encode_{modality}")
        parts = torch.split(features, PROJECTED)
        with evaluation_mode(self.model):
            return torch.cat([project(rows.float().to(self.device)).cpu() for rows in parts])


def load_encoder(
    reference: str | Path, device: torch.device, *, keep: bool = True, **settings: Any
) -> Encoder:
    """A model on a device; what it encodes is kept for all who ask. All ranks call it alike."""
    newest = loading.pin_newest(str(reference))
    model, transform, tokenizer = raise_on_all_ranks(lambda: loading.load(newest))
    model, cache = loading.to_device(model, device), cache_folder() / "features" if keep else None
    given = {"cache": cache, "show": True, **settings}
    return Encoder(model=model, transform=transform, tokenizer=tokenizer, **given)
