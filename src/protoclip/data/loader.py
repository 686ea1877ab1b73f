"""Batches of an episode, in a fixed order, from any position.

A batch comes in two pieces, the images as bytes and a block of everything else: two copies bring
it to the device. Worker processes go on with the pass that comes next while this one is used.
"""

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from protoclip import signals
from protoclip.config import Config
from protoclip.data import access, sampler
from protoclip.data.captions import ONE, CaptionDraw, Key, hash_content, hash_keys, trim_padding
from protoclip.data.decode import MemoryCache, decode_crop
from protoclip.data.pairs import LOST, BadSample, Pairs, Sample, SampleStream
from protoclip.data.summary import choose_workers
from protoclip.data.transforms import Transform
from protoclip.distributed.collectives import rank, world_size
from protoclip.files import naming, open_to_append, read_json_lines, to_json
from protoclip.terminal import counted, say

T = TypeVar("T")
Item = int | Sample | BadSample  # a row, or what a stream gave
NO_ROWS = torch.empty(0, dtype=torch.int64)
Tokenizer = Callable[[list[str]], Tensor]  # captions to tokens, [b, c]
Crop = Callable[..., npt.NDArray[np.uint8]]
OnRead = Callable[[int, list[BadSample]], None]
FeaturesOf = dict[str, Callable[[Sequence[str]], Tensor]]  # features of sample ids, by name
ALIGNMENT = 16  # bytes; every data type may be read at a multiple of its own size
QUOTED = 3  # reasons in the message of a run that is stopped


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Pairs ready for the model: `b` images, each with the same number of captions that follow
    each other, which makes `n` pairs.

    What a loss needs to know beside these is one more field, which `_Reader` fills by its name.
    """

    position: Int[Tensor, " n"]  # each pair's number in its episode
    sample_id: list[str]
    image: Float[Tensor, "b *_"]  # pixels `(b, c, h, w)`, or what a frozen encoder made of them
    text: Shaped[Tensor, "n _"]  # tokens, or what a frozen encoder made of a caption
    # What tells a sample's captions apart, such as the tokens of `text`, as bytes.
    captions: list[bytes] = field(default_factory=list)
    # What else is known of the samples, by name; see `EpisodeLoader.features_of`.
    features: Mapping[str, Float[Tensor, "n _"]] = field(default_factory=dict)
    groups: Int[Tensor, "n k"] | None = None  # keys by which pairs are positives of each other

    @cached_property
    def keys(self) -> Int[Tensor, " n"]:
        """A hash of each row's sample id, as `encode.store.hash_ids` makes them."""
        keys = torch.tensor([hash_content(name) for name in self.sample_id])
        return cast("Tensor", Packed.pack({"keys": keys}).send(self.position.device)["keys"])


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Tensors by name in one block of bytes, so that one copy brings them to another device."""

    block: UInt8[Tensor, " n"]
    # Names, data type, shape and first byte of each.
    layout: tuple[tuple[tuple[str, ...], torch.dtype, tuple[int, ...], int], ...]

    @classmethod
    def pack(cls, tensors: Mapping[str, Tensor | Mapping[str, Tensor]]) -> "Packed":
        """Pack tensors, and tensors by name, that are on the CPU."""
        flat = dict[tuple[str, ...], Tensor]()
        for name, value in tensors.items():
            if isinstance(value, Tensor):
                flat[name,] = value
            else:
                flat |= {(name, key): tensor for key, tensor in value.items()}
        layout, end = [], 0
        for names, tensor in flat.items():
            layout.append((names, tensor.dtype, tuple(tensor.shape), end))
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        packed = cls(block=torch.zeros(end, dtype=torch.uint8), layout=tuple(layout))
        for names, view in packed._views(packed.block).items():
            view.copy_(flat[names])
        return packed

    def unpack(self, device: torch.device) -> dict[str, Any]:
        """The tensors on a device, after at most one copy. They share memory with each other."""
        block = self.block.to(device, non_blocking=self.block.is_pinned())
        tensors = dict[str, Any]()
        for (name, *keys), view in self._views(block).items():
            if keys:
                tensors.setdefault(name, {})[keys[0]] = view
            else:
                tensors[name] = view
        return tensors

    def send(self, device: torch.device) -> dict[str, Any]:
        """The tensors on a device; no one waits for the copy to a card."""
        return (self.pin_memory() if device.type == "cuda" else self).unpack(device)

    def pin_memory(self, device: str | None = None) -> "Packed":
        """The same in page-locked memory; `DataLoader` calls it."""
        return Packed(block=self.block.pin_memory(), layout=self.layout)

    def _views(self, block: Tensor) -> dict[tuple[str, ...], Tensor]:
        return {
            names: block[first : first + dtype.itemsize * math.prod(shape)].view(dtype).view(shape)
            for names, dtype, shape, first in self.layout
        }


@dataclass(frozen=True)
class Pass:
    """One pass over an episode, from batch number `start` on."""

    episode: sampler.Episode
    start: int = 0
    transform: Transform | None = None  # unset, that of the loader
    stream: int = sampler.TRANSFORM_STREAM  # of random numbers for the transform
    with_features: bool = False  # whether batches bring `features`
    group_by: tuple[Key, ...] = ()  # the keys of `groups` that batches bring


class _Request(NamedTuple):
    """A batch to make, of rows as `row_candidates` takes them, or of what a stream gave."""

    wanted: Pass  # without rows
    transform: Transform
    position: npt.NDArray[np.int64]
    rows: list[int]
    stretches: list[sampler.Stretch]
    transform_draws: npt.NDArray[np.float32]
    caption_draws: npt.NDArray[np.float32]


class _Made(NamedTuple):
    """A batch on its way to the device; without images if there were not enough good samples."""

    bad: list[BadSample]
    error: str | None = None
    sample_ids: Sequence[str] = ()
    images: Tensor | None = None
    packed: Packed | None = None
    captions: Sequence[bytes] = ()
    lanes: frozenset[tuple[int, str]] = frozenset()  # see `Stretch.lane`


@dataclass(frozen=True, kw_only=True)
class _Reader(Dataset[_Made]):
    """Reads, decodes, crops and tokenizes, in worker processes. Its index is a request."""

    pairs: Pairs | SampleStream
    tokenizer: Tokenizer
    cut_padding: bool
    captions: CaptionDraw
    crop: Crop
    features_of: FeaturesOf
    on_cpu: bool  # where the transform is applied

    def __getitem__(self, request: _Request) -> _Made:
        wanted, transform = request.wanted, request.transform
        captions, images, ids = list[str](), [], list[str]()
        groups, bad, lost = list[list[int]](), list[BadSample](), 0.0
        for number, candidates in enumerate(self.candidates(request)):
            box = partial(transform.box, draws=request.transform_draws[number])
            cut = partial(self.crop, box=box, size=transform.size)
            for candidate in candidates:
                began = time.monotonic()
                try:
                    sample, image = read_image(self.pairs, candidate, cut)
                except BadSample as error:
                    bad.append(error)
                    lost += time.monotonic() - began
                    if lost > access.PATIENCE_SECONDS:  # or a large batch would wait for days
                        slow = access.too_slow(f"{len(bad)} samples of a batch", bad[-1])
                        return _Made(bad, error=slow)
                    continue
                drawn = self.captions.choose(sample.captions, float(request.caption_draws[number]))
                captions += drawn
                images.append(image)
                ids.append(sample.sample_id)
                groups += hash_keys(wanted.group_by, sample, drawn)
                break
            else:
                return _Made(bad)
        draws = torch.from_numpy(request.transform_draws)
        text = self.tokenizer(captions)
        read = trim_padding(text).contiguous() if self.cut_padding else text
        repeats = self.captions.number
        position = torch.from_numpy(pair_numbers(request.position, repeats))
        tensors: dict[str, Any] = {"position": position, "text": read}
        # A CPU applies a transform to a few images at a time, and so takes the draws themselves.
        tensors |= {"draws": draws} if self.on_cpu else {"changes": transform.changes(draws)}
        if wanted.group_by:
            tensors["groups"] = torch.tensor(groups)
        if wanted.with_features:
            try:
                rows = {name: find(ids) for name, find in self.features_of.items()}
            except ValueError as error:  # a worker's traceback would come with it
                return _Made(bad, error=str(error), sample_ids=ids)
            tensors["features"] = {
                n: part.repeat_interleave(repeats, 0) for n, part in rows.items()
            }
        return _Made(
            bad,
            sample_ids=ids,
            images=torch.from_numpy(np.stack(images)),
            packed=Packed.pack(tensors),
            captions=[row.tobytes() for row in text.numpy()],
            lanes=frozenset(stretch.lane for stretch in request.stretches),
        )

    def candidates(self, request: _Request) -> Iterator[Iterator[Item]]:
        """For each position, the samples to try until one is good."""
        if not request.stretches:
            return sampler.row_candidates(request.rows, len(request.position))
        transform, draws = request.transform, request.transform_draws[0]
        # No crop makes an image good or bad, so any one tells what another rank's is.
        cut = partial(self.crop, box=partial(transform.box, draws=draws), size=transform.size)

        def is_good(item: Item) -> bool:
            with contextlib.suppress(BadSample):
                read_image(self.pairs, item, cut)
                return True
            return False

        return chain.from_iterable(stretch.candidates(is_good) for stretch in request.stretches)


def pair_numbers(position: npt.NDArray[np.int64], number: int) -> npt.NDArray[np.int64]:
    """The numbers of the pairs, if each image brings `number` captions."""
    return (position[:, None] * number + np.arange(number)).ravel()


def read_sample(pairs: Pairs | SampleStream, item: Item) -> Sample:
    """The sample of a row, or one that a stream gave; raises `BadSample`."""
    if isinstance(item, BadSample):
        raise item
    if isinstance(item, Sample):
        return item
    # To look whether a source has all that a protocol asks for takes as long as reading a sample.
    return cast("Pairs", pairs).sample(item)


def read_image(
    pairs: Pairs | SampleStream, item: Item, decode: Callable[[bytes], T]
) -> tuple[Sample, T]:
    """A sample, and what `decode` makes of its image; `BadSample` for a `ValueError` of either."""
    sample = read_sample(pairs, item)
    try:
        return sample, decode(sample.image)
    except ValueError as error:
        raise BadSample(sample.sample_id, sample.where, str(error)) from None


class _Requests(Sampler[_Request]):
    """The requests of the passes to come: they change, the worker processes stay."""

    def __init__(self) -> None:
        self.passes = deque[Pass]()  # begun and not used to their end, the oldest first
        self.made: Iterator[_Made] | None = None  # what workers make of the requests
        self.error: Exception | None = None  # why there are no more of them
        # By `Pass.stream`: the number of a stream's next batch, and its batches from there on. They
        # stay open between passes, so extraction and training read a sample once each.
        self.shares = dict[int, tuple[int, Iterator[list[sampler.Stretch]]]]()
        self.loader: EpisodeLoader | None = None

    def __iter__(self) -> Iterator[_Request]:
        try:
            while self.loader is not None:
                newest = self.passes[-1]
                yield from self.loader.requests(newest)
                if (following := self.loader.after(newest)) is None:
                    return
                self.passes.append(following)
        except Exception as error:
            # A `DataLoader` that fails while it starts its workers leaves them in disorder.
            self.error = error

    def is_oldest(self, one: Pass) -> bool:
        return bool(self.passes) and self.passes[0] is one

    def abandon(self) -> None:
        """Forget what is to come."""
        self.passes.clear()
        # The loader too: it holds these requests, and a cycle would keep its workers alive.
        self.made = self.error = self.loader = None


@dataclass(frozen=True, kw_only=True)
class EpisodeLoader:
    """Turns episodes into batches.

    A bad sample (unreadable image, no caption) is replaced by a good one of the batches that follow
    in the episode, so that it repeats no pair that the draw did not; in a stream by one that
    follows the batch. Worker processes start with the first episode and stay until `close`.
    """

    pairs: Pairs | SampleStream
    tokenizer: Tokenizer
    transform: Transform
    batch_size: int  # images on this rank; the last batch of an episode may be smaller
    seed: int  # with the episode's number, of the draws for transforms and captions
    device: torch.device
    cut_padding: bool = False  # whether tokens may be as short as the batch's longest caption
    captions: CaptionDraw = ONE  # which captions of an image a visit brings
    workers: int = 0  # processes that decode; 0 decodes in this process
    rank: int = 0
    world_size: int = 1
    crop: Crop = decode_crop  # or `MemoryCache.crop`
    features_of: FeaturesOf = field(default_factory=dict)  # what else batches may bring
    # The pass that will probably follow one; workers begin with it before it is asked for.
    after: Callable[[Pass], Pass | None] = lambda current: None
    # Called with each batch's number of samples read and the bad ones among them.
    on_read: OnRead = lambda number, bad: None
    notes: tuple[str, ...] = ()  # such as how many workers there are
    _requests: _Requests = field(default_factory=_Requests, init=False, repr=False)

    def batches(self, wanted: Pass) -> Iterator[Batch]:
        """This rank's batches of a pass, one pass at a time.

        A pure function of the pass, with any number of workers and any cache. All ranks together
        have the same ones, however many they are. Raises `ValueError` if a worker process was
        killed, or a batch found no good samples to fill it.
        """
        requests = self._requests
        if requests.made is None or not requests.passes or requests.passes[0] != wanted:
            requests.abandon()
            requests.passes.append(wanted)
            requests.loader, requests.made = self, iterate_items(self._loader)
        assert requests.made is not None
        current, size = requests.passes[0], self.batch_size * self.world_size
        left = max(0, -(-len(current.episode.rows) // size) - current.start)
        try:
            for made in islice(requests.made, left):
                assert requests.is_oldest(current), "another iteration has begun"
                yield self._batch(made, current)
                left -= 1
            if left and requests.error is not None:
                raise requests.error
        finally:
            if requests.is_oldest(current):
                requests.passes.popleft()
                if left or not requests.passes:
                    requests.abandon()

    def _batch(self, made: _Made, current: Pass) -> Batch:
        self.on_read(len(made.sample_ids) + len(made.bad), made.bad)
        if made.images is None or made.packed is None:
            what = "a batch found only bad samples to fill it, such as"
            raise ValueError(made.error or f"{self.pairs.name}: {what} {made.bad[0]}")
        if isinstance(self.pairs, SampleStream) and self.pairs.lanes % self.world_size:
            sampler.require_equal_lanes(made.lanes)
        images = made.images.to(self.device, non_blocking=made.images.is_pinned())
        fields = made.packed.unpack(self.device)
        draws, changes = fields.pop("draws", None), fields.pop("changes", {})
        transform = current.transform or self.transform
        if draws is not None:
            image = transform.finish(images, draws)
        else:
            image = transform.apply(images, changes)
        sample_id = [name for name in made.sample_ids for _ in range(self.captions.number)]
        return Batch(sample_id=sample_id, image=image, captions=[*made.captions], **fields)

    def state_dict(self, episode: int, batch: int, size: int) -> dict[str, Any]:
        """The position after `batch` batches of an episode of `size` pairs, as JSON values."""
        state: dict[str, Any] = {"episode": episode, "batch": batch}
        if isinstance(self.pairs, SampleStream):
            first = episode * (size // self.pairs.lanes)
            following = first + batch * (self.batch_size * self.world_size // self.pairs.lanes)
            lanes = sampler.list_overlaps(self.rank, self.world_size, self.pairs.lanes)
            # Both are known then: a pass that extracts features begins with the episode.
            state["stream"] = [
                self.pairs.state_dict(sample, lane)
                for lane in lanes
                for sample in sorted({first, following})
            ]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a position that a rank saved, once those of all ranks are loaded. Raises
        `ValueError` if it belongs to another stream."""
        if isinstance(self.pairs, SampleStream):
            for lane in state["stream"]:
                self.pairs.load_state_dict(lane)

    def close(self) -> None:
        """End the worker processes, which would live on; the next episode starts new ones."""
        self._requests.abandon()
        self._requests.shares.clear()  # which ends threads that read ahead
        self.__dict__.pop("_loader", None)

    @cached_property
    def _loader(self) -> DataLoader[_Made]:
        return DataLoader(
            _Reader(
                pairs=self.pairs,
                tokenizer=self.tokenizer,
                cut_padding=self.cut_padding,
                captions=self.captions,
                crop=self.crop,
                features_of=self.features_of,
                on_cpu=self.device.type == "cpu",
            ),
            sampler=self._requests,
            batch_size=None,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # or it would draw from the global one
        )

    def requests(self, current: Pass) -> Iterator[_Request]:
        """The batches to make; all ranks together take the next positions for each."""
        episode, transform = current.episode, current.transform or self.transform
        rows, size = episode.rows.numpy(), len(episode.rows)
        shape = (size, transform.num_draws)
        draws = sampler.transform_draws(self.seed, episode.index, *shape, current.stream)
        captions = sampler.caption_draws(self.seed, episode.index, size)
        stride = self.batch_size * self.world_size
        shares: Iterator[list[sampler.Stretch]] | None = None
        if isinstance(self.pairs, SampleStream):
            assert size % stride == 0, "an episode of a stream has whole batches"
            first = episode.index * (size // stride)
            following, shares = self._requests.shares.pop(current.stream, (-1, None))
            if shares is None or following != first + current.start:
                shares = sampler.share_batches(
                    self.pairs,
                    first + current.start,
                    batch_size=stride,
                    rank=self.rank,
                    world_size=self.world_size,
                )
        wanted = replace(current, episode=replace(episode, rows=NO_ROWS))
        for begin in range(current.start * stride, size, stride):
            end = min(begin + stride, size)
            position = np.array_split(np.arange(begin, end), self.world_size)[self.rank]
            number = len(position)
            candidates, stretches = list[int](), list[sampler.Stretch]()
            if shares is None:
                number = max(-(-sampler.MIN_SPARE // number), sampler.SPARE_BATCHES)
                after = sampler.spare_positions(position, number, batch=stride, size=size)
                candidates = rows[np.concatenate([position, after.ravel()])].tolist()
            else:
                stretches = next(shares)
                self._requests.shares[current.stream] = first + end // stride, shares
            yield _Request(
                wanted=wanted,
                transform=transform,
                position=position,
                rows=candidates,
                stretches=stretches,
                transform_draws=draws[position],
                caption_draws=captions[position],
            )


def divide_batch(batch_size: int) -> int:
    """The pairs of a batch that a rank has; raises `ValueError` if ranks cannot share it evenly."""
    share, rest = divmod(batch_size, world_size())
    if rest or share < 2:
        raise ValueError(
            f"episodes.batch_size: {batch_size} pairs cannot be shared evenly by {world_size()} "
            f"ranks, two or more each; try {max(2, share) * world_size()}, or for a run that goes "
            f"on a number of ranks that divides {batch_size}"
        )
    return share


def iterate_items(loader: DataLoader[T]) -> Iterator[T]:
    """The items of a loader; a worker process that was killed is a `ValueError`.

    Workers outlive the signals that stop a run, whose step needs its batch; this process ends them.
    """
    try:
        loader.worker_init_fn = signals.obey_parent
        with signals.block_signals():
            items = iter(loader)
        yield from items
    except RuntimeError as error:
        if (killed := describe_killed_worker(error)) is None:
            raise
        raise ValueError(killed) from None


def describe_killed_worker(error: RuntimeError) -> str | None:
    """One line, if the error, which PyTorch may raise anywhere, says that a worker was killed."""
    if "DataLoader worker" not in str(error):
        return None
    return (
        "data.workers: a worker process was killed, most often because memory ran out; "
        "lower data.workers, or set episodes.micro_batch_size, and go on with --resume auto "
        f"({str(error).splitlines()[0]})"
    )


def loader(
    config: Config,
    samples: Pairs | SampleStream,
    *,
    transform: Transform,
    kind: Callable[..., EpisodeLoader] = EpisodeLoader,
    **settings: Any,
) -> EpisodeLoader:
    """The loader of this rank, with further `settings` of its `kind`; raises `ValueError` if the
    ranks cannot share a batch evenly."""
    share = divide_batch(config.episodes.batch_size)
    workers, note = choose_workers(config.data, samples, image_size=transform.size)
    # Workers share no memory: what one of them keeps, the others decode again. Bands are not kept.
    keeps = config.data.cache_gb > 0 and not workers and transform.bands is None
    cache = MemoryCache(max_bytes=int(config.data.cache_gb * 1e9))
    return kind(
        pairs=samples,
        transform=transform,
        batch_size=share,
        seed=config.run.seed,
        workers=workers,
        rank=rank(),
        world_size=world_size(),
        crop=cache.crop if keeps else transform.crop,
        notes=() if note is None else (note,),
        **settings,
    )


class SkipLog:
    """Counts bad samples, and writes each once, with its reason, to a file of JSON lines.

    A share of bad samples above `max_share` stops the run. It is taken of `at_least` samples or
    more, so that one bad file among the first few does not stop it.
    """

    def __init__(self, path: Path, *, max_share: float, at_least: int) -> None:
        self.path, self.max_share, self.at_least = path, max_share, at_least
        self.read = self.skipped = 0
        self._reasons: list[str] = []
        # Ids of bad samples, and those of them with which more of a shard is lost.
        self.known, self.broken = set[str](), set[str]()
        self._warned = False
        # Ranks have a file each. There may have been more of them before.
        for file in path.parent.glob("skipped*.jsonl"):
            try:
                entries = read_json_lines(file)
            except ValueError as error:
                raise ValueError(f"{file}: {error}; remove it") from None
            for entry in entries:
                with contextlib.suppress(KeyError):  # not ours
                    self.known.add(str(entry["sample_id"]))
                    if str(entry["reason"]).endswith(LOST):
                        self.broken.add(str(entry["sample_id"]))
        self._before = {*self.known}  # of all ranks

    @property
    def new(self) -> tuple[set[str], set[str]]:
        """The bad samples, and the broken shards, that no rank had met before this process."""
        return self.known - self._before, self.broken - self._before

    @property
    def summary(self) -> str:
        """What was skipped so far, for a line of progress; empty if nothing was."""
        broken = counted(len(self.broken), "shard")
        shards = f" and {broken} not read to the end" if self.broken else ""
        return f", {counted(len(self.known), 'sample')} skipped{shards}" if self.known else ""

    def add(self, read: int, bad: list[BadSample]) -> None:
        """Record a batch: how many samples were read for it, and the bad ones among them; raises
        `ValueError` if more than `max_share` of all so far were bad."""
        self.read += read
        self.skipped += len(bad)
        for sample in bad:
            if sample.sample_id in self.known:
                continue
            self.known.add(sample.sample_id)
            self._reasons = [*self._reasons, str(sample)][:QUOTED]
            if sample.reason.endswith(LOST):
                self.broken.add(sample.sample_id)
                say(f"warning: {sample.where}: {sample.reason}")
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with naming(self.path), open_to_append(self.path) as file:
                    file.write(f"{to_json(vars(sample))}\n".encode())
            except OSError as error:  # a full disk costs a warning, and not the run
                if not self._warned:
                    say(f"warning: {error}; skipped samples are counted, and not listed there")
                self._warned = True
        if self.skipped > self.max_share * max(self.read, self.at_least):
            way = f", or {access.GO_ON}" if bad and access.is_url(bad[-1].where) else ""
            raise ValueError(
                f"{self.skipped} of {self.read} samples read are bad, more than "
                f"data.max_bad_share ({self.max_share:g}) allows; mend the data or raise it{way} "
                f"({'; '.join(self._reasons)}; all in {self.path})"
            )
