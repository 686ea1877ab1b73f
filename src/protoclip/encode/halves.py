"""What two frozen halves make of the pairs of a run: each image and each caption encoded once.

Features are in a folder for each half, by its weights and its transform, and there in segments: a
segment has the images or captions that were new when a run began. An image is known by its file,
or by its row in data that hold it; a caption by its text. So runs over the same or over more data
encode what is new.

What the rows of a run then know of these features is in `half_rows.py`.
"""

import errno
import os
import re
import shutil
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from protoclip.config import Config
from protoclip.data.captions import without_padding
from protoclip.data.decode import decode_crop
from protoclip.data.index import cache_folder
from protoclip.data.pairs import BadSample, Pairs, Sample
from protoclip.data.transforms import Transform
from protoclip.data.view import AllBut
from protoclip.distributed.collectives import (
    all_gather_object,
    raise_on_all_ranks,
    rank,
    rank0_first,
    require_shared,
)
from protoclip.encode import store
from protoclip.encode.encoder import PART_ROWS, FrozenEncoder, encode_parts, join_parts
from protoclip.encode.parts import FOLDERS, parts_of, read_images, read_note
from protoclip.encode.rows import (
    HalfRows,
    image_key,
    located,
    open_listing,
    view_id,
    write_listing,
)
from protoclip.encode.store import Hashes, Numbers, Segments, hash_ids
from protoclip.files import checksum, locked
from protoclip.models.aligned import FrozenHalves
from protoclip.models.batch_norm import layers_of
from protoclip.models.tokenizers import TELLING, Tokenizer

Read = TypeVar("Read")
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
WAIT = 60.0  # seconds for another process that writes to the store
# What a text model's configuration says of its files, and nothing of what it computes.
FILE_SETTINGS = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"}


def features_folder(config: Config) -> Path:
    """The store of a run's halves."""
    given = config.align.features
    return cache_folder() / "features" if given is None else Path(given)


class HalfEncoder(FrozenEncoder):
    """A frozen half: its features are of any norm, since the projection reads them as they are.

    Args:
        halves: Both, on their device.
        reads: The half: an image, or a text by the tokenizer.
        transform: Of images. One that draws gets draws of its own for each image.
        autocast: Makes the context of forward passes.
    """

    unit_norm = False

    def __init__(
        self,
        halves: FrozenHalves,
        *,
        tokenizer: Tokenizer | None = None,
        transform: Transform | None = None,
        max_pixels: int,
        autocast: Any,
    ) -> None:
        self.module: Any = halves.visual if transform else halves.text
        self.halves, self.images, self.tokenizer = halves, transform, tokenizer
        self.max_pixels, self.autocast = max_pixels, autocast
        self.reads = "text" if transform is None else "image"
        self.device = next(halves.parameters()).device
        size = 0 if transform is None else transform.size
        blank = (torch.zeros(size, size, 3, dtype=torch.uint8), self._draws("")) if size else "a"
        self.width = self.encode([blank]).shape[1]

    @torch.inference_mode()
    def encode(self, inputs: list[Any]) -> Float[Tensor, "b q"]:
        with self.autocast():
            if self.images is None:
                assert self.tokenizer is not None
                tokens = self.tokenizer(inputs)
                tokens = without_padding(tokens) if self.halves.ignores_padding else tokens
                features = self.halves.encode_text(tokens.to(self.device))
            else:
                pixels, draws = (torch.stack(list(each)) for each in zip(*inputs, strict=True))
                images = self.images.finish(pixels.to(self.device), draws)
                features = self.halves.encode_image(images)
        return features.float().cpu()

    def read_image(self, sample: Sample) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The crop of an image as bytes, and the draws of its transform."""
        assert self.images is not None
        draws, transform = self._draws(sample.sample_id), self.images
        crop = decode_crop(
            sample.image,
            lambda width, height: transform.box(width, height, draws.numpy()),
            transform.size,
            max_pixels=self.max_pixels,
        )
        return torch.from_numpy(np.require(crop, requirements="W")), draws

    def _draws(self, key: str) -> Float[Tensor, " r"]:
        """Of an image, the same on every call."""
        assert self.images is not None
        generator = np.random.Generator(np.random.Philox(key=int(hash_ids([key])[0])))
        return torch.from_numpy(generator.random(self.images.num_draws, dtype=np.float32))

    def key(self) -> str:
        """Identifies what the features depend on: weights, layers, transform or tokenizer, pooling.

        Weights alone do not: activations and numbers of heads have none. So settings count too, and
        the features of an example, to three digits, since the last ones depend on the hardware.
        """
        example: Any = "a photo of a red dog"
        if self.images is not None:
            size = self.images.size
            ramp = torch.arange(size * size * 3, dtype=torch.int64).remainder(256).to(torch.uint8)
            name = getattr(self.module, "pretrained_cfg", {}).get("architecture")
            facts, example = f"{name} {self.images}", (ramp.view(size, size, 3), self._draws("key"))
        else:
            assert self.tokenizer is not None
            settings = self.module.config.to_dict() if hasattr(self.module, "config") else {}
            settings = {name: settings[name] for name in sorted(settings.keys() - FILE_SETTINGS)}
            facts = f"{type(self.halves.pooler).__name__} {settings}"
            facts += f" {self.tokenizer([example, 'two words', TELLING]).tolist()}"
        facts += "" if self.autocast is nullcontext else repr(self.autocast)
        layers = re.sub(r" at 0x[0-9a-f]+", "", layers_of(self.module))
        first = " ".join(f"{value:.3g}" for value in self.encode([example])[0, :16].tolist())
        return checksum(f"{self.checksum()} {layers} {facts} {first}".encode())


@dataclass(frozen=True)
class ImageHalf:
    """The frozen image half for a view of images, and its folder in the store."""

    encoder: HalfEncoder
    folder: Path


def image_halves(
    halves: FrozenHalves,
    views: Sequence[Transform],
    root: Path,
    *,
    max_pixels: int,
    autocast: Any,
) -> list[ImageHalf]:
    """The image half for each view: the transform of the plain image, then of augmented ones."""
    made = []
    for view, transform in enumerate(views):
        encoder = HalfEncoder(halves, transform=transform, max_pixels=max_pixels, autocast=autocast)
        named = f"view {view} " if view else ""  # views of one transform differ by their draws
        key = rank0_first(encoder.key)  # unlike hosts may compute other last digits
        made.append(ImageHalf(encoder, root / checksum(f"{named}{key}".encode())))
    return made


def images_at_once(model: nn.Module) -> int:
    """How many images a frozen model encodes at once: with more, a CPU's work leaves its caches."""
    return 16 if next(model.parameters()).device.type == "cpu" else 256


class ImagesOnce(Pairs):
    """Images of pairs as pairs of their own, each with its key as id; see `pairs.Pairs`.

    Args:
        view: Which of an image's views they are; the ids of all but the first one name it.
    """

    def __init__(self, pairs: Pairs, rows: Numbers, view: int = 0) -> None:
        self.name, self.pairs, self.rows, self.view = pairs.name, pairs, rows, view

    def chosen(self, numbers: Numbers) -> "ImagesOnce":
        """Those of these numbers."""
        return ImagesOnce(self.pairs, self.rows[numbers], self.view)

    def __len__(self) -> int:
        return len(self.rows)

    def sample_id(self, row: int) -> str:
        return view_id(image_key(self.pairs, int(self.rows[row])), self.view)

    def sample_captions(self, row: int) -> tuple[str, ...]:
        return ()

    def sample(self, row: int) -> Sample:
        number, key = int(self.rows[row]), self.sample_id(row)
        source, at = located(self.pairs, number)
        try:
            encoded = source.encoded(at)
        except BadSample as error:
            raise BadSample(key, error.where, error.reason) from None
        return Sample(sample_id=key, image=encoded, captions=(), where=source.where(at))


class CaptionsOnce(ImagesOnce):
    """Captions of pairs as pairs of their own, each with its text as id.

    Args:
        at: Which caption of its row each is.
    """

    def __init__(self, pairs: Pairs, rows: Numbers, at: Numbers) -> None:
        super().__init__(pairs, rows)
        self.at = at

    def chosen(self, numbers: Numbers) -> "CaptionsOnce":
        return CaptionsOnce(self.pairs, self.rows[numbers], self.at[numbers])

    def sample_id(self, row: int) -> str:
        captions: tuple[str, ...] = self.pairs.sample_captions(int(self.rows[row]))
        text: str = captions[self.at[row]]
        return text

    def sample_captions(self, row: int) -> tuple[str, ...]:
        return (self.sample_id(row),)


def encode_halves(
    halves: FrozenHalves,
    pairs: Pairs,
    *,
    tokenizer: Tokenizer,
    views: Sequence[Transform],
    root: Path,
    max_pixels: int,
    autocast: Any,
    threads: int | None = None,
) -> HalfRows:
    """Encode what is not in the store yet, and open it. All ranks call it.

    Args:
        halves: On their device, in evaluation mode.
        views: The transform of the plain image, then of each augmented one.
        root: Folder of the store.

    Raises:
        ValueError: The folder cannot be used, or is damaged; or no image can be read.
    """
    at_once = images_at_once(halves)
    # The first rank decides for all: files may have other times on other hosts.
    path = rank0_first(lambda: write_listing(pairs, root, len(views)))
    require_shared(path.with_suffix(".json"), by=FOLDERS)
    listing = raise_on_all_ranks(lambda: open_listing(path))
    bad, stores = np.diff(listing.first) == 0, []
    settings: dict[str, Any] = {"max_pixels": max_pixels, "autocast": autocast}
    for view, half in enumerate(image_halves(halves, views, root, **settings)):
        images, hashes = ImagesOnce(pairs, listing.rows, view), listing.images[:, view]
        stores.append(completed(half.encoder, images, hashes, half.folder, at_once, threads))
        bad |= stores[-1].find(hashes) < 0
    encoder = HalfEncoder(halves, tokenizer=tokenizer, **settings)
    captions = CaptionsOnce(pairs, listing.text_rows, listing.text_places)
    folder = root / checksum(rank0_first(encoder.key).encode())
    text = completed(encoder, captions, listing.texts, folder, 4 * at_once, threads)
    good = AllBut(len(bad), np.flatnonzero(bad))
    texts = captions.sample_id
    return HalfRows(listing=listing, image=stores, text=text, texts=texts, good=good)


def require_same_weights(of_all: Sequence[str], reads: str) -> None:
    """Refuse a host whose half has other weights than that of rank 0."""
    if of_all[rank()] != of_all[0]:
        setting = "model.text.name" if reads == "text" else "model.image.weights"
        raise ValueError(
            f"{setting}: {socket.gethostname()} has other weights than rank 0; let all hosts read "
            "the same files"
        )


def require_same_names(items: ImagesOnce, hashes: Hashes) -> None:
    """Refuse a host on which image files have other sizes or times than for rank 0, whose hashes
    these are: what it encodes would be stored by other names, and not be found."""
    if rank() and (hash_ids(items.sample_ids()) != hashes).any():
        raise ValueError(
            f"{items.name}: image files have other places, sizes or times on "
            f"{socket.gethostname()} than for rank 0; let all hosts read the same files, or copy "
            "them with their times"
        )


def require_unreadable(
    encoder: HalfEncoder,
    items: ImagesOnce,
    batch_size: int,
    threads: int | None,
    refused: OSError | ValueError,
) -> None:
    """Raise that a store cannot be written, unless what it lacks are images that cannot be read."""
    if encoder.reads == "text":
        raise refused
    rows = range(len(items))
    with closing(read_images(items, rows, encoder.read_image, batch_size, threads)) as read:
        if not all(isinstance(one, BadSample) for batch in read for one in batch):
            raise refused


def completed(
    encoder: HalfEncoder,
    items: ImagesOnce,
    hashes: Hashes,
    folder: Path,
    batch_size: int,
    threads: int | None,
) -> Segments:
    """A half's features of all items that can be read; those that are missing are encoded now.

    `hashes` are those of the items' ids. Ranks share the work; one process at a time adds to a
    half's folder.
    """
    stored = opened(folder, encoder.width)
    if (stored.find(hashes) >= 0).all():  # reading disturbs nobody
        return stored
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

        if (refused := rank0_first(enter)) is not None:
            missing = np.flatnonzero(stored.find(hashes) < 0)
            given = (encoder, items.chosen(missing), batch_size, threads)
            raise_on_all_ranks(lambda: require_unreadable(*given, refused))
            return stored
        stored = opened(folder, encoder.width)
        missing = np.flatnonzero(stored.find(hashes) < 0)
        if not len(missing):
            return stored
        missing = missing[np.argsort(items.rows[missing], kind="stable")]
        new = items.chosen(missing)
        of_all = all_gather_object(encoder.checksum(without="pos"))  # which machines interpolate
        raise_on_all_ranks(lambda: require_same_weights(of_all, encoder.reads))
        if encoder.reads == "image":
            raise_on_all_ranks(lambda: require_same_names(new, hashes[missing]))
        settings = segment_facts(encoder, hashes[missing])
        out = folder / settings["ids"]
        if not encode_parts(encoder, new, out, settings, batch_size, threads):
            rank0_first(lambda: joined(out, settings))
        return opened(folder, encoder.width)


def segment_facts(encoder: HalfEncoder, hashes: Hashes) -> dict[str, Any]:
    """What a segment is made of; `hashes` are those of its ids, in order, as parts are numbered."""
    return {
        "teacher": f"the {encoder.reads} half",
        "source": f"{encoder.reads}s",  # whatever table has them
        "samples": len(hashes),
        "ids": checksum(hashes.tobytes()),
        "reduced_to": None,
        "weights": encoder.checksum(),
        "modality": encoder.reads,
        "part_rows": PART_ROWS[encoder.reads],
    }


def joined(out: Path, settings: dict[str, Any]) -> None:
    """Make the parts a segment, unless all items are bad; the next run tries those again."""
    if any(read_note(file)["ids"] for file in parts_of(out)):
        join_parts(out, settings)
    else:
        gone = out.with_name(f".{out.name}.{os.getpid()}")  # another process may look meanwhile
        out.rename(gone)
        shutil.rmtree(gone)


def opened(folder: Path, width: int) -> Segments:
    """The finished segments of a half's folder, which are the same for all ranks. Collective.

    Raises:
        ValueError: One is damaged.
    """

    def finished() -> list[Path]:
        paths = sorted(path for path in folder.glob("[!.]*") if path.is_dir())
        return [path for path in paths if "rows" in read(path, facts_of)]

    paths = rank0_first(finished)
    for path in paths:
        require_shared(path / store.FACTS, by=FOLDERS)
    segments = raise_on_all_ranks(lambda: [read(path, store.open_folder) for path in paths])
    for segment in segments:
        segment.way_out = "delete the folder, and give the command again"
    return Segments(segments, width)


def facts_of(path: Path) -> dict[str, Any]:
    """The facts of a segment, which are the first of it that is written."""
    facts = store.read_facts(path)
    if not facts and any(path.glob("[!.]*")):
        raise ValueError(f"{path}: damaged (it has no {store.FACTS})")
    return facts


def read(path: Path, by: Callable[[Path], Read]) -> Read:
    """What is read of a segment; a message tells what to do about a damaged one."""
    try:
        return by(path)
    except ValueError as error:
        reason = str(error).partition("; delete")[0]
        raise ValueError(f"{reason}; delete {path}, and give the command again") from None
