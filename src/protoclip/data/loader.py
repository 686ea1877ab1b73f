"""Batches of an episode, in a fixed order, from any position."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from protoclip.config import Config
from protoclip.data.cache import ImageCache, crop, image_cache
from protoclip.data.decode import Box
from protoclip.data.pairs import (
    MAX_IMAGE_PIXELS,
    BadSample,
    Pairs,
    Sample,
    SampleStream,
)
from protoclip.data.sampler import (
    TRANSFORM_STREAM,
    Episode,
    caption_draws,
    transform_draws,
)
from protoclip.data.transforms import Transform
from protoclip.distributed.collectives import rank, world_size

# Shorter side of small copies: this, or more where crops are larger.
COPY_SIDE, COPY_MARGIN = 256, 10 / 7


# Samples at hand to stand in for the bad ones of a batch, as a share of it, and at least so many.
# Rows cost nothing until they are read; a stream's samples travel to the workers with the batch.
SPARE_ROWS, SPARE_SAMPLES, SPARE_LEAST = 4.0, 0.25, 8


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Pairs ready for the model. `position` is each pair's place in its episode."""

    position: Int[Tensor, " b"]
    sample_id: list[str]
    image: Float[Tensor, "b 3 h w"]
    text: Int[Tensor, "b c"]


@dataclass(frozen=True, kw_only=True)
class _Request:
    """One batch to be made: its places, and samples (or rows of them), followed by spare ones."""

    position: npt.NDArray[np.int64]
    candidates: list[int | Sample | BadSample]
    transform_draws: npt.NDArray[np.float32]
    caption_draws: npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class _Made:
    """A batch as a worker hands it over: bytes of cropped pictures, tokens, and what was bad."""

    position: Tensor
    sample_id: list[str]
    image: Tensor
    text: Tensor
    bad: list[BadSample]


class _BatchMaker(Dataset[_Made]):
    """Reads, decodes, crops and tokenizes; runs in worker processes. Its index is a request."""

    def __init__(self, loader: "EpisodeLoader") -> None:
        self.loader = loader

    def __getitem__(self, request: _Request) -> _Made:
        size = len(request.position)
        spare = iter(request.candidates[size:])
        samples, pictures, bad = [], [], []
        for slot, candidate in enumerate(request.candidates[:size]):
            while True:
                try:
                    sample = self.sample(candidate)
                    picture = self.picture(sample, request.transform_draws[slot])
                    break
                except BadSample as error:
                    bad.append(error)
                    following = next(spare, None)
                    if following is None:
                        return self.shortage(bad)
                    candidate = following
            samples.append(sample)
            pictures.append(picture)
        captions = [
            sample.captions[int(draw * len(sample.captions))]
            for sample, draw in zip(samples, request.caption_draws, strict=True)
        ]
        return _Made(
            position=torch.from_numpy(request.position),
            sample_id=[sample.sample_id for sample in samples],
            image=torch.from_numpy(np.stack(pictures)),
            text=self.loader.tokenizer(captions),
            bad=bad,
        )

    def shortage(self, bad: list[BadSample]) -> _Made:
        nothing = torch.zeros(0)
        return _Made(position=nothing, sample_id=[], image=nothing, text=nothing, bad=bad)

    def sample(self, candidate: int | Sample | BadSample) -> Sample:
        if isinstance(candidate, BadSample):
            raise candidate
        if isinstance(candidate, Sample):
            return candidate
        assert isinstance(self.loader.pairs, Pairs)
        return self.loader.pairs.sample(candidate)

    def picture(self, sample: Sample, draws: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        transform = self.loader.transform

        def box(width: int, height: int) -> Box:
            return transform.box(width, height, draws)

        try:
            return crop(
                sample.image,
                box,
                transform.size,
                max_pixels=self.loader.max_image_pixels,
                small_side=self.loader.small_side,
                cache=self.loader.cache,
            )
        except ValueError as error:
            raise BadSample(sample.sample_id, sample.where, str(error)) from None


@dataclass(frozen=True, kw_only=True)
class EpisodeLoader:
    """Turns episodes into batches.

    A bad sample (unreadable picture, no caption) is replaced by the next good one that follows its
    batch in the episode, so that no batch holds a pair twice, and reported to `on_read`.

    Attributes:
        pairs: Where the samples are: rows in any order, or a stream.
        tokenizer: Captions to tokens, `list[str] -> Int[b c]`.
        transform: How pictures become inputs.
        batch_size: Pairs a batch on this process; the last batch of an episode may be smaller.
        seed: With the episode's number, determines the random draws of views and captions.
        transform_stream: Stream of random numbers that views draw from.
        device: Where batches end up.
        workers: Processes that decode; 0 decodes in this process.
        rank, world_size: Which of how many processes this is; together they train each batch.
        cache: Keeps decoded pictures for repeated passes; changes nothing but the time.
        small_side: Take every crop from a copy of this shorter side; see `cache.crop`.
        max_image_pixels: Larger pictures count as bad.
        on_read: Called with each batch's number of samples read and the bad ones among them.
    """

    pairs: Pairs | SampleStream
    tokenizer: Callable[[list[str]], Tensor]
    transform: Transform
    batch_size: int
    seed: int
    device: torch.device
    transform_stream: int = TRANSFORM_STREAM
    workers: int = 0
    rank: int = 0
    world_size: int = 1
    cache: ImageCache | None = None
    small_side: int | None = None
    max_image_pixels: int = MAX_IMAGE_PIXELS
    on_read: Callable[[int, list[BadSample]], None] | None = None

    def batches(self, episode: Episode, start: int = 0) -> Iterator[Batch]:
        """This process's batches of an episode from number `start` on.

        A pure function of its arguments: batches after a restart are those of a run that was not
        interrupted, with any number of workers and any cache.

        Raises:
            ValueError: A worker process died, or a batch found no good samples to fill it.
        """
        draws = transform_draws(
            self.seed,
            episode.index,
            len(episode.rows),
            self.transform.num_draws,
            self.transform_stream,
        )
        loader = DataLoader(
            _BatchMaker(self),
            sampler=self.requests(episode, draws.numpy(), start),
            batch_size=None,
            collate_fn=_as_it_is,  # type: ignore[arg-type]  # a batch is one item here
            num_workers=self.workers,
            generator=torch.Generator(),  # or it would draw from the global one
        )
        iterator = iter(loader)
        while (made := self.next(iterator)) is not None:
            if self.on_read is not None:
                self.on_read(len(made.sample_id) + len(made.bad), made.bad)
            if not made.sample_id:
                raise ValueError(
                    f"{self.pairs.name}: a batch found only bad samples to fill it, such as "
                    f"{made.bad[0]}"
                )
            yield Batch(
                position=made.position.to(self.device),
                sample_id=made.sample_id,
                # Draws stay on the CPU, which decides by them what to do on the device.
                image=self.transform.finish(made.image.to(self.device), draws[made.position]),
                text=made.text.to(self.device),
            )

    def next(self, iterator: Iterator[_Made]) -> _Made | None:
        try:
            return next(iterator, None)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise ValueError(
                "data.workers: a worker process was killed, most often because memory ran out; "
                f"lower data.workers or episodes.batch_size ({str(error).splitlines()[0]})"
            ) from None

    def requests(
        self, episode: Episode, draws: npt.NDArray[np.float32], start: int
    ) -> Iterator[_Request]:
        """What batches to make, in order; read ahead of the training by the workers' prefetching.

        Batch by batch, all processes together take the next `batch_size * world_size` positions.
        """
        size = len(episode.rows)
        captions = caption_draws(self.seed, episode.index, size)
        whole = self.batch_size * self.world_size
        stream = self.stream(episode, start) if isinstance(self.pairs, SampleStream) else None
        rows = episode.rows.numpy()
        for first in range(start * whole, size, whole):
            end = min(first + whole, size)
            position = np.array_split(np.arange(first, end), self.world_size)[self.rank]
            share = SPARE_ROWS if stream is None else SPARE_SAMPLES
            spare = max(SPARE_LEAST, int(share * len(position)))
            if stream is not None:
                candidates: list[int | Sample | BadSample] = stream(len(position), spare)
            else:
                # Each process has spare rows of its own among those after the batch.
                after = (end + self.rank + self.world_size * np.arange(spare)) % size
                candidates = rows[np.concatenate([position, after])].tolist()
            yield _Request(
                position=position,
                candidates=candidates,
                transform_draws=draws[position],
                caption_draws=captions[position],
            )

    def stream(
        self, episode: Episode, start: int
    ) -> Callable[[int, int], list[int | Sample | BadSample]]:
        """Take so many samples from the stream, and look at so many of those that follow."""
        assert isinstance(self.pairs, SampleStream)
        share = len(episode.rows) // self.world_size
        samples = self.pairs.samples(episode.index * share + start * self.batch_size)
        ahead: list[int | Sample | BadSample] = []

        def take(number: int, spare: int) -> list[int | Sample | BadSample]:
            ahead.extend(islice(samples, number + spare - len(ahead)))
            taken = list(ahead)
            del ahead[:number]
            return taken

        return take

    def position(self, episode: int, batch: int, episode_size: int) -> dict[str, Any]:
        """Where a run stands after `batch` batches of an episode, as JSON-able facts."""
        facts: dict[str, Any] = {"episode": episode, "batch": batch}
        if isinstance(self.pairs, SampleStream):
            facts["stream"] = self.pairs.state_dict(episode * (episode_size // self.world_size))
        return facts

    def restore(self, position: dict[str, Any]) -> None:
        """Make `batches` quick to start at a position that another process stated."""
        if isinstance(self.pairs, SampleStream) and "stream" in position:
            self.pairs.load_state_dict(position["stream"])


def _as_it_is(made: _Made) -> _Made:
    return made


def loader(
    config: Config,
    samples: Pairs | SampleStream,
    *,
    tokenizer: Callable[[list[str]], Tensor],
    transform: Transform,
    device: torch.device,
    on_read: Callable[[int, list[BadSample]], None],
) -> EpisodeLoader:
    """This process's share of the batches.

    Raises:
        ValueError: The processes cannot share a batch evenly.
    """
    share, rest = divmod(config.episodes.batch_size, world_size())
    if rest or share < 2:
        raise ValueError(
            f"episodes.batch_size: {config.episodes.batch_size} pairs cannot be shared evenly by "
            f"{world_size()} processes, two or more each; try {max(2, share) * world_size()}"
        )
    return EpisodeLoader(
        pairs=samples,
        tokenizer=tokenizer,
        transform=transform,
        batch_size=share,
        rank=rank(),
        world_size=world_size(),
        seed=config.run.seed,
        device=device,
        workers=config.data.workers,
        cache=image_cache(config.data, samples),
        small_side=max(COPY_SIDE, math.ceil(transform.size * COPY_MARGIN))
        if config.data.small_copies
        else None,
        max_image_pixels=config.data.max_image_pixels,
        on_read=on_read,
    )
