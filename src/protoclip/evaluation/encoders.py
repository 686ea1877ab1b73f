"""Which encoder a model gets, whoever asks: one pass of the whole model, or of its halves alone.

Of two halves the features are kept before their projections, so that whatever else is trained
between the same halves encodes nothing. `features.py` has what an encoder does.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from protoclip.config import Config
from protoclip.data.pairs import MAX_IMAGE_PIXELS
from protoclip.data.transforms import EvaluationTransform
from protoclip.data.view import PairsView
from protoclip.encode.encoder import image_side, text_side
from protoclip.encode.rows import SETTING, features_folder
from protoclip.encode.run import hash_images
from protoclip.encode.store import Hashes, Numbers, Store, hash_ids
from protoclip.evaluation.datasets import Images
from protoclip.evaluation.features import Encoded, Encoder, Model, Reader, Tokenizer, Transform
from protoclip.files import checksum
from protoclip.models.precision import autocast, resolve
from protoclip.models.projections import FrozenEncoders, Projections
from protoclip.models.protoclip import ProtoCLIP, evaluation_mode

PROJECTED = 8192  # rows at once


def encoder_of(
    model: Model,
    transform: Transform,
    tokenizer: Tokenizer,
    *,
    aligned_by: Config | None = None,
    **settings: Any,
) -> Encoder:
    """The encoder of a model.

    Args:
        aligned_by: The settings of the run that made the model. Then it is that of its halves, if
            it has some, also without a `cache`. With one, what `align` has encoded for training is
            read too: in half precision, and of images without hashes of their content.
        settings: Those of `Encoder`. Without a `cache` nothing is kept.
    """
    given: dict[str, Any] = {"transform": transform, "tokenizer": tokenizer, **settings}
    keeps = given.get("cache") is not None
    joins = isinstance(model, ProtoCLIP) and model.joins_encoders
    if not (joins and (keeps or aligned_by is not None)):
        return Encoder(model=model, **given)
    kind: Any = Encoder
    if keeps:
        kind = HalvesEncoder if aligned_by is None else partial(AlignedHalves, config=aligned_by)
    assert isinstance(model, ProtoCLIP)
    frozen = kind(model=FrozenEncoders(model.towers), **given)
    return JoinedEncoder(model=model, frozen=frozen, **given)


@dataclass(frozen=True, kw_only=True)
class JoinedEncoder(Encoder):
    """The encoder of a model of two halves, which projects what these encoded once.

    Attributes:
        frozen: Encodes by the halves alone, and keeps what it encoded.
    """

    frozen: Encoder

    @property
    def folders(self) -> set[Path]:
        return self.frozen.folders

    def showing(self, show: bool) -> "Encoder":
        frozen = self.frozen if self.frozen.show == show else self.frozen.showing(show)
        return replace(self, show=show, frozen=frozen)

    def readable_images(self, images: "Images | Reader", *, stage: str) -> Encoded:
        encoded = self.frozen.readable_images(images, stage=stage)
        project = self._projections.encode_image
        return replace(encoded, features=self._projected(encoded.features, project))

    def texts(self, texts: Iterable[str], *, stage: str, content: str = "") -> Float[Tensor, "n d"]:
        features = self.frozen.texts(texts, stage=stage, content=content)
        return self._projected(features, self._projections.encode_text)

    def joint(
        self, images: Float[Tensor, "n q"], texts: Float[Tensor, "m r"]
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, "m d"]]:
        """What the model makes of features of its halves."""
        both = self._projections
        return self._projected(images, both.encode_image), self._projected(texts, both.encode_text)

    @cached_property
    def _projections(self) -> Projections:
        assert isinstance(self.model, ProtoCLIP)
        return Projections(self.model.towers)

    @torch.no_grad()
    def _projected(
        self, features: Float[Tensor, "n q"], project: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "n d"]:
        if not len(features):  # of no known width
            return torch.zeros(0, 0)
        parts = torch.split(features, PROJECTED)
        with evaluation_mode(self.model):
            return torch.cat([project(rows.float().to(self.device)).cpu() for rows in parts])


@dataclass(frozen=True, kw_only=True)
class HalvesEncoder(Encoder):
    """The encoder of two halves, which keeps features of each by that half alone.

    So a half whose partner is another one encodes nothing anew.
    """

    def _folder(self, kind: str) -> Path:
        if not isinstance(self.transform, EvaluationTransform):
            return super()._folder(kind)
        return self._folders[kind]

    @cached_property
    def _folders(self) -> dict[str, Path]:
        assert self.cache is not None
        assert isinstance(self.model, FrozenEncoders)
        assert isinstance(self.transform, EvaluationTransform)
        with evaluation_mode(self.model):
            image = image_side(
                self.model, self.transform, max_pixels=MAX_IMAGE_PIXELS, autocast=self.context
            )
            text = text_side(self.model, self.tokenizer, autocast=self.context)
            keys = {"images": image.key(), "texts": text.key()}
        return {kind: self.cache / checksum(f"{key} {kind}".encode()) for kind, key in keys.items()}


@dataclass(frozen=True, kw_only=True)
class AlignedHalves(HalvesEncoder):
    """The encoder of two halves that reads what `align` encoded for training, where that is known.

    Each start reads the captions, and looks at the files. `config` is the run's.
    """

    config: Config

    def readable_images(self, images: "Any | Reader", *, stage: str) -> Encoded:
        if not isinstance(images, PairsView) or not isinstance(self.transform, EvaluationTransform):
            return super().readable_images(images, stage=stage)
        stored, missing = self._stored(hash_images(images), transform=self.transform)
        rest = Encoded(features=torch.zeros(0, 0))
        if len(missing):
            rest = super().readable_images(PairsView([(images, missing)]), stage=stage)
        bad = [(int(missing[row]), why) for row, why in rest.bad]
        others = np.setdiff1d(missing, [row for row, _ in bad])
        return Encoded(features=joined(stored, missing, others, rest.features), bad=bad)

    def texts(self, texts: Iterable[str], *, stage: str, content: str = "") -> Float[Tensor, "n q"]:
        texts = [*texts]
        stored, missing = self._stored(hash_ids(texts))
        rest = torch.zeros(0, 0)
        if len(missing):
            rest = super().texts([texts[row] for row in missing], stage=stage)
        return joined(stored, missing, missing, rest)

    def _stored(
        self, hashes: Hashes, transform: EvaluationTransform | None = None
    ) -> tuple[Float[Tensor, "k q"], Numbers]:
        """What a half encoded of images by a transform, or else of texts, in order; and
        the positions of those that it did not."""
        assert isinstance(self.model, FrozenEncoders)
        context = autocast(resolve(self.config.run.precision, self.device), self.device)
        with evaluation_mode(self.model):
            half = text_side(self.model, self.tokenizer, autocast=context)
            if transform is not None:
                most = self.config.data.max_image_pixels
                half = image_side(self.model, transform, max_pixels=most, autocast=context)
            folder = features_folder(self.config) / checksum(half.key().encode())
        store = Store(folder, setting=SETTING)
        numbers = store.find(hashes)
        rows = store.read(numbers[numbers >= 0]).reshape(-1, half.width)
        return torch.from_numpy(rows), np.flatnonzero(numbers < 0)


def joined(
    features: Float[Tensor, "k _"],
    missing: Numbers,
    others: Numbers,
    of_others: Float[Tensor, "o _"],
) -> Float[Tensor, "n _"]:
    """Features in order: those of the store, which miss some, and of others among these."""
    known = np.setdiff1d(np.arange(len(features) + len(missing)), missing)
    if not len(others):
        return features
    order = np.argsort(np.concatenate([known, others]))
    return torch.cat([features, of_others])[torch.from_numpy(order)]
