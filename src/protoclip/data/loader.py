"""Batches of an episode, in a fixed order, from any position."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from protoclip.data.episodes import Episode, view_draws
from protoclip.data.pairs import ImageTextPairs
from protoclip.data.transforms import View


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Pairs ready for the model. `position` is each pair's place in its episode."""

    position: Int[Tensor, " b"]
    sample_id: list[str]
    image: Float[Tensor, "b 3 h w"]
    text: Int[Tensor, "b c"]


class _EpisodeSamples(Dataset[dict[str, Any]]):
    """Decoded and cropped pictures of an episode's samples, by position; runs in workers."""

    def __init__(
        self, pairs: ImageTextPairs, rows: Int[Tensor, " m"], view: View, draws: Tensor
    ) -> None:
        self.pairs, self.view = pairs, view
        self.rows, self.draws = rows.tolist(), draws.numpy()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> dict[str, Any]:
        row = self.rows[position]
        return {
            "position": position,
            "sample_id": self.pairs.sample_id(row),
            "image": self.view.crop(self.pairs.image(row), self.draws[position]),
            "caption": self.pairs.caption(row),
        }


@dataclass(frozen=True, kw_only=True)
class EpisodeLoader:
    """Turns episodes into batches.

    Attributes:
        pairs: Where the samples are.
        tokenizer: Captions to tokens, `list[str] -> Int[b c]`.
        view: How pictures become inputs.
        batch_size: Pairs a batch; the last batch of an episode may be smaller.
        seed: With the episode's number, determines the view's random draws.
        device: Where batches end up.
        workers: Processes that decode; 0 decodes in this process.
    """

    pairs: ImageTextPairs
    tokenizer: Callable[[list[str]], Tensor]
    view: View
    batch_size: int
    seed: int
    device: torch.device
    workers: int = 0

    def batches(self, episode: Episode, start: int = 0) -> Iterator[Batch]:
        """The episode's batches from number `start` on; a pure function of its arguments."""
        draws = view_draws(self.seed, episode.index, len(episode.rows), self.view.num_draws)
        remaining = range(start * self.batch_size, len(episode.rows))
        loader = DataLoader(
            _EpisodeSamples(self.pairs, episode.rows, self.view, draws),
            batch_sampler=[
                list(remaining[first : first + self.batch_size])
                for first in range(0, len(remaining), self.batch_size)
            ],
            collate_fn=self._collate,
            num_workers=self.workers,
        )
        for position, sample_id, image, text in loader:
            yield Batch(
                position=position.to(self.device),
                sample_id=sample_id,
                image=self.view.finish(image.to(self.device), draws[position].to(self.device)),
                text=text.to(self.device),
            )

    def _collate(self, samples: list[dict[str, Any]]) -> tuple[Tensor, list[str], Tensor, Tensor]:
        return (
            torch.tensor([sample["position"] for sample in samples]),
            [sample["sample_id"] for sample in samples],
            torch.from_numpy(np.stack([sample["image"] for sample in samples])),
            self.tokenizer([sample["caption"] for sample in samples]),
        )
