"""The one loop in which frozen models encode: items are read ahead, and bad ones passed over.

Ranks take turns in the units of a pass, so a unit has the same items, and its features the same
bits, for any number of ranks.
"""

import socket
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from protoclip.data import access
from protoclip.data.pairs import BadSample, Pairs, Sample
from protoclip.distributed import parallel
from protoclip.distributed.collectives import (
    all_gather_object,
    any_rank,
    count_cores,
    gather_results,
    rank,
    rank0_first,
    take_turns,
    world_size,
)
from protoclip.encode.encoder import Encoder, device_of
from protoclip.encode.engine import accelerate
from protoclip.encode.linear_maps import Features
from protoclip.encode.store import Hashes, Numbers, Store, hash_ids
from protoclip.files import checksum, lock_path
from protoclip.models import layers
from protoclip.progress import Progress

BLOCK_ROWS = 2**11  # that are encoded before they are written
TURNS = 2**7  # of the loop after which what was encoded is written, however little it is
TEXTS_AT_ONCE = 2**13  # items of texts among which those of similar length are encoded together
WAIT = 60.0  # seconds for another process that writes to the store
T = TypeVar("T")
Made = TypeVar("Made")
Prepared = tuple[int, Any]  # the hash of an item's id, and the model's input; None if it is known
Unit = tuple[list[Prepared], Any]  # inputs that are encoded together, and a report for all ranks
Encoded = tuple[Hashes, Features, Any]  # the same with the features of these inputs


def encode_missing(
    store: Store,
    encoder: Encoder,
    hashes: Hashes,
    read: Callable[[int], Sample],
    *,
    batch_size: int,
    threads: int | None = None,
) -> dict[int, BadSample]:
    """Encode into a store the items that it lacks, in their order. All ranks call it.

    Items are numbers, whose ids have these `hashes`; those of equal hashes are one. `read` gives
    the sample of an item, or raises `BadSample`. The feature of a sample's texts is their mean.

    Returns:
        What is wrong with items that the store still lacks, by their hashes.

    Raises:
        ValueError: The store cannot be used, ranks see other items or weights, features are not
            finite, or for long no remote image could be read.
    """
    if not any_rank([not store.has(hashes).all()])[0]:  # reading disturbs nobody
        return {}
    require_same_for_all_ranks(encoder, hashes)
    is_text = encoder.reads == "text"

    def prepare(number: int) -> Prepared:
        return int(hashes[number]), prepare_sample(encoder, read(number))

    def lock() -> OSError | ValueError | None:
        way_out = f"name another by {store.setting}"
        try:
            stack.enter_context(lock_path(store.folder, way_out=way_out, wait=WAIT))  # type: ignore[arg-type]
        except (OSError, ValueError) as error:  # what it lacks may be bad images alone
            return error
        return None

    with ExitStack() as stack:
        if store.folder is not None and not store.is_optional:
            store.refusal = rank0_first(lock)
            store.open()
        missing = np.flatnonzero(~store.has(hashes))
        missing = np.sort(missing[np.unique(hashes[missing], return_index=True)[1]])
        if not len(missing):  # another process was faster
            return {}
        bad = encode_numbers(
            store,
            encoder,
            missing,
            prepare,
            label=f"encode {encoder.reads}s with {encoder.name}",
            unit=TEXTS_AT_ONCE if is_text else batch_size,
            batch_size=batch_size if is_text else None,
            threads=threads,
        )
    return {int(hashes[number]): error for number, error in bad.items()}


def encode_numbers(
    store: Store,
    encoder: Encoder,
    numbers: Numbers,
    prepare: Callable[[int], Prepared],
    *,
    label: str,
    unit: int,
    hashes: Hashes | None = None,
    batch_size: int | None = None,
    threads: int | None = None,
) -> dict[int, BadSample]:
    """Encode numbered items into a store, a `unit` at a time. All ranks call it.

    Args:
        label: Of the progress, which rank 0 shows; empty for none.
        hashes: An array that is filled in, at the number of each item, with what `prepare` tells.
        threads: How many read images; unset, one a core.

    Returns:
        What is wrong with items, by their numbers.
    """
    bad, done = dict[int, BadSample](), 0
    progress = Progress(label, len(numbers)) if label and rank() == 0 else None
    threads = 0 if encoder.reads == "text" else threads

    def read(share: Iterator[Numbers]) -> Generator[Unit, None, None]:
        for items in read_ahead((some.tolist() for some in share), prepare, threads):
            made = [one for _, one in items if not isinstance(one, BadSample)]
            outcomes = [(n, one if isinstance(one, BadSample) else one[0]) for n, one in items]
            yield [one for one in made if one[1] is not None], outcomes

    def note_outcomes(of_ranks: Sequence[Sequence[tuple[int, int | BadSample]]]) -> None:
        nonlocal done
        for number, outcome in chain(*of_ranks):
            done += 1
            if isinstance(outcome, BadSample):
                bad[number] = outcome
            elif hashes is not None:
                hashes[number] = outcome
        if progress:
            progress.update(done)

    units = [numbers[first : first + unit] for first in range(0, len(numbers), unit)]
    encoder = accelerate(encoder, len(numbers))
    encode_into(store, encoder, units, read, batch_size=batch_size, after=note_outcomes)
    return bad


def prepare_sample(encoder: Encoder, sample: Sample) -> Any:
    """The model's input; raises `BadSample`."""
    try:
        return encoder.prepare(sample)
    except ValueError as error:
        raise BadSample(sample.sample_id, sample.where, str(error)) from error


def require_same_for_all_ranks(encoder: Encoder, hashes: Hashes) -> None:
    """Refuse a host that would store features of other weights, or under other names."""
    if world_size() == 1:
        return
    # Machines interpolate embeddings of positions with other last digits.
    seen = [checksum(hashes.tobytes()), encoder.checksum(without="pos")]
    ranks = all_gather_object([socket.gethostname(), *seen])
    for host, *others in ranks:
        if others != ranks[0][1:]:
            raise ValueError(
                f"{encoder.name}: {host} sees other samples (names, sizes or times of files count) "
                "or weights than rank 0; let all hosts read the same files, or copy them with "
                "their times"
            )


def images_at_once(model: torch.nn.Module) -> int:
    """How many images a frozen model encodes at once: with more, a CPU's work leaves its caches."""
    return 16 if device_of(model).type == "cpu" else 256


def hash_images(pairs: Any) -> Hashes:
    """Equal for rows that name the same image file."""
    return hash_ids(map(pairs.image_key, range(len(pairs))))


def hash_captions(pairs: Pairs) -> tuple[Hashes, Numbers]:
    """The hashes of all captions, row after row; and how many each row has, which may be none."""
    counts = np.zeros(len(pairs), np.int64)

    def read_rows() -> Iterator[str]:
        for row in range(len(pairs)):
            with suppress(BadSample):
                captions = pairs.sample_captions(row)
                counts[row] = len(captions)
                yield from captions

    return hash_ids(read_rows()), counts


def read_image(pairs: Any, row: int) -> Sample:
    """The image of a row, without captions."""
    image, sample_id = pairs.read_encoded(row), pairs.sample_id(row)
    return Sample(sample_id=sample_id, image=image, captions=(), where=pairs.where(row))


def read_captions(pairs: Pairs, row: int, place: int | None = None) -> Sample:
    """The captions of a row, or the one at a place among them, without the image."""
    captions = pairs.sample_captions(row)
    return Sample(
        sample_id=pairs.sample_id(row),
        image=b"",
        captions=captions if place is None else captions[place : place + 1],
        where=pairs.name,
    )


def encode_into(
    store: Store,
    encoder: Encoder,
    items: Sequence[T],
    read: Callable[[Iterator[T]], Generator[Unit, None, None]],
    *,
    batch_size: int | None = None,
    after: Callable[[list[Any]], None],
    written: Callable[[], None] | None = None,
) -> None:
    """Encode items into a store, which ranks share, a unit of each at a time. All ranks call it.

    Args:
        read: Reads this rank's items, a unit at a time: inputs with their hashes, and a report.
        batch_size: How many texts of a unit are encoded at once, those of similar length together,
            so that little is padding; unset, all are.
        after: Is called by all ranks after each unit, with the reports of all.
        written: Is called by all ranks when all rows so far are in the store.

    Raises:
        ValueError: A unit cannot be read, features are not finite, or for long no remote image
            could be read; on all ranks.
    """
    # Attention with adapters changes the order of its parameters in each pass, and by their order
    # ranks send them to each other. So a rank without inputs takes an example.
    all_pass = world_size() > 1 and (
        parallel.is_sharded(encoder.module) or layers.has_adapters(encoder.module)
    )
    rows = list[tuple[Hashes, Features]]()  # which are not written yet

    def write() -> None:
        if rows:
            features = np.concatenate([features for _, features in rows])
            with np.errstate(over="ignore"):
                features = features.astype(store.dtype)
            if not np.isfinite(features).all():  # the same bits on every rank
                raise ValueError(
                    f"{encoder.name}: features are not finite in {store.dtype}, or larger than "
                    f"{np.finfo(store.dtype).max:g}; the model has diverged, or choose another"
                )
            hashes = np.concatenate([hashes for hashes, _ in rows])
            store.add(hashes, features, engine=getattr(encoder.forward, "version", ""))
            rows.clear()
            if not store.volumes:  # or hosts would learn at the end that they do not share it
                store.open()
        if written is not None:
            written()

    def encode_unit(inputs: list[Any], report: Any) -> Encoded:
        hashes = np.array([hash_ for hash_, _ in inputs], np.uint64)
        made = [made for _, made in inputs]
        if all_pass:
            features = encoder.encode(made or [*encoder.examples[:1]])[: len(made)]
        else:
            features = encode_some(encoder, made, batch_size)
        return hashes, features.numpy(), report

    with closing(take_turns(items, read)) as units:
        for turn, unit in enumerate(units, 1):
            encode = partial(encode_unit, *(unit or ([], None)))
            # A rank that fails where all pass together ends, since others wait there.
            made = all_gather_object(encode()) if all_pass else gather_results(encode)
            rows += [(hashes, features) for hashes, features, _ in made if len(hashes)]
            after([report for *_, report in made if report is not None])
            if turn % TURNS == 0 or sum(len(hashes) for hashes, _ in rows) >= BLOCK_ROWS:
                write()
        write()
    store.open()


def encode_some(
    encoder: Encoder, inputs: list[Any], batch_size: int | None
) -> Float[Tensor, "b q"]:
    """Features of any number of inputs: samples of texts, if `batch_size` is set."""
    if not inputs:
        return torch.zeros(0, 0)
    if batch_size is None:
        return encoder.encode(inputs)
    texts = [*chain.from_iterable(inputs)]
    order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
    batches = [
        encoder.encode([texts[number] for number in order[first : first + batch_size]])
        for first in range(0, len(order), batch_size)
    ]
    made = torch.cat(batches)
    features = torch.empty_like(made)
    features[torch.tensor(order)] = made
    if not encoder.unit_norm:
        assert len(texts) == len(inputs), "several texts have no mean of a norm that counts"
        return features
    owner = torch.repeat_interleave(torch.tensor([len(several) for several in inputs]))
    return F.normalize(torch.zeros(len(inputs), made.shape[1]).index_add_(0, owner, features))


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
    """Items with what `prepare` makes of them, a unit at a time; to be closed."""

    def prepare_timed(item: T) -> tuple[Made | BadSample, float, float]:
        began = time.monotonic()
        made: Made | BadSample
        try:
            made = prepare(item)
        except BadSample as error:
            made = error
        return made, began, time.monotonic()

    if threads == 0:
        for unit in units:
            yield [(item, prepare_timed(item)[0]) for item in unit]
        return
    failed, since, following = 0, 0.0, iter(units)  # remote images in a row, and since when
    pool, reader = ThreadPoolExecutor(threads or count_cores()), ThreadPoolExecutor(1)

    def begin_next() -> "list[tuple[T, Future[Any]]] | None":
        unit = next(following, None)
        return None if unit is None else [(item, pool.submit(prepare_timed, item)) for item in unit]

    try:
        coming = reader.submit(begin_next)
        while (begun := coming.result()) is not None:
            made = [(item, future.result()) for item, future in begun]
            for _, (one, began, ended) in made:
                if not isinstance(one, BadSample):
                    failed = 0
                elif is_kept_back(one):
                    failed, since = failed + 1, since if failed else began
                    if ended - since > access.PATIENCE_SECONDS:
                        raise ValueError(access.too_slow(f"{failed} samples in a row", one))
            coming = reader.submit(begin_next)
            yield [(item, one) for item, (one, _, _) in made]
    finally:
        reader.shutdown(cancel_futures=True)
        pool.shutdown(cancel_futures=True)  # or what is left of a unit would be read first
