"""Vectors of an aligned model from what `align` kept of its halves: its projections alone compute.

`embed.py` asks for them by sample. Those that judge a model are in `evaluation/encoders.py`.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from protoclip.config import Config
from protoclip.data.loader import Item
from protoclip.data.pairs import MAX_IMAGE_PIXELS, BadSample, Pairs
from protoclip.data.transforms import EvaluationTransform
from protoclip.distributed.collectives import (
    rank0_first,
)
from protoclip.encode.encoder import Encoder
from protoclip.encode.halves import features_folder, image_half, text_half
from protoclip.encode.rows import image_key
from protoclip.encode.store import Numbers, Store, hash_ids
from protoclip.encode.whiten import Features
from protoclip.files import checksum
from protoclip.models.precision import Autocast, Precision, autocast, resolve, resolve_encoding
from protoclip.models.projections import FrozenEncoders, Projections
from protoclip.models.protoclip import ProtoCLIP
from protoclip.models.saved import checkpoints, facts_of, read_config, run_of
from protoclip.terminal import say

LOOKED_UP = 1000  # pairs that tell whether a store has those of this data


@dataclass(kw_only=True)
class KeptHalf:
    """What is kept of a half, and how the model projects it."""

    stored: Store
    project: Callable[[Tensor], Tensor]
    device: torch.device
    autocast: Autocast

    def find(self, ids: Iterable[str]) -> Numbers:
        """The number of each image by its key, or of each caption by its text; or -1."""
        return self.stored.find(hash_ids(ids))

    def vectors(self, ids: Iterable[str], width: int) -> tuple[Numbers, Float[Tensor, "n d"]]:
        """The positions of what is kept; and the vectors of all, 0 for the others.

        Vectors are in the joint space, of unit norm, on the CPU. From the first damaged row on
        nothing counts as kept, and a warning says so.
        """
        hashes = hash_ids(ids)
        numbers = self.stored.find(hashes)
        known = np.flatnonzero(numbers >= 0)
        vectors = torch.zeros(len(hashes), width)
        try:
            rows = self.stored.read(numbers[known])
        except ValueError as error:
            warn_of_damage(error)
            self.stored = Store(None)
            return known[:0], vectors
        vectors[known] = self._projected(rows)
        return known, vectors

    @torch.inference_mode()
    def _projected(self, rows: Features) -> Float[Tensor, "k d"]:
        features = torch.from_numpy(rows).float().to(self.device)
        with self.autocast():
            return F.normalize(self.project(features).float(), dim=-1).cpu()


@dataclass(frozen=True, kw_only=True)
class KeptHalves:
    """What is kept of both halves of a model; of most models nothing.

    Attributes:
        precision: In which the others are to be encoded.
        note: What whoever is about to encode should know of it.
    """

    precision: Precision
    image: KeptHalf | None = None
    text: KeptHalf | None = None
    note: str = ""

    def images_of(
        self, samples: Any, items: Sequence[Item], width: int
    ) -> tuple[dict[int, tuple[str, tuple[str, ...]]], Float[Tensor, "n d"]]:
        """What need not be read of samples, since their image is kept.

        Returns:
            By the position of such a sample its id and captions; and the vectors of all images,
            which are 0 for the others.
        """
        named, vectors = dict[int, tuple[str, tuple[str, ...]]](), torch.zeros(len(items), width)
        if self.image is not None:
            rows = [item for item in items if isinstance(item, int)]
            assert len(rows) == len(items), "images of a stream have no key"
            known, vectors = self.image.vectors((image_key(samples, row) for row in rows), width)
            for position in known.tolist():
                row = rows[position]
                with suppress(BadSample):  # it is read as others are, which tells what is wrong
                    named[position] = samples.sample_id(row), samples.sample_captions(row)
        return named, vectors

    def texts_of(self, texts: Sequence[str], width: int) -> tuple[Numbers, Float[Tensor, "n d"]]:
        """The positions of texts that are not kept; and the vectors of all, 0 for these."""
        if self.text is None:
            return np.arange(len(texts)), torch.zeros(len(texts), width)
        known, vectors = self.text.vectors(texts, width)
        return np.setdiff1d(np.arange(len(texts)), known), vectors


def kept_halves(
    reference: str,
    model: Any,
    transform: Any,
    tokenizer: Any,
    samples: Any,
    device: torch.device,
    asked: Literal["auto"] | Precision,
    *,
    max_pixels: int,
) -> KeptHalves:
    """What `align` kept of the halves of a run's model, in the precision that is asked for.

    With `auto` it is that in which the images are kept, since encoding them is nearly all the work.
    With another one a note says in which they are. Of images nothing counts as kept if the run took
    larger ones than `max_pixels`. Warns if the store is damaged, which is not read then.
    Collective.
    """
    usual = resolve_encoding(asked, device)
    run = run_of(reference)
    joins = isinstance(model, ProtoCLIP) and model.joins_encoders
    reads_as_align = isinstance(transform, EvaluationTransform) and isinstance(samples, Pairs)
    if run is None or not joins or not reads_as_align:
        return KeptHalves(precision=usual)
    try:
        config = read_config(run)
    except ValueError:  # another version wrote it, and the model can be read all the same
        return KeptHalves(precision=usual)
    halves, heads = FrozenEncoders(model.towers).eval(), Projections(model.towers)

    def kept(
        precision: Precision,
        project: Callable[[Tensor], Tensor],
        make: Callable[..., Encoder],
    ) -> KeptHalf | None:
        context = autocast(precision, device)
        half = make(autocast=context)
        folder = features_folder(config) / checksum(rank0_first(half.key).encode())
        stored = Store(folder)
        if not len(stored):
            return None
        return KeptHalf(stored=stored, project=project, device=device, autocast=context)

    # Of an image whose features are kept nobody knows the size.
    fit = max_pixels >= config.data.max_image_pixels
    make = partial(image_half, halves, transform, max_pixels=MAX_IMAGE_PIXELS)
    images_in = partial(kept, project=heads.encode_image, make=make)

    def has_these(half: KeptHalf | None) -> bool:
        rows = range(min(len(samples), LOOKED_UP))
        return half is not None and rank0_first(
            lambda: bool((half.find(image_key(samples, row) for row in rows) >= 0).any())
        )

    precision, image, note = usual, images_in(usual) if fit else None, ""
    trained_in = precision_of(run, config, device)
    if fit and trained_in != usual and not has_these(image):
        other = images_in(trained_in)
        if has_these(other):
            note = f"align encoded these images in {trained_in}, "
            if asked == "auto":
                precision, image = trained_in, other
                note += f"and others are, too; --precision {usual} encodes all anew"
            else:
                note += f"so they are encoded anew in {usual}; --precision {trained_in} takes "
                note += "what is there"
    text = kept(precision, heads.encode_text, partial(text_half, halves, tokenizer))
    return KeptHalves(image=image, text=text, precision=precision, note=note)


def precision_of(run: Path, config: Config, device: torch.device) -> Precision:
    """The precision in which a run was trained; `auto` may have been another one on its machine."""
    for checkpoint in reversed(checkpoints(run)):
        with suppress(ValueError, OSError):  # a damaged one
            noted = facts_of(checkpoint, "arithmetic").get("run.precision")
            if noted in get_args(Precision):
                return cast(Precision, noted)
    return resolve(config.run.precision, device)


def warn_of_damage(error: ValueError) -> None:
    """Say what is damaged, and that it is done without until it is deleted."""
    what = str(error).partition(", and give")[0]
    say(f"warning: {what}; until then embed encodes anew what it holds")
