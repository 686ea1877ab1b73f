"""Batches of the features that two frozen halves made of images and captions.

The halves encode in `halves.py`; batches of pixels and tokens come from `data/loader.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from protoclip.data.loader import (
    Batch,
    EpisodeLoader,
    Pass,
    named,
    pair_numbers,
    without_prefix,
)
from protoclip.data.packed import Packed
from protoclip.data.pairs import Pairs
from protoclip.data.sampler import caption_draws, transform_draws
from protoclip.data.transforms import EvaluationTransform
from protoclip.features.half_rows import HalfRows


@dataclass(frozen=True, kw_only=True)
class RowLoader(EpisodeLoader):
    """An `EpisodeLoader` whose images and captions are rows that the halves made of them.

    Every pair is good, and nothing is decoded, so it needs no workers.
    """

    halves: HalfRows

    def batches_of(self, wanted: Pass) -> Iterator[Batch]:
        """This rank's batches of a pass: a pure function of it, with any number of ranks."""
        assert isinstance(self.pairs, Pairs)
        episode, all_rows = wanted.episode, wanted.episode.rows.numpy()
        size, stride = len(all_rows), self.batch_size * self.world_size
        captions = caption_draws(self.seed, episode.index, size)
        views = None
        if not isinstance(wanted.transform, EvaluationTransform):
            views = transform_draws(self.seed, episode.index, size, 1, wanted.stream)[:, 0].numpy()
        for begin in range(wanted.start * stride, size, stride):
            numbers = np.arange(begin, min(begin + stride, size))
            position = np.array_split(numbers, self.world_size)[self.rank]
            rows = all_rows[position]
            each = self.captions.number
            drawn = self.halves.drawn_captions(rows, captions[position], each)
            hashes = self.halves.listing.captions[drawn]
            image = self.halves.image_rows(rows, None if views is None else views[position])
            of_pairs = np.repeat(rows, each)
            sample_ids = [self.pairs.sample_id(int(row)) for row in of_pairs]
            tensors = {
                "position": torch.from_numpy(pair_numbers(position, each)),
                "image": image,
                "text": self.halves.text_rows(drawn),
            }
            if wanted.with_features:
                of_ids = {name: of(sample_ids) for name, of in self.features_of.items()}
                tensors |= named("features", of_ids)
            if wanted.group_by:
                groups = self.halves.groups(self.pairs, of_pairs, drawn, wanted.group_by)
                tensors["groups"] = torch.from_numpy(groups)
            self.on_read(len(rows), [])
            sent = Packed.of(tensors).send(self.device)
            yield Batch(
                position=sent["position"],
                sample_id=sample_ids,
                image=sent["image"],
                text=sent["text"],
                captions=[each.tobytes() for each in hashes],
                features=without_prefix("features", sent),
                groups=sent.get("groups"),
            )
