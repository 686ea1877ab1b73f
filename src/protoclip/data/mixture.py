"""Several sources as one, with sample ids that begin with the name of their source.

Streams are mixed here; sources with rows become a view of `view.py`, whose rows `sampler.py` draws.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from protoclip.data.access import digest
from protoclip.data.pairs import BadSample, ImageTextPairs, Sample, SampleStream
from protoclip.data.sampler import ORDER_STREAM, generator
from protoclip.data.view import PairsView, whole

PERIOD = 1000  # a mixture of streams keeps its shares exactly over as many samples


def _joined_name(sources: Sequence[ImageTextPairs | SampleStream]) -> str:
    """The name of a mixture; raises if ids `<name>/<id in the source>` could be equal."""
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1 or "/" in name:
            wrong = f"two are named '{name}'" if "/" not in name else f"'{name}' holds a '/'"
            raise ValueError(
                f"data.sources: {wrong}, but sample ids start with the name; give each source a "
                "name of its own, without '/', by name = ... in its [[data.sources]]"
            )
    return " + ".join(names)


def under(name: str, item: Sample | BadSample) -> Sample | BadSample:
    """A sample with the id that it has in a mixture, if its source has that name."""
    sample_id = f"{name}/{item.sample_id}"
    if isinstance(item, Sample):
        return replace(item, sample_id=sample_id)
    return BadSample(sample_id, item.where, item.reason)


def mixed_pairs(sources: Sequence[ImageTextPairs]) -> PairsView:
    """Sources one after the other; sample ids are `<name of the source>/<id in the source>`.

    Raises `ValueError` for two sources of one name, or a name with a `/`.
    """
    return whole([source.in_mixture() for source in sources], _joined_name(sources))


class MixedStreams:
    """Streams in a seeded order, each with its exact share of every thousand samples.

    Sample ids are as in `mixed_pairs`. Raises `ValueError` as that, or if a weight is too small.
    """

    def __init__(
        self, streams: Sequence[SampleStream], *, weights: Sequence[float], seed: int
    ) -> None:
        self.name, self.streams, self.seed = _joined_name(streams), list(streams), seed
        self.notes = [note for stream in streams for note in getattr(stream, "notes", ())]
        bounds = np.rint(PERIOD * np.cumsum(weights) / sum(weights)).astype(np.int64)
        self._shares = np.diff(bounds, prepend=0)
        if not self._shares.all():
            raise ValueError("data.sources: a weight is less than a thousandth of their sum")
        names, shares = [stream.name for stream in streams], self._shares.tolist()
        self._identity = digest({"names": names, "shares": shares, "seed": seed})

    @property
    def lanes(self) -> int:
        return self.streams[0].lanes

    def samples(self, first: int = 0, lane: int = 0) -> Iterator[Sample | BadSample]:
        period, skip = divmod(first, PERIOD)
        readers = [stream.samples(count, lane) for stream, count in self._counts(first)]
        while True:
            for source in self._order(period)[skip:]:
                yield under(self.streams[source].name, next(readers[source]))
            period, skip = period + 1, 0

    def state_dict(self, first: int, lane: int = 0) -> dict[str, Any]:
        states = [stream.state_dict(count, lane) for stream, count in self._counts(first)]
        return {"streams": states, "mixture": self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.get("mixture") != self._identity:
            raise ValueError(
                f"{self.name}: the names, the weights or the seed are not those of the interrupted "
                "run, so the streams cannot go on; restore them, or start anew"
            )
        for stream, of_stream in zip(self.streams, state["streams"], strict=True):
            stream.load_state_dict(of_stream)

    def _order(self, period: int) -> npt.NDArray[np.int64]:
        sources = np.repeat(np.arange(len(self.streams)), self._shares)
        return generator(self.seed, ORDER_STREAM, period).permutation(sources)

    def _counts(self, first: int) -> list[tuple[SampleStream, int]]:
        """The streams, each with how many of the first samples came from it."""
        period, within = divmod(first, PERIOD)
        begun = np.bincount(self._order(period)[:within], minlength=len(self.streams))
        return list(zip(self.streams, (period * self._shares + begun).tolist(), strict=True))


def sources_of(samples: Any) -> list[Any]:
    """The sources of a view or mixture; else the samples themselves."""
    if isinstance(samples, PairsView):
        return samples.sources
    return samples.streams if isinstance(samples, MixedStreams) else [samples]
