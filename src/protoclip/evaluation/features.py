"""Features of a data set's images and texts: each is encoded once into the store, whoever asks.

The loop is in `encode/run.py`, and the store in `encode/store.py`. `suite.py` has what is encoded.
"""

import hashlib
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from protoclip.config import Config
from protoclip.data.decode import decode, decode_crop
from protoclip.data.pairs import BadSample
from protoclip.data.sources import PairsView
from protoclip.data.transforms import EvaluationTransform, PillowTransform
from protoclip.distributed.collectives import (
    all_gather_object,
    any_rank,
    rank,
    rank0_first,
    world_size,
)
from protoclip.encode.encoder import Encoder as FrozenEncoder
from protoclip.encode.encoder import image_encoder, image_side, text_encoder, text_side
from protoclip.encode.rows import SETTING, features_folder
from protoclip.encode.run import Round, encode_into, hash_images, units_of_rank
from protoclip.encode.store import FULL, Hashes, Numbers, Store, hash_ids
from protoclip.evaluation.datasets import Captions, EvaluationData, Images, match_captions
from protoclip.files import checksum, replacing
from protoclip.models.projections import FrozenEncoders, Projections
from protoclip.models.protoclip import (
    Autocast,
    ProtoCLIP,
    autocast,
    autocast_encoding,
    evaluation_mode,
    resolve_precision,
)
from protoclip.progress import Progress
from protoclip.terminal import say

RETRIED = 20  # bad images that are tried again before stored features are used
PROJECTED = 8192  # rows at once
LARGEST = 10  # images that equal captions join

Model = Any  # a module with `encode_image` and `encode_text` into one space
Transform = Callable[[Image.Image], Tensor]
Tokenizer = Callable[[list[str]], Tensor]
Bad = tuple[int, str]  # the row of an image that cannot be used, and why


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Features of the good images, of any norm, in float32 on the CPU; and the bad ones.

    `content` has 64 bits for each good image: a hash of its encoded bytes, or else of its pixels.
    """

    features: Float[Tensor, "n d"]
    bad: Sequence[Bad] = ()
    content: Int[Tensor, " c"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))


def build_encoder(
    model: Model,
    transform: Transform,
    tokenizer: Tokenizer,
    *,
    aligned_by: Config | None = None,
    **settings: Any,
) -> "Encoder":
    """The encoder of a model; of one between two frozen towers, these encode, once for all heads.

    Args:
        aligned_by: The settings of the run that made the model. Then the towers encode also without
            a `cache`. With one, what `align` has encoded for training is read too: in half
            precision, and of images without hashes of their content.
        settings: Those of `Encoder`.
    """
    given: dict[str, Any] = {"transform": transform, "tokenizer": tokenizer, **settings}
    has_cache = given.get("cache") is not None
    if not isinstance(model, ProtoCLIP) or not model.joins_encoders:
        return Encoder(model=model, **given)
    if not has_cache and aligned_by is None:
        return Encoder(model=model, **given)
    source = aligned_by if has_cache else None
    frozen = Encoder(model=FrozenEncoders(model.towers), aligned_by=source, **given)
    return JoinedEncoder(model=model, frozen=frozen, **given)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A model with its transforms, which encodes images and texts on the model's device.

    All ranks call it with the same arguments and get the same bits, for any number of them.

    Attributes:
        batch_size: Images or texts encoded at once.
        workers: Threads that read images; unset, one a core.
        cache: Folder of the store of features; `None` for none.
        show: Show progress.
        autocast: Makes the context of a forward pass, such as one of less precision; unset, that of
            `autocast_encoding`.
        aligned_by: The settings of a run of `align`. What it encoded for training, by the files
            of images and the words of captions, is read from its store.
    """

    model: Model
    transform: Transform
    tokenizer: Tokenizer
    batch_size: int = 256
    workers: int | None = None
    cache: Path | None = None
    show: bool = False
    autocast: Autocast | None = None
    aligned_by: Config | None = None

    @cached_property
    def device(self) -> torch.device:
        device: torch.device = next(iter(self.model.parameters())).device
        return device

    @cached_property
    def towers(self) -> dict[str, FrozenEncoder]:
        """What encodes `images` and `texts`, of any norm."""
        context = self.autocast or autocast_encoding("auto", self.device)
        model, transform = self.model, self.transform
        if isinstance(model, FrozenEncoders) and isinstance(transform, EvaluationTransform):
            return {
                "images": image_side(model, transform, autocast=context),
                "texts": text_side(model, self.tokenizer, autocast=context),
            }
        settings: dict[str, Any] = {"unit_norm": False, "autocast": context}
        encode_image = partial(model.encode_image, normalize=False)
        encode_text = partial(model.encode_text, normalize=False)
        return {
            "images": image_encoder(model, self.device, encode_image, transform, **settings),
            "texts": text_encoder(model, self.device, self.tokenizer, encode_text, **settings),
        }

    @cached_property
    def _keys(self) -> dict[str, str]:
        """Identifies each tower and what it reads by content. Two towers may be of one module."""
        images, texts = self.towers["images"], self.towers["texts"]
        with evaluation_mode(self.model):
            weights = images.checksum()
            texts_key = texts.key(weights if texts.module is images.module else None)
            return {"images": images.key(weights), "texts": texts_key}

    @property
    def key(self) -> str:
        """Identifies the model and its transforms by content."""
        return checksum(" ".join(self._keys.values()).encode())

    @property
    def folders(self) -> dict[str, Path]:
        """The stores of this model's features of `images` and `texts`; none without a cache."""
        if self.cache is None:
            return {}
        return {
            kind: self.cache / checksum(f"{key} {kind}".encode())
            for kind, key in self._keys.items()
        }

    def encode_images(self, images: Images, *, stage: str) -> Encoded:
        """Features of all images that can be used. With a cache each is encoded once, whoever asks.

        Raises:
            ValueError: No image can be used, or features are not finite; on every rank.
        """
        encoded = self._encode("images", Reader(images, self.transform), stage)
        if not len(encoded.features):
            reason = f", such as {encoded.bad[0][1]}" if encoded.bad else ""
            raise ValueError(f"{stage}: no image can be used{reason}")
        return encoded

    def encode_texts(
        self, texts: Iterable[str], *, stage: str, content: str = ""
    ) -> Float[Tensor, "n d"]:
        """Features of texts. With a cache each is encoded once, whoever asks.

        Args:
            content: Identifies the texts; then stored features are found without reading these.
        """
        return self._encode("texts", TextReader(texts, content), stage).features

    def _encode(self, kind: str, reader: "Reader | TextReader", stage: str) -> Encoded:
        """Features of what a reader reads; first those that `align` stored, then the others."""
        if self.aligned_by is None or not reader.is_aligned:
            return self._encode_listed(kind, reader, stage)
        precision = resolve_precision(self.aligned_by.run.precision, self.device)
        tower = replace(self.towers[kind], autocast=autocast(precision, self.device))
        with evaluation_mode(self.model):
            folder = features_folder(self.aligned_by) / checksum(tower.key().encode())
        store, hashes = Store(folder, setting=SETTING), reader.aligned_hashes()
        is_known = store.has(hashes)
        known, missing = np.flatnonzero(is_known), np.flatnonzero(~is_known)
        if not len(known):
            rest = self._encode_listed(kind, reader.select(missing), stage)
            return Encoded(features=rest.features, bad=rest.bad)
        features = torch.from_numpy(store.fetch(hashes[known]))
        if not len(missing):
            return Encoded(features=features)
        rest = self._encode_listed(kind, reader.select(missing), stage)
        bad = [(int(missing[row]), why) for row, why in rest.bad]
        others = np.setdiff1d(missing, [row for row, _ in bad])
        if len(others):
            order = torch.from_numpy(np.argsort(np.concatenate([known, others])))
            features = torch.cat([features, rest.features])[order]
        return Encoded(features=features, bad=bad)

    def _encode_listed(self, kind: str, reader: "Reader | TextReader", stage: str) -> Encoded:
        """Features of what a reader reads, by way of the store, or of one in memory.

        What has a key is listed beside the store, and found again without reading.
        """
        is_stored = self.cache is not None and (kind == "texts" or reader.key)
        folder = self.folders[kind] if is_stored else None
        store = Store(folder, dtype=FULL, is_optional=True)
        path, listed = None, None
        if folder is not None and reader.key:
            path = folder / f"{checksum(reader.key.encode())}.npz"
            listed = rank0_first(partial(read_list, path))
        if listed is not None and listed.bad:
            # Bad for a moment, as without a network, must not be bad for ever. Some are enough to
            # notice that, and quick to try.
            some = listed.bad[:: len(listed.bad) // RETRIED + 1]
            if any_rank([any(reader.is_readable(row) for row, _ in some)])[0]:
                listed = None
        if listed is None or not store.has(listed.hashes).all():
            listed = self._encode_new(kind, reader, stage, store)
            if path is not None:
                rank0_first(partial(write_list, path, listed))
        return Encoded(
            features=torch.from_numpy(store.fetch(listed.hashes)),
            bad=listed.bad,
            content=torch.from_numpy(listed.hashes.view(np.int64)),
        )

    def _encode_new(
        self, kind: str, reader: "Reader | TextReader", stage: str, store: Store
    ) -> "StoredList":
        """Encode into the store what it lacks."""
        hashes, bad, tower = dict[int, int](), list[Bad](), replace(self.towers[kind], name=stage)
        if isinstance(reader, Reader):

            def finish_and_encode(images: list[Tensor]) -> Tensor:
                batch = reader.finish(torch.stack(images).to(self.device, non_blocking=True))
                features: Tensor = self.model.encode_image(batch, normalize=False)
                return features

            tower = replace(tower, forward=finish_and_encode, examples=[reader.blank()])
        rows, done = reader.find_rows(store), 0
        show = self.show and rank() == 0 and len(rows) > 0
        progress = Progress(f"evaluate: {stage}", len(rows)) if show else None

        def prepare(row: int) -> tuple[int, Any]:
            model_input, hashes[row] = reader.read(row)
            return hashes[row], model_input

        def count(made: Round) -> None:
            nonlocal done
            bad.extend((row, str(one)) for row, one in made.items if isinstance(one, BadSample))
            done += self.batch_size * world_size()
            if progress:
                progress.update(min(done, len(rows)))

        if len(rows):
            with evaluation_mode(self.model):
                encode_into(
                    store,
                    tower,
                    units_of_rank(rows, self.batch_size),
                    prepare,
                    threads=self.workers if kind == "images" else 0,
                    after=count,
                )
        if isinstance(reader, TextReader):
            return StoredList(hashes=reader.hashes)
        ranks = all_gather_object((bad, hashes))
        good = sorted(pair for _, own in ranks for pair in own.items())
        return StoredList(
            hashes=np.array([hash_ for _, hash_ in good], np.uint64),
            bad=sorted(one for own, _ in ranks for one in own),
        )

    def with_progress(self, show: bool) -> "Encoder":
        """The same encoder, with or without progress."""
        return replace(self, show=show)


def remove_features(encoder: Encoder, keep: Collection[Path] = ()) -> None:
    """Remove the stores of a model that is not evaluated again, except folders to `keep`.

    Models may share a tower.
    """

    def remove() -> None:
        for folder in {*encoder.folders.values()}.difference(keep):
            shutil.rmtree(folder, ignore_errors=True)

    rank0_first(remove)


@dataclass(frozen=True, kw_only=True)
class JoinedEncoder(Encoder):
    """The encoder of a model between two frozen towers, which projects what these encoded once.

    Attributes:
        frozen: Encodes by the towers alone.
    """

    frozen: Encoder

    @property
    def folders(self) -> dict[str, Path]:
        return self.frozen.folders

    def with_progress(self, show: bool) -> "Encoder":
        return replace(self, show=show, frozen=self.frozen.with_progress(show))

    def encode_images(self, images: Images, *, stage: str) -> Encoded:
        encoded = self.frozen.encode_images(images, stage=stage)
        return replace(encoded, features=self.project("image", encoded.features))

    def encode_texts(
        self, texts: Iterable[str], *, stage: str, content: str = ""
    ) -> Float[Tensor, "n d"]:
        return self.project("text", self.frozen.encode_texts(texts, stage=stage, content=content))

    @torch.no_grad()
    def project(self, modality: str, features: Float[Tensor, "n q"]) -> Float[Tensor, "n d"]:
        """What the model makes of features of its `image` or `text` tower."""
        if not len(features):  # which have no known width
            return torch.zeros(0, 0)
        assert isinstance(self.model, ProtoCLIP)
        project = getattr(Projections(self.model.towers), f"encode_{modality}")
        parts = torch.split(features, PROJECTED)
        with evaluation_mode(self.model):
            return torch.cat([project(rows.float().to(self.device)).cpu() for rows in parts])


@dataclass(frozen=True, kw_only=True)
class StoredList:
    """What a list of images or texts had when all of it was stored: the hashes by which the good
    ones are stored, in their order, and the bad ones."""

    hashes: Hashes
    bad: Sequence[Bad] = ()


def read_list(path: Path) -> StoredList | None:
    """What a list had when it was last seen whole; None if that is not known."""
    with suppress(Exception), np.load(path) as file:  # a damaged file raises anything
        bad = zip(file["bad"].tolist(), file["reasons"].tolist(), strict=True)
        return StoredList(hashes=file["hashes"], bad=[*bad])
    return None


def write_list(path: Path, stored_list: StoredList) -> None:
    rows = np.array([row for row, _ in stored_list.bad], np.int64)
    reasons = np.array([reason for _, reason in stored_list.bad], str)
    with suppress(OSError), replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, hashes=stored_list.hashes, bad=rows, reasons=reasons)


class TextReader:
    """Texts by number; those with a `key` may be found without reading them."""

    is_aligned = True

    def __init__(self, texts: Iterable[str], key: str) -> None:
        self._texts, self.key = texts, key

    @cached_property
    def texts(self) -> list[str]:
        return list(self._texts)

    @cached_property
    def hashes(self) -> Hashes:
        return hash_ids(self.texts)

    def aligned_hashes(self) -> Hashes:
        return self.hashes

    def select(self, rows: Numbers) -> "TextReader":
        return TextReader([self.texts[row] for row in rows], "")

    def find_rows(self, store: Store) -> Sequence[int]:
        """Each of the different texts that the store lacks."""
        first = np.sort(np.unique(self.hashes, return_index=True)[1])
        rows: list[int] = first[~store.has(self.hashes[first])].tolist()
        return rows

    def read(self, row: int) -> tuple[str, int]:
        return self.texts[row], int(self.hashes[row])

    def is_readable(self, row: int) -> bool:
        return True


class Reader:
    """Images by row, as the model's input or one step before.

    Our own transforms finish on the device of the model, so that threads make bytes, not floats. Of
    images that give their encoded bytes, `EvaluationTransform` needs the crop alone.

    Attributes:
        store: Has the features of images that are not needed; these are only hashed.
    """

    def __init__(self, images: Images, transform: Transform) -> None:
        self.images, self.transform = images, transform
        self.store: Store | None = None
        crops = isinstance(transform, EvaluationTransform) and hasattr(images, "read_encoded")
        self.as_bytes = crops or isinstance(transform, PillowTransform)

    @property
    def key(self) -> str:
        """Identifies the images, as `Images.key`."""
        return self.images.key

    @property
    def is_aligned(self) -> bool:
        """Whether `align` may have encoded these images for training, by this transform."""
        is_ours = isinstance(self.transform, EvaluationTransform)
        return is_ours and isinstance(self.images, PairsView)

    def aligned_hashes(self) -> Hashes:
        """The ids of the images in a store of `align`."""
        assert isinstance(self.images, PairsView)
        return hash_images(self.images)

    def select(self, rows: Numbers) -> "Reader":
        assert isinstance(self.images, PairsView)
        return Reader(PairsView([(self.images, rows)]), self.transform)

    def find_rows(self, store: Store) -> Sequence[int]:
        """All images; those whose features the store has are only hashed."""
        self.store = store
        return range(len(self.images))

    def is_readable(self, row: int) -> bool:
        with suppress(BadSample):
            self.read(row)
            return True
        return False

    def read(self, row: int) -> tuple[Tensor | None, int]:
        """One image if it is needed, and a hash of it; raises `BadSample`."""
        transform, images = self.transform, self.images
        try:
            if not hasattr(images, "read_encoded"):
                image = images.image(row)
                hash_ = hash_bytes(b"%d %d " % image.size + image.tobytes())
                if self.has_stored(hash_):
                    return None, hash_
            else:
                encoded = images.read_encoded(row)
                hash_ = hash_bytes(encoded)
                if self.has_stored(hash_):
                    return None, hash_
                if isinstance(transform, EvaluationTransform):
                    box = partial(transform.box, draws=np.zeros(0, np.float32))
                    pixels = decode_crop(encoded, box, transform.size)
                    return torch.from_numpy(np.require(pixels, requirements="W")), hash_
                image = Image.fromarray(decode(encoded))
            if isinstance(transform, PillowTransform):
                return transform.pixels(image), hash_
            return transform(image), hash_
        except BadSample:
            raise
        except (ValueError, OSError) as error:
            source = images.where(row) if hasattr(images, "where") else images.name
            raise BadSample(images.sample_id(row), source, str(error)) from error

    def has_stored(self, hash_: int) -> bool:
        return self.store is not None and bool(self.store.has(np.array([hash_], np.uint64))[0])

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


def hash_bytes(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


# What tasks score


@dataclass(frozen=True, kw_only=True)
class Part:
    """The images of a split that can be used: features of any norm, and what is known of each."""

    features: Float[Tensor, "n d"]
    ids: Sequence[str]
    bad: Sequence[Bad]
    total: int  # images of the split
    labels: Tensor | None
    groups: Int[Tensor, " n"]
    content: Sequence[int]  # equal for equal images
    captions: Captions | None
    names: Sequence[str] | None

    @cached_property
    def unit(self) -> Float[Tensor, "n d"]:
        return F.normalize(self.features, dim=1)

    @cached_property
    def sample_groups(self) -> tuple[list[str], list[str]]:
        """The groups of images and of texts, each by the id of an image."""
        return group_samples(self.ids, self.groups.tolist(), self.content, self.captions)


@dataclass(frozen=True, kw_only=True)
class Features:
    """What the tasks score, on the CPU.

    Attributes:
        parts: Images by split.
        texts: Unit-norm features of `captions`, and classifiers of `names` and `classes`.
        device: Where what learns from them runs.
    """

    data: EvaluationData
    split: str
    parts: Mapping[str, Part]
    texts: Mapping[str, Float[Tensor, "_ d"]]
    device: torch.device | str = "cpu"

    @property
    def part(self) -> Part:
        """The images that are measured."""
        return self.parts[self.split]


def encode_split(encoder: Encoder, data: EvaluationData, split: str, *, stage: str) -> Part:
    """Encode the images of a split; rank 0 names the first bad ones."""
    whole = data.splits[split]
    encoded = encoder.encode_images(whole.images, stage=stage)
    if encoded.bad and rank() == 0 and split not in data.warned_splits:
        data.warned_splits.add(split)
        number, total = len(encoded.bad), len(whole.images)
        say(f"warning: {stage}: {number} of {total} images cannot be used and are left out:")
        for _, why in encoded.bad[:10]:
            say(f"  {why}")
    return make_part(data, split, encoded)


def make_part(data: EvaluationData, split: str, encoded: Encoded) -> Part:
    """A split without its bad rows; of images with captions, those of equal content are one.

    Where the data say which images belong together, as the emoji do, each stays as it is.
    """
    whole, left_out = data.splits[split], {row for row, _ in encoded.bad}
    rows = [row for row in range(len(whole.images)) if row not in left_out]
    ids, features = [whole.images.sample_id(row) for row in rows], encoded.features
    groups = None if whole.groups is None else [whole.groups[row] for row in rows]
    names, captions = data.image_names.get(split), None
    content = encoded.content.tolist()
    if whole.captions is not None:
        captions = match_captions([whole.captions[row] for row in rows], ids, groups, content)
        if len(different := captions.rows) < len(rows):
            rows, ids = [rows[i] for i in different], [ids[i] for i in different]
            content, features = [content[i] for i in different], features[different]
    return Part(
        features=features,
        ids=ids,
        bad=encoded.bad,
        total=len(whole.images),
        labels=None if whole.labels is None else whole.labels[torch.tensor(rows)],
        groups=torch.tensor(range(len(rows)) if groups is None else groups),
        content=content,
        captions=captions,
        names=None if names is None else [names[row] for row in rows],
    )


def group_samples(
    ids: Sequence[str],
    groups: Sequence[int],
    content: Sequence[int],
    captions: Captions | None,
) -> tuple[list[str], list[str]]:
    """The groups of images, given what the data say of them, and of their texts.

    Images of a concept belong together, an image and its captions, equal images, and images with an
    equal caption: rarest first, while no group grows beyond `LARGEST` images and a fiftieth of all.

    Args:
        ids, groups, content: For each image its id, a number that images of a concept share, and
            one that equal images share.
    """
    group, members = [*groups], dict[int, list[int]]()
    for image, number in enumerate(group):
        members.setdefault(number, []).append(image)
    images_with: dict[str | int, list[int]] = {}
    for image, key in enumerate(content):
        images_with.setdefault(key, []).append(image)
    first_image: dict[int, int] = {}
    if captions is not None:
        pairs = zip(captions.image_of_pair.tolist(), captions.text_of_pair.tolist(), strict=True)
        for image, text in pairs:
            images_with.setdefault(captions.texts[text], []).append(image)
            first_image.setdefault(text, image)
    for images in sorted(images_with.values(), key=len):
        numbers = {group[image] for image in images}
        together = [image for number in numbers for image in members[number]]
        if len(numbers) > 1 and len(together) <= max(LARGEST, len(group) // 50):
            number = min(numbers)
            members[number] = together
            for image in together:
                group[image] = number
    image_groups = [ids[min(members[number])] for number in group]
    text_groups = [image_groups[first_image[text]] for text in range(len(first_image))]
    return image_groups, text_groups
