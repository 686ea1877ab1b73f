"""Features of a data set's images and texts: each is encoded once into the store, whoever asks.

The encoders of one modality are in `encode/encoder.py`, their loop in `encode/run.py`, and the
store in `encode/store.py`. `suite.py` says what is encoded.
"""

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from protoclip.config import Config, EngineName
from protoclip.data.pairs import BadSample, Pairs
from protoclip.data.sources import PairsView
from protoclip.data.transforms import EvaluationTransform
from protoclip.distributed.collectives import all_gather_object, rank, rank0_first, world_size
from protoclip.encode import encoder as encoders
from protoclip.encode.engine import accelerate
from protoclip.encode.rows import SETTING, features_folder
from protoclip.encode.run import Outcome, encode_into, hash_images, units_of_rank
from protoclip.encode.store import FULL, Hashes, Numbers, Store, hash_bytes, hash_ids
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

PROJECTED = 8192  # rows at once
LARGEST = 10  # images that equal captions join

Model = Any  # a module with `encode_image` and `encode_text` into one space
Transform = Callable[[Image.Image], Tensor]
Tokenizer = Callable[[list[str]], Tensor]
Bad = tuple[int, str]  # the row of an image that cannot be used, and why


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
    projected. All ranks call it with the same arguments and get the same bits, for any number of
    them.

    Attributes:
        batch_size: Images or texts encoded at once.
        workers: Threads that read images; unset, one a core.
        cache: Folder of the store of features; `None` for none.
        show: Show progress.
        autocast: Makes the context of a forward pass, such as one of less precision; unset, that of
            `autocast_encoding`.
        engine: As `encode.engine`. A model in training mode, whose weights will be others soon,
            stays with PyTorch.
        whole: Encode by the whole model, whatever it is: sharded, compiled or with adapters.
        aligned_by: The settings of the run of `align` that made the model. What it encoded for
            training, by the files of images and the words of captions, is read from its store.
    """

    model: Model
    transform: Transform
    tokenizer: Tokenizer
    batch_size: int = 256
    workers: int | None = None
    cache: Path | None = None
    show: bool = False
    autocast: Autocast | None = None
    engine: EngineName = "auto"
    whole: bool = False
    aligned_by: Config | None = None

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
        context = self.autocast or autocast_encoding("auto", self.device)
        model, transform, tokenizer = self.frozen or self.model, self.transform, self.tokenizer
        if isinstance(model, FrozenEncoders) and isinstance(transform, EvaluationTransform):
            return {
                "image": encoders.image_side(model, transform, autocast=context),
                "text": encoders.text_side(model, tokenizer, autocast=context),
            }
        encode_image, encode_text = (
            partial(encode, normalize=False) for encode in (model.encode_image, model.encode_text)
        )
        given: dict[str, Any] = {"unit_norm": False, "autocast": context}
        return {
            "image": encoders.image_encoder(model, self.device, encode_image, transform, **given),
            "text": encoders.text_encoder(model, self.device, tokenizer, encode_text, **given),
        }

    @cached_property
    def keys(self) -> dict[str, str]:
        """Identifies each tower and what it reads by content. Two towers may be of one module."""
        image, text = self.towers["image"], self.towers["text"]
        with evaluation_mode(self.frozen or self.model):
            weights = image.checksum()
            text_key = text.key(weights if text.module is image.module else None)
            return {"image": image.key(weights), "text": text_key}

    @property
    def key(self) -> str:
        """Identifies the model, its projections too, and its transforms by content."""
        parts = [*self.keys.values()]
        if self.frozen is not None:
            parts.append(replace(self.towers["image"], module=self.model).checksum())
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

        Args:
            project: False for features of the frozen encoders alone.

        Raises:
            ValueError: No image can be used, or features are not finite; on every rank.
        """

        def encode_rows(rows: Numbers | None = None) -> Encoded:
            some = images if rows is None else PairsView([(images, rows)])
            return self._encode_images(some, stage)

        if self._reads_align and isinstance(images, Pairs):
            encoded = self._add_to_aligned("image", hash_images(images), encode_rows)
        else:
            encoded = encode_rows()
        if not len(encoded.features):
            reason = f", such as {encoded.bad[0][1]}" if encoded.bad else ""
            raise ValueError(f"{stage}: no image can be used{reason}")
        if project:
            encoded = replace(encoded, features=self.project("image", encoded.features))
        return encoded

    def encode_texts(
        self, texts: Sequence[str], *, stage: str, project: bool = True
    ) -> Float[Tensor, "n d"]:
        """Features of texts. With a cache each is encoded once, whoever asks."""
        hashes = hash_ids(texts)

        def encode_rows(rows: Numbers) -> Encoded:
            store = Store(self.folders.get("text"), dtype=FULL, is_optional=True)
            new = rows[~store.has(hashes[rows])]
            new = new[np.sort(np.unique(hashes[new], return_index=True)[1])]
            self._encode(
                "text", store, new.tolist(), lambda row: (int(hashes[row]), texts[row]), stage
            )
            return Encoded(features=torch.from_numpy(store.fetch(hashes[rows])))

        if self._reads_align:
            features = self._add_to_aligned("text", hashes, encode_rows).features
        else:
            features = encode_rows(np.arange(len(texts))).features
        return self.project("text", features) if project else features

    def encode_inputs(self, modality: str, inputs: list[Any]) -> Float[Tensor, "b d"]:
        """Features of a batch of images, as `prepare_image` made them, or of texts."""
        with evaluation_mode(self.frozen or self.model):
            features = self.towers[modality].encode(inputs)
        return self.project(modality, features)

    def _encode_images(self, images: Images, stage: str) -> Encoded:
        """By way of the store, or of one in memory.

        The hashes of the images are listed beside the store, so that these are found again without
        reading. What is not listed was bad; perhaps for a moment, as without a network.
        """
        folder = self.folders.get("image") if images.key else None
        store = Store(folder, dtype=FULL, is_optional=True)
        path = None if folder is None else folder / f"{checksum(images.key.encode())}.hashes"
        hashes = rank0_first(lambda: read_hashes(path, len(images)))
        missing, bad = np.flatnonzero(~store.has(hashes)), list[Bad]()
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
            outcomes = self._encode("image", store, missing.tolist(), read, stage)
            for row, outcome in sorted(outcomes.items()):
                if isinstance(outcome, BadSample):
                    bad.append((row, str(outcome)))
                hashes[row] = 0 if isinstance(outcome, BadSample) else outcome
            if path is not None:
                rank0_first(lambda: write_hashes(path, hashes))
        good = hashes[hashes != 0]
        return Encoded(
            features=torch.from_numpy(store.fetch(good)),
            bad=bad,
            content=torch.from_numpy(good.view(np.int64)),
        )

    def _encode(
        self,
        modality: str,
        store: Store,
        rows: Sequence[int],
        read: Callable[[int], tuple[int, Any]],
        stage: str,
    ) -> dict[int, Outcome]:
        """Encode what a store lacks of some rows; what became of each, on whatever rank."""
        outcomes = dict[int, Outcome]()
        show = self.show and rank() == 0 and len(rows) > 0
        progress = Progress(f"evaluate: {stage}", len(rows)) if show else None

        def count(items: Sequence[tuple[int, Outcome]]) -> None:
            outcomes.update(items)
            if progress:
                progress.update(min(len(outcomes) * world_size(), len(rows)))

        if rows:
            engine: EngineName = "torch" if self.model.training else self.engine
            tower = replace(self.towers[modality], name=stage, engine=engine)
            with evaluation_mode(self.frozen or self.model):
                encode_into(
                    store,
                    accelerate(tower, len(rows)),
                    units_of_rank(rows, self.batch_size),
                    read,
                    threads=self.workers if modality == "image" else 0,
                    after=count,
                )
        return dict(chain.from_iterable(some.items() for some in all_gather_object(outcomes)))

    @property
    def _reads_align(self) -> bool:
        return None not in (self.aligned_by, self.cache, self.frozen)

    def _add_to_aligned(
        self, modality: str, hashes: Hashes, encode_rows: Callable[[Numbers], Encoded]
    ) -> Encoded:
        """What `align` stored by these hashes, and what a function makes of the other rows."""
        assert self.aligned_by is not None
        precision = resolve_precision(self.aligned_by.run.precision, self.device)
        tower = replace(self.towers[modality], autocast=autocast(precision, self.device))
        with evaluation_mode(self.frozen):
            folder = features_folder(self.aligned_by) / checksum(tower.key().encode())
        store = Store(folder, setting=SETTING)
        is_known = store.has(hashes)
        known, missing = np.flatnonzero(is_known), np.flatnonzero(~is_known)
        if not len(known):
            return encode_rows(missing)
        features = torch.from_numpy(store.fetch(hashes[known]))
        if not len(missing):
            return Encoded(features=features)
        rest = encode_rows(missing)
        bad = [(int(missing[row]), why) for row, why in rest.bad]
        good = np.concatenate([known, np.setdiff1d(missing, [row for row, _ in bad])])
        if len(rest.features):
            features = torch.cat([features, rest.features])[torch.from_numpy(np.argsort(good))]
        return Encoded(features=features, bad=bad)

    @torch.no_grad()
    def project(self, modality: str, features: Float[Tensor, "n q"]) -> Float[Tensor, "n d"]:
        """Features in the joint space, of what the tower of a modality gave."""
        if self.frozen is None or not len(features):
            return features
        project = getattr(Projections(self.model.towers), f"encode_{modality}")
        parts = torch.split(features, PROJECTED)
        with evaluation_mode(self.model):
            return torch.cat([project(rows.float().to(self.device)).cpu() for rows in parts])


def remove_features(encoder: Encoder, keep: Collection[Path] = ()) -> None:
    """Remove the stores of a model that is not evaluated again, except folders to `keep`.

    Models may share a tower.
    """

    def remove() -> None:
        for folder in {*encoder.folders.values()}.difference(keep):
            shutil.rmtree(folder, ignore_errors=True)

    rank0_first(remove)


def read_hashes(path: Path | None, number: int) -> Hashes:
    """The listed hashes of this number of images; 0 where none is known."""
    if path is not None:
        with suppress(OSError):
            hashes = np.fromfile(path, np.uint64)
            if len(hashes) == number:
                return hashes
    return np.zeros(number, np.uint64)


def write_hashes(path: Path, hashes: Hashes) -> None:
    with suppress(OSError), replacing(path) as temporary:
        hashes.tofile(temporary)


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
        """The groups of images and of texts, each by the id of an image.

        Images of a concept belong together, an image and its captions, equal images, and images
        with an equal caption: rarest first, while no group grows beyond `LARGEST` images and a
        fiftieth of all.
        """
        group, members = self.groups.tolist(), dict[int, list[int]]()
        for image, number in enumerate(group):
            members.setdefault(number, []).append(image)
        images_with: dict[str | int, list[int]] = {}
        for image, key in enumerate(self.content):
            images_with.setdefault(key, []).append(image)
        first_image: dict[int, int] = {}
        if (captions := self.captions) is not None:
            pairs = torch.stack([captions.image_of_pair, captions.text_of_pair], dim=1)
            for image, text in pairs.tolist():
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
        image_groups = [self.ids[min(members[number])] for number in group]
        text_groups = [image_groups[first_image[text]] for text in range(len(first_image))]
        return image_groups, text_groups


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


def encode_split(encoder: Encoder, data: EvaluationData, split: str) -> Part:
    """Encode the images of a split; rank 0 names the first bad ones."""
    whole, stage = data.splits[split], f"{data.name} images: {split}"
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
