"""The one loop in which frozen models encode: items are read ahead, and bad ones passed over.

Ranks take turns in the units of a pass, so a unit has the same items, and its features the same
bits, for any number of ranks.
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from protoclip.data import access
from protoclip.data.pairs import BadSample
from protoclip.distributed import parallel
from protoclip.distributed.collectives import (
    all_gather,
    any_rank,
    raise_on_all_ranks,
    rank,
    world_size,
)
from protoclip.distributed.cores import cores
from protoclip.encode.store import Hashes, Store
from protoclip.models import lora

BLOCK_ROWS = 2**11  # that are encoded before they are written
T = TypeVar("T")
Made = TypeVar("Made")
Prepared = tuple[int, Any]  # the hash of an item's id, and the model's input; None if it is known
Outcome = int | BadSample  # the hash of an item's id, or what is wrong with the item


@runtime_checkable
class Encodes(Protocol):
    """What the loop needs of a frozen model."""

    module: Any
    device: torch.device

    def encode(self, inputs: list[Any]) -> Float[Tensor, "b q"]: ...


@dataclass(frozen=True, kw_only=True)
class Round:
    """What became of one unit of each rank.

    Attributes:
        items: This rank's items, each with what came of it.
        hashes: Of the ids of all ranks' items that were encoded.
        features: Of these, in float32 on the CPU.
    """

    items: Sequence[tuple[Any, Outcome]]
    hashes: Hashes
    features: Float[Tensor, "n q"]


def units_of_rank(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """This rank's share of items, some at a time."""
    for first in range(rank() * size, len(items), world_size() * size):
        yield items[first : first + size]


def encode(
    encoder: Encodes,
    units: Iterable[Sequence[T]],
    prepare: Callable[[T], Prepared],
    *,
    batch_size: int | None = None,
    threads: int | None = None,
    blank: Callable[[], Any] | None = None,
) -> Generator[Round, None, None]:
    """What a frozen model makes of items, a unit of each rank at a time. All ranks call it.

    Args:
        units: This rank's items, some at a time.
        prepare: Reads an item; a `ValueError`, such as `BadSample`, marks a bad one.
        batch_size: How many texts of a unit are encoded at once, those of similar length together,
            so that little is padding; unset, all are.
        threads: How many prepare a unit while the model is at the one before; unset, one a core; 0
            for none.
        blank: An input that stands in where a rank has none. The forward pass of a sharded model is
            collective.

    Raises:
        ValueError: A unit cannot be read, or for long no remote image could be; on all ranks.
    """
    # Attention with adapters changes the order of its parameters in each pass, and by their order
    # ranks send them to each other.
    all_pass = parallel.is_sharded(encoder.module) or lora.has_adapters(encoder.module)
    coming = read_ahead(units, prepare, threads)
    try:
        while True:
            read = raise_on_all_ranks(lambda: next(coming, None))
            found = [each for _, each in read or () if not isinstance(each, BadSample)]
            new = [(hash_, given) for hash_, given in found if given is not None]
            goes_on, has_new = any_rank([read is not None, bool(new)])
            if not goes_on:
                return
            hashes, features = np.empty(0, np.uint64), torch.zeros(0, 0)
            if has_new:
                inputs = [given for _, given in new]
                if all_pass:  # a rank that fails in it ends, since others wait there
                    made = encoder.encode(inputs or [blank()])[: len(new)]  # type: ignore[misc]
                else:
                    made = raise_on_all_ranks(partial(encode_any, encoder, inputs, batch_size))
                own = np.array([hash_ for hash_, _ in new], np.uint64)
                hashes, features = gather_rows(own, made, encoder.device)
            items = [
                (item, each if isinstance(each, BadSample) else each[0])
                for item, each in read or ()
            ]
            yield Round(items=items, hashes=hashes, features=features)
    finally:
        coming.close()


def encode_any(encoder: Encodes, inputs: list[Any], batch_size: int | None) -> Float[Tensor, "b q"]:
    """Features of any number of inputs; of texts, if `batch_size` is set."""
    if not inputs:
        return torch.zeros(0, 0)
    if batch_size is None:
        return encoder.encode(inputs)
    order = sorted(range(len(inputs)), key=lambda number: -len(inputs[number]))
    made = [
        encoder.encode([inputs[number] for number in order[first : first + batch_size]])
        for first in range(0, len(order), batch_size)
    ]
    features = torch.empty(len(order), made[0].shape[1])
    features[torch.tensor(order)] = torch.cat(made)
    return features


def gather_rows(
    hashes: Hashes, features: Float[Tensor, "n _"], device: torch.device
) -> tuple[Hashes, Float[Tensor, "m q"]]:
    """The rows of all ranks, rank after rank."""
    if world_size() == 1:
        return hashes, features
    widths = all_gather(torch.tensor([features.shape[1]], device=device))
    if not len(features):
        features = features.new_zeros(0, int(widths.max()))
    numbers = all_gather(torch.from_numpy(hashes.view(np.int64)).to(device)).cpu().numpy()
    return numbers.view(np.uint64), all_gather(features.to(device)).cpu()


@dataclass
class Patience:
    """Remote images in a row that the network or the store kept back.

    Attributes:
        failed: How many there are since the last good sample.
        since: When reading the first of them began, in seconds of the monotonic clock.
    """

    failed: int = 0
    since: float = 0.0

    def add(self, one: object, began: float, ended: float) -> None:
        """Count what was read, or a bad sample; raises `ValueError` when it has lasted too long."""
        if not isinstance(one, BadSample):
            self.failed = 0
        elif is_kept_back(one):
            self.since = self.since if self.failed else began
            self.failed += 1
            if ended - self.since > access.PATIENCE_SECONDS:
                what = f"{self.failed} samples in a row"
                raise ValueError(access.too_slow(what, one))


def is_kept_back(bad: BadSample) -> bool:
    """Whether a remote image may be read later: it is not missing, refused or damaged."""
    met: BaseException | None = bad
    while isinstance(met, BadSample):  # a bad sample may be named anew
        met = met.__context__  # the error that ended its reading, if one did
    is_lasting = met is None or isinstance(met, FileNotFoundError | ValueError)
    return access.is_url(bad.where) and not is_lasting


def read_ahead(
    units: Iterable[Sequence[T]], prepare: Callable[[T], Made], threads: int | None
) -> Generator[list[tuple[T, Made | BadSample]], None, None]:
    """Items with what `prepare` makes of them, a unit at a time; see `encode`.

    Who leaves before the last unit closes the iterator, or the garbage collector may do so in one
    of its threads, which cannot wait for itself.
    """

    def prepared(item: T) -> tuple[Made | BadSample, float, float]:
        began = time.monotonic()
        made: Made | BadSample
        try:
            made = prepare(item)
        except BadSample as error:
            made = error
        return made, began, time.monotonic()

    if threads == 0:
        for unit in units:
            yield [(item, prepared(item)[0]) for item in unit]
        return
    patience, following = Patience(), iter(units)
    pool = ThreadPoolExecutor(threads or cores())
    reader = ThreadPoolExecutor(1)

    def begin_next() -> "list[tuple[T, Future[Any]]] | None":
        unit = next(following, None)
        return None if unit is None else [(item, pool.submit(prepared, item)) for item in unit]

    try:
        coming = reader.submit(begin_next)
        while (begun := coming.result()) is not None:
            made = [(item, future.result()) for item, future in begun]
            for _, (one, began, ended) in made:
                patience.add(one, began, ended)
            coming = reader.submit(begin_next)
            yield [(item, one) for item, (one, _, _) in made]
    finally:
        reader.shutdown(cancel_futures=True)
        pool.shutdown(cancel_futures=True)  # or what is left of a unit would be read first


def encode_into(
    store: Store,
    encoder: Encodes,
    units: Iterable[Sequence[T]],
    prepare: Callable[[T], Prepared],
    *,
    batch_size: int | None = None,
    threads: int | None = None,
    after: Callable[[Round], None] = lambda made: None,
    written: Callable[[], None] = lambda: None,
) -> None:
    """Encode items into a store, some thousand at a time. All ranks call it; see `encode`.

    Args:
        after: Is called by each rank after each round.
        written: Is called by each rank when all rows so far are in the store.
    """
    hashes, features, number = list[Hashes](), list[Tensor](), 0

    def write() -> None:
        nonlocal number
        if number:
            store.add(np.concatenate(hashes), torch.cat(features).numpy())
        hashes.clear()
        features.clear()
        number = 0
        raise_on_all_ranks(written)

    rounds = encode(encoder, units, prepare, batch_size=batch_size, threads=threads)
    with closing(rounds):
        for made in rounds:
            raise_on_all_ranks(partial(after, made))
            if len(made.hashes):
                hashes.append(made.hashes)
                features.append(made.features)
                number += len(made.hashes)
            if number >= BLOCK_ROWS:
                write()
    write()
    store.open()
