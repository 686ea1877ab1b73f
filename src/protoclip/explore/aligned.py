"""What `align` has encoded of the pairs of a run, for the map of that run.

It reads the store of the frozen halves (`features/halves.py`). What is not there the whole model
encodes, as that of any other run (`evaluation/features.py`).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from protoclip.config import Config
from protoclip.data.transforms import EvaluationTransform
from protoclip.data.view import PairsView
from protoclip.evaluation.features import PROJECTED, Encoded, Encoder, Reader
from protoclip.features import halves
from protoclip.features.halves import HalfEncoder
from protoclip.features.store import Numbers, Segments, hash_ids
from protoclip.files import checksum
from protoclip.models.aligned import FrozenHalves, Projections
from protoclip.models.precision import autocast, resolve
from protoclip.models.protoclip import ProtoCLIP, evaluation_mode


@dataclass(frozen=True, kw_only=True)
class AlignedRunEncoder(Encoder):
    """The encoder of a run between two halves, which reads what these encoded for training.

    Each start reads the captions, looks at the files, and projects anew: nothing but the halves'
    features is kept. Those of images come without hashes of their content. `config` is the run's.
    """

    config: Config

    def readable_images(self, images: "Any | Reader", *, stage: str) -> Encoded:
        if not isinstance(images, PairsView) or not isinstance(self.transform, EvaluationTransform):
            return super().readable_images(images, stage=stage)
        stored = self._stored(transform=self.transform)
        numbers = stored.find(halves.hashes_of_images(images))
        missing = np.flatnonzero(numbers < 0)
        rest = Encoded(features=torch.zeros(0, 0))
        if len(missing):
            rest = super().readable_images(PairsView([(images, missing)]), stage=stage)
        bad = [(int(missing[row]), why) for row, why in rest.bad]
        others = np.setdiff1d(missing, [row for row, _ in bad])
        project = self._projections.encode_image
        return Encoded(
            features=self._joined(stored, numbers, project, others, rest.features), bad=bad
        )

    def texts(self, texts: Iterable[str], *, stage: str, content: str = "") -> Float[Tensor, "n d"]:
        texts = [*texts]
        stored = self._stored(tokenizer=self.tokenizer)
        numbers = stored.find(hash_ids(texts))
        missing, rest = np.flatnonzero(numbers < 0), torch.zeros(0, 0)
        if len(missing):
            rest = super().texts([texts[row] for row in missing], stage=stage)
        return self._joined(stored, numbers, self._projections.encode_text, missing, rest)

    @cached_property
    def _projections(self) -> Projections:
        assert isinstance(self.model, ProtoCLIP)
        return Projections(self.model.towers)

    def _stored(self, **reads: Any) -> Segments:
        """What a half has encoded: of images by a transform, or of texts by a tokenizer."""
        assert isinstance(self.model, ProtoCLIP)
        with evaluation_mode(self.model):
            half = HalfEncoder(
                FrozenHalves(self.model.towers),
                max_pixels=self.config.data.max_image_pixels,
                autocast=autocast(resolve(self.config.run.precision, self.device), self.device),
                **reads,
            )
            folder = halves.features_folder(self.config) / checksum(half.key().encode())
        return halves.opened(folder, half.width)

    @torch.inference_mode()
    def _joined(
        self,
        stored: Segments,
        numbers: Numbers,
        project: Callable[[Tensor], Tensor],
        others: Numbers,
        features_of_others: Tensor,
    ) -> Float[Tensor, "n d"]:
        """Features in order: of rows that have a number in the store, and of the others."""
        known, parts = np.flatnonzero(numbers >= 0), list[Tensor]()
        with evaluation_mode(self.model):
            for first in range(0, len(known), PROJECTED):
                rows = stored.rows(numbers[known[first : first + PROJECTED]])
                parts.append(project(torch.from_numpy(rows).float().to(self.device)).cpu())
        if not len(others):
            return torch.cat(parts) if parts else torch.zeros(0, 0)
        order = np.argsort(np.concatenate([known, others]))
        return torch.cat([*parts, features_of_others])[torch.from_numpy(order)]
