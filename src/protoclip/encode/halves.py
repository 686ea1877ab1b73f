"""What two frozen halves make of the pairs of a run: each image and each caption encoded once.

Features are in a store for each half, by its weights and its transform. An image is known by its
file, or by its row in data that hold it; a caption by its text. So runs over the same or over more
data encode what is new.
"""

import errno
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from protoclip.config import Config
from protoclip.data.captions import trim_padding
from protoclip.data.decode import decode_crop
from protoclip.data.index import cache_folder
from protoclip.data.pairs import BadSample, Pairs, Sample
from protoclip.data.transforms import EvaluationTransform
from protoclip.data.view import AllBut
from protoclip.distributed.collectives import (
    all_gather_object,
    raise_on_all_ranks,
    rank,
    rank0_first,
    require_shared,
    world_size,
)
from protoclip.encode.encoder import EXAMPLES, Encoder, as_text
from protoclip.encode.rows import (
    HalfRows,
    image_key,
    located,
    open_listing,
    write_listing,
)
from protoclip.encode.run import (
    Prepared,
    Round,
    encode_into,
    read_ahead,
    units_of_rank,
)
from protoclip.encode.store import Hashes, Numbers, Store, hash_ids
from protoclip.files import checksum, locked
from protoclip.models.precision import Autocast
from protoclip.models.projections import FrozenEncoders
from protoclip.models.tokenizers import TELLING, Tokenizer
from protoclip.progress import Progress

SETTING = "align.features"  # says where the stores are
TEXTS_AT_ONCE = 2**13  # captions among which those of similar length are encoded together
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
WAIT = 60.0  # seconds for another process that writes to the store
# What a text model's configuration says of its files, and nothing of what it computes.
FILE_SETTINGS = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"}


def features_folder(config: Config) -> Path:
    """The store of a run's halves."""
    given = config.align.features
    return cache_folder() / "features" if given is None else Path(given)


def text_half(halves: FrozenEncoders, tokenizer: Tokenizer, *, autocast: Autocast) -> Encoder:
    """The encoder of a frozen text half. Features have any norm: its projection reads them so.

    Args:
        halves: Both, on their device.
        autocast: Makes the context of forward passes.
    """
    settings = halves.text.config.to_dict() if hasattr(halves.text, "config") else {}
    settings = {name: settings[name] for name in sorted(settings.keys() - FILE_SETTINGS)}

    def forward(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts)
        tokens = trim_padding(tokens) if halves.ignores_padding else tokens
        return halves.encode_text(tokens.to(device_of(halves)))

    return Encoder(
        module=halves.text,
        device=device_of(halves),
        reads="text",
        prepare=lambda sample: sample.captions[0],
        forward=forward,
        examples=EXAMPLES[:1],
        facts=lambda: (
            f"{type(halves.pooler).__name__} {settings} {as_text(tokenizer([*EXAMPLES, TELLING]))}"
        ),
        unit_norm=False,
        autocast=autocast,
    )


def image_half(
    halves: FrozenEncoders, transform: EvaluationTransform, *, max_pixels: int, autocast: Autocast
) -> Encoder:
    """The encoder of a frozen image half. Features have any norm: its projection reads them so."""
    size, no_draws = transform.size, np.zeros(0, np.float32)

    def prepare(sample: Sample) -> Tensor:
        """The crop of an image as bytes."""
        box = partial(transform.box, draws=no_draws)
        crop = decode_crop(sample.image, box, size, max_pixels=max_pixels)
        return torch.from_numpy(np.require(crop, requirements="W"))

    def forward(crops: list[Tensor]) -> Tensor:
        pixels = torch.stack(crops).to(device_of(halves))
        return halves.encode_image(transform.finish(pixels, torch.zeros(len(crops), 0)))

    ramp = torch.arange(size * size * 3, dtype=torch.int64).remainder(256).to(torch.uint8)
    name = getattr(halves.visual, "pretrained_cfg", {}).get("architecture")
    return Encoder(
        module=halves.visual,
        device=device_of(halves),
        reads="image",
        prepare=prepare,
        forward=forward,
        examples=[ramp.view(size, size, 3)],
        facts=lambda: f"{name} {transform}",
        unit_norm=False,
        autocast=autocast,
    )


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


@dataclass(frozen=True)
class ImageHalf:
    """The frozen image half, and its folder among the stores."""

    encoder: Encoder
    folder: Path
    max_pixels: int


def open_image_half(
    halves: FrozenEncoders,
    transform: EvaluationTransform,
    root: Path,
    *,
    max_pixels: int,
    autocast: Autocast,
) -> ImageHalf:
    """The image half, named by its key. Collective."""
    encoder = image_half(halves, transform, max_pixels=max_pixels, autocast=autocast)
    key = rank0_first(encoder.key)  # unlike hosts may compute other last digits
    return ImageHalf(encoder, root / checksum(key.encode()), max_pixels)


def images_at_once(model: nn.Module) -> int:
    """How many images a frozen model encodes at once: with more, a CPU's work leaves its caches."""
    return 16 if device_of(model).type == "cpu" else 256


def encode_halves(
    halves: FrozenEncoders,
    pairs: Pairs,
    *,
    tokenizer: Tokenizer,
    transform: EvaluationTransform,
    root: Path,
    max_pixels: int,
    autocast: Autocast,
    threads: int | None = None,
) -> HalfRows:
    """Encode what is not in the stores yet, and open them. All ranks call it.

    Args:
        halves: On their device, in evaluation mode.
        root: Folder of the stores.

    Raises:
        ValueError: The folder cannot be used, or is damaged; or no image can be read.
    """
    at_once = images_at_once(halves)
    # The first rank decides for all: files may have other times on other hosts.
    path = rank0_first(lambda: write_listing(pairs, root))
    require_shared(path.with_suffix(".json"), by=SETTING)
    listing = raise_on_all_ranks(lambda: open_listing(path))
    half = open_image_half(halves, transform, root, max_pixels=max_pixels, autocast=autocast)
    items = Items(
        hashes=listing.images,
        order=listing.rows,
        sample=partial(read_listed_image, pairs, listing.rows),
        name=pairs.name,
        image_id=lambda number: image_key(pairs, int(listing.rows[number])),
    )
    images = encode_missing(half.encoder, items, half.folder, at_once, threads)
    image_numbers = images.find(listing.images).astype(np.int32)
    images.forget_order()
    bad = (np.diff(listing.first) == 0) | (image_numbers < 0)

    def text(number: int) -> str:
        captions: tuple[str, ...] = pairs.sample_captions(int(listing.text_rows[number]))
        return captions[int(listing.text_places[number])]

    def caption(number: int) -> Sample:
        only = text(number)
        return Sample(sample_id=only, image=b"", captions=(only,), where=pairs.name)

    encoder = text_half(halves, tokenizer, autocast=autocast)
    items = Items(hashes=listing.texts, order=listing.text_rows, sample=caption, name=pairs.name)
    folder = root / checksum(rank0_first(encoder.key).encode())
    texts = encode_missing(encoder, items, folder, 4 * at_once, threads)
    text_numbers = texts.find(listing.texts).astype(np.int32)
    texts.forget_order()
    return HalfRows(
        listing=listing,
        image=images,
        image_numbers=image_numbers,
        text=texts,
        text_numbers=text_numbers,
        texts=text,
        good=AllBut(len(bad), np.flatnonzero(bad)),
    )


@dataclass(frozen=True, kw_only=True)
class Items:
    """What a half shall encode.

    Attributes:
        hashes: Of the items' ids, as rank 0 sees them.
        order: The row of each item in the data, which are read in this order.
        sample: Reads an item by its number.
        name: Of the data.
        image_id: The id of an image by its number; None for texts.
    """

    hashes: Hashes
    order: Numbers
    sample: Callable[[int], Sample]
    name: str
    image_id: Callable[[int], str] | None = None


def read_listed_image(pairs: Pairs, rows: Numbers, number: int) -> Sample:
    """A listed image, with its key as id."""
    row = int(rows[number])
    sample_id = image_key(pairs, row)
    source, at = located(pairs, row)
    try:
        encoded = source.encoded(at)
    except BadSample as error:
        raise BadSample(sample_id, error.where, error.reason) from None
    return Sample(sample_id=sample_id, image=encoded, captions=(), where=source.where(at))


def encode_missing(
    encoder: Encoder, items: Items, folder: Path, batch_size: int, threads: int | None
) -> Store:
    """The store of a half, to which all items are added that it lacks and that can be read.

    Ranks share the work; one process at a time adds to the store of a half.
    """
    store = Store(folder, setting=SETTING)
    if store.has(items.hashes).all():  # reading disturbs nobody
        return store

    def prepare(number: int) -> Prepared:
        sample = items.sample(number)
        try:
            return int(items.hashes[number]), encoder.prepare(sample)
        except ValueError as error:
            raise BadSample(sample.sample_id, sample.where, str(error)) from error

    with ExitStack() as stack:
        # Images that cannot be read are tried by each run, which takes it a moment.
        lock = locked(folder, way_out="name another folder by align.features", wait=WAIT)

        def enter() -> OSError | ValueError | None:
            try:
                stack.enter_context(lock)
            except ValueError as error:  # another process is at it
                return error
            except OSError as error:
                if error.errno in READ_ONLY:
                    return error
                raise
            return None

        refused = rank0_first(enter)
        store.open()
        missing = np.flatnonzero(~store.has(items.hashes))
        missing = missing[np.argsort(items.order[missing], kind="stable")]
        if refused is not None:
            raise_on_all_ranks(lambda: require_unreadable(encoder, missing, prepare, refused))
            return store
        of_all = all_gather_object(encoder.checksum(without="pos"))  # which machines interpolate
        raise_on_all_ranks(lambda: require_same_weights(of_all, encoder.reads))
        raise_on_all_ranks(lambda: require_same_names(items, missing))
        is_text = encoder.reads == "text"
        progress = Progress(f"embed the {encoder.reads} half", len(missing))
        size = TEXTS_AT_ONCE if is_text else batch_size
        done = 0

        def count(made: Round) -> None:
            nonlocal done
            done += len(made.items) * world_size()
            if rank() == 0:
                progress.update(min(done, len(missing) - 1))

        encode_into(
            store,
            encoder,
            units_of_rank(missing.tolist(), size),
            prepare,
            batch_size=batch_size if is_text else None,
            threads=0 if is_text else threads,
            after=count,
        )
        if rank() == 0:
            progress.update(len(missing))
    return store


def require_same_weights(of_all: Sequence[str], reads: str) -> None:
    """Refuse a host whose half has other weights than that of rank 0."""
    if of_all[rank()] != of_all[0]:
        setting = "model.text.name" if reads == "text" else "model.image.weights"
        raise ValueError(
            f"{setting}: {socket.gethostname()} has other weights than rank 0; let all hosts read "
            "the same files"
        )


def require_same_names(items: Items, missing: Numbers) -> None:
    """Refuse a host on which image files have other sizes or times than for rank 0, whose hashes
    these are: what it encodes would be stored by other names, and not be found."""
    if items.image_id is None or not rank():
        return
    if (hash_ids(map(items.image_id, missing.tolist())) != items.hashes[missing]).any():
        raise ValueError(
            f"{items.name}: image files have other places, sizes or times on "
            f"{socket.gethostname()} than for rank 0; let all hosts read the same files, or copy "
            "them with their times"
        )


def require_unreadable(
    encoder: Encoder,
    missing: Numbers,
    prepare: Callable[[int], Prepared],
    refused: OSError | ValueError,
) -> None:
    """Raise that a store cannot be written, unless what it lacks are images that cannot be read."""
    if encoder.reads == "text" and len(missing):
        raise refused
    with closing(read_ahead([missing.tolist()], prepare, None)) as read:
        if not all(isinstance(one, BadSample) for unit in read for _, one in unit):
            raise refused
