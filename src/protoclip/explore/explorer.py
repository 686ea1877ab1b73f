"""A model over pairs: opens both, and finds what is near to a text, an image or a pair."""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from threading import RLock
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from protoclip.config import Config
from protoclip.data.access import cache_folder, start_thread
from protoclip.data.bands import find_size
from protoclip.data.pairs import BadSample, Rows, evenly_spaced
from protoclip.encode.encoder import prepare_image
from protoclip.encode.features import Encoder, load_encoder
from protoclip.explore.atlas import (
    FITTED_ROWS,
    FORM,
    MODALITIES,
    USUAL_SCALE,
    Atlas,
    Features,
    Heads,
    Layout,
    count_words,
    make_atlas,
    normalize,
    read_atlas,
    write_atlas,
)
from protoclip.explore.pairs import ExploredPairs
from protoclip.files import checksum
from protoclip.models.checkpoint import is_aligned, read_prototypes, read_run_config
from protoclip.models.joined import read_columns
from protoclip.models.protoclip import ProtoCLIP, to_float
from protoclip.models.start import find_start
from protoclip.terminal import say

SEARCH_PIXELS = 50_000_000  # of a query image; decoding takes 20 bytes a pixel
MAX_QUERY = 1000  # characters of a query text
ARTICLE = re.compile(r"^(a|an|the)\s+(?=\S)", re.IGNORECASE)
ROWS = 1 << 16  # in memory at a time
RETRIED = 20  # bad images that are tried again before a stored map is used

# Words of captions that explain answers, and how many an answer names at most. A word is near to
# something if its cosine is this many standard deviations above the mean of all words.
READ_CAPTIONS, MOST_WORDS, NAMED_WORDS, NEARER = 10_000, 1000, 3, 1.0
# Texts about what few images show. Perhaps nothing fits a text that is no nearer to its nearest
# image, and to its nearest word of captions, than most of these are; docs/LOG.md has how often.
UNRELATED = (
    *("quarterly tax report", "contract law", "software update", "interest rate"),
    *("insurance policy", "password reset", "chemical formula", "voltage regulator"),
    *("supreme court ruling", "grammar exercise", "database index", "monetary inflation"),
    *("annual shareholder meeting", "philosophy of language", "prime number theorem"),
    *("invoice number", "privacy agreement", "employee handbook", "DNA sequencing"),
)
UNRELATED_SHARE = 0.9

# A pair's position in the atlas, and its cosine to the query.
Near = list[tuple[int, float]]


class Neighbours:
    """Finds the pairs whose features, of any norm, are nearest to a query; `positions` are the pair
    of each row `(n,)`."""

    def __init__(self, features: Float[Tensor, "n d"], positions: Rows) -> None:
        self.features, self.positions = features, positions
        norms = [rows.float().norm(dim=1) for rows in torch.split(features, ROWS)]
        self.norms = torch.cat(norms).clamp(min=1e-12)

    def search(self, query: Float[Tensor, " d"], number: int) -> Near:
        """The nearest pairs, the nearest first; fewer if there are fewer."""
        query = F.normalize(query.float(), dim=0)
        cosines = torch.cat([rows.float() @ query for rows in torch.split(self.features, ROWS)])
        best = (cosines / self.norms).topk(min(number, len(cosines)))
        positions = self.positions[best.indices.numpy()]  # an array, also of one
        return list(zip(positions.tolist(), best.values.tolist(), strict=True))


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The images and the captions nearest to a query."""

    images: Near  # of each image the first pair that shows it
    texts: Near
    words: Sequence[str] = ()  # the words of captions that are nearest to the query
    fits: bool = True  # whether a text finds more than words about other things do
    # For each image and each text by modality, the words near both to it and the query.
    shared: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Explorer:
    """One model over pairs."""

    name: str  # the model's reference
    pairs: ExploredPairs
    encoder: Encoder
    atlas: Atlas
    # Features of the pairs in the atlas; unset, they are opened when a query needs them.
    encoded: Features | None = None
    heads: Heads | None = None  # as `make_atlas` takes them
    teachers: str = ""  # teachers of the run that trained the model, and what it learned from each
    positives: str = ""  # how that run treated equal pairs: its `loss.positives`
    _lock: Any = field(default_factory=RLock, repr=False)  # for the model and what is made once

    @cached_property
    def features(self) -> Features:
        if self.encoded is not None:
            return self.encoded
        # The atlas has their rows, which spares reading all captions.
        features = encode_pairs(self.encoder, self.pairs, self.atlas.captioned)
        rows = torch.from_numpy(self.atlas.rows)
        numbers = torch.searchsorted(features.rows, rows).clamp(max=len(features.rows) - 1)
        if not torch.equal(features.rows[numbers], rows):
            raise ValueError(
                "images of the map cannot be read any more; mend them, or make it anew with "
                "--no-cache"
            )
        return replace(
            features, rows=rows, image=features.image[numbers], text=features.text[numbers]
        )

    @cached_property
    def spaces(self) -> dict[str, Neighbours]:
        """The features of each different image, and of each text, ready to be searched."""
        images, texts = np.unique(self.atlas.images), np.arange(len(self.atlas))
        features = self.features.image
        return {
            "image": Neighbours(features[images] if len(images) < len(texts) else features, images),
            "text": Neighbours(self.features.text, texts),
        }

    @cached_property
    def words(self) -> tuple[list[str], Float[Tensor, "w d"]]:
        """The words that most captions have, without English stop words, and their features, of
        unit norm."""
        some = evenly_spaced(len(self.atlas), READ_CAPTIONS, 0)
        every, has = count_words([self.pairs.caption(self.row(at)) for at in some])
        order = np.argsort(-np.asarray(has.sum(0)).ravel(), kind="stable")[:MOST_WORDS]
        words = [str(word) for word in every[order]]
        if not words:
            return [], torch.zeros(0, 1)
        return words, normalize(self.encoder.encode_texts(words, stage="words of captions"))

    @cached_property
    def by_chance(self) -> Float[Tensor, " 2"]:
        """The cosines to their nearest image and word that most unrelated texts stay below."""
        texts = self.encoder.encode_texts([*UNRELATED], stage="unrelated texts")
        return self.measure_nearest(texts).quantile(UNRELATED_SHARE, dim=0)

    def measure_nearest(self, texts: Float[Tensor, "n d"]) -> Float[Tensor, "n 2"]:
        """The cosines of texts to their nearest image, and to their nearest word of captions."""
        images = torch.tensor([self.spaces["image"].search(text, 1)[0][1] for text in texts])
        return torch.stack([images, (normalize(texts) @ self.words[1].T).amax(1)], dim=1)

    def prepare(self) -> None:
        """Open features and words in a thread, so that the first query need not wait."""

        def open_both() -> None:
            with self._lock:
                _ = self.spaces, self.words[0] and self.by_chance

        start_thread(open_both, name="protoclip-features")  # the first question says what is wrong

    def row(self, position: int) -> int:
        """The row in the data of a pair in the atlas."""
        return int(self.atlas.rows[position])

    def position(self, row: int) -> int | None:
        """The position of a row of the data in the atlas; None if it is not there."""
        position = int(np.searchsorted(self.atlas.rows, row))
        return position if row in self.atlas.rows[position : position + 1] else None

    def pairs_of_image(self, position: int) -> list[int]:
        """The other pairs that show the image of a pair."""
        images = self.atlas.images
        return [at for at in np.flatnonzero(images == images[position]).tolist() if at != position]

    def search_text(self, text: str, number: int = 24) -> Answer:
        """The pairs nearest to the first 1,000 characters of a text; raises `ValueError` if it is
        empty.

        A leading article is dropped: it does not change the meaning, and misleads a small model
        whose captions have hardly any.
        """
        text = text[:MAX_QUERY].encode("utf-8", "replace").decode().replace("\0", " ").strip()
        if not text:
            raise ValueError("the search is empty; write some words")
        return self._answer("text", ARTICLE.sub("", text), number)

    def search_image(self, encoded: bytes, number: int = 24) -> Answer:
        """The pairs nearest to an image; raises `ValueError` if it cannot be decoded."""
        width, height = find_size(encoded)
        if width * height > SEARCH_PIXELS:
            limit = f"more than the limit ({SEARCH_PIXELS})"
            raise ValueError(f"{width} x {height} pixels are {limit}")
        return self._answer("image", prepare_image(encoded, self.encoder.transform), number)

    def nearest(self, position: int, modality: str, number: int = 12) -> Answer:
        """The images and texts nearest to a pair's image or text, except its own."""
        with self._lock:
            answer = self.find_near(getattr(self.features, modality)[position], number + 1)
        own = int(self.atlas.images[position])
        images = [near for near in answer.images if near[0] != own]
        texts = [near for near in answer.texts if near[0] != position]
        return Answer(images=images[:number], texts=texts[:number])

    def find_near(self, query: Float[Tensor, " d"], number: int) -> Answer:
        """The nearest different images, and the nearest texts."""
        images, texts = (self.spaces[modality].search(query, number) for modality in MODALITIES)
        return Answer(images=images, texts=texts)

    @torch.inference_mode()
    def _answer(self, modality: str, query: Any, number: int) -> Answer:
        """What is near to a query, the words near to it, and those also near to each result."""
        with self._lock:
            features = self.encoder.encode_inputs(modality, [query])
            answer, (words, of_words) = self.find_near(features[0], number), self.words
            if not words:
                return answer
            if modality == "text":
                gains = self.measure_nearest(features) - self.by_chance
                answer = replace(answer, fits=bool((gains > 1e-5).any()))  # beyond rounding

        def standardize(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n w"]:
            cosine = normalize(rows) @ of_words.T
            return (cosine - cosine.mean(1, keepdim=True)) / (cosine.std(1, keepdim=True) + 1e-6)

        def find_words(nearness: Float[Tensor, "n w"]) -> list[list[str]]:
            best = nearness.topk(min(NAMED_WORDS, len(words)), dim=1)
            return [
                [words[number] for value, number in zip(*row, strict=True) if value > NEARER]
                for row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]

        to_query, shared = standardize(features), {}
        for modality, near in (("image", answer.images), ("text", answer.texts)):
            rows = getattr(self.features, modality)[[position for position, _ in near]]
            shared[modality] = find_words(torch.minimum(standardize(rows), to_query))
        return replace(answer, words=find_words(to_query)[0], shared=shared)


def open_explorer(
    reference: str,
    pairs: ExploredPairs,
    *,
    device: torch.device,
    layout: Layout = "pca",
    number: int | None = None,
    trained_on: bool = True,
    batch_size: int = 256,
    workers: int | None = None,
    cache: bool = True,
) -> Explorer:
    """Open a model over pairs; features and the atlas come from the cache, or are made for it.

    Args:
        number: Prototypes of each modality; unset, a tenth of the pairs, from 2 to 1,000.
        trained_on: Whether the model was trained on these data. If `align` made it, heads that have
            not seen a pair then tell how odd it is.

    Raises `ValueError` for no such model, no readable image, or fewer pairs than prototypes.
    """
    if number is not None and number > (most := min(len(pairs), FITTED_ROWS)):
        raise ValueError(f"--groups: {number} is too large; at most {most} for these pairs")
    encoder = load_encoder(reference, device, keep=cache, batch_size=batch_size, workers=workers)
    model = encoder.model
    checkpoint = find_start(reference).checkpoint if isinstance(model, ProtoCLIP) else None
    config = None if checkpoint is None else read_run_config(reference)
    encoder = replace(encoder, aligned_by=config)
    heads = projection_heads(model, config)
    aligned = trained_on and checkpoint is not None and is_aligned(checkpoint)
    path = None
    if cache:
        parts = encoder.key, pairs.key, layout, number, bool(heads), aligned
        name = checksum(json.dumps([FORM, *map(str, parts)]).encode())
        path = cache_folder() / "atlas" / f"{name}.npz"
    atlas, encoded = None if path is None else read_atlas(path), None
    if atlas is not None:
        bad = np.setdiff1d(atlas.captioned, atlas.rows)
        for row in bad[:: len(bad) // RETRIED + 1].tolist():
            with suppress(BadSample):
                pairs.image(row)
                atlas = None  # an image has become readable
                break
    if atlas is None:
        minutes = 1 + len(pairs) // 50_000  # of a core, with UMAP
        say(
            f"computing: features of {len(pairs):,} pairs; then groups, map and checks, about "
            f"{minutes} min; the page comes after them, and at once the next time"
        )
        encoded, encoder_features = encode_to_map(encoder, pairs, aligned=aligned)
        scale = getattr(getattr(model, "towers", None), "logit_scale", None)
        scale = USUAL_SCALE if scale is None else min(100.0, float(scale.detach().exp()))
        atlas = make_atlas(
            encoded,
            pairs,
            heads=heads,
            encoder_features=encoder_features,
            aligned=aligned,
            scale=scale,
            layout=layout,
            number=number,
            run_prototypes=read_prototypes(checkpoint) if heads and checkpoint else {},
        )
        try:
            if path is not None:
                write_atlas(path, atlas)
        except OSError as error:
            say(f"warning: the map is not kept ({error})")
    return Explorer(
        name=reference,
        pairs=pairs,
        encoder=encoder,
        atlas=atlas,
        encoded=encoded,
        heads=heads,
        teachers="" if config is None else config.uses_of_teachers,
        positives="" if config is None else config.loss.positives or "pair",
    )


def projection_heads(model: Any, config: Config | None) -> Heads | None:
    """The trained projection heads; None for a model without, and for a run that trains none.

    Args:
        config: The settings of the model's run, if it has one.
    """
    if not isinstance(model, ProtoCLIP) or (config is not None and not config.uses_prototypes):
        return None
    device = next(model.parameters()).device

    def project(head: nn.Module, rows: Tensor) -> Tensor:
        return to_float(head(rows.to(device))).cpu()

    return {"image": partial(project, model.image_head), "text": partial(project, model.text_head)}


def encode_to_map(
    encoder: Encoder, pairs: ExploredPairs, *, aligned: bool
) -> tuple[Features, Features | None]:
    """The features of all pairs that can be read, and for a model of two frozen encoders also
    theirs; with all captions if the model was aligned on these pairs."""
    rows = pairs.find_captioned()
    features = encode_pairs(encoder, pairs, rows, project=False)
    if encoder.frozen is None:
        return features, None
    others = [pairs.sample_captions(row)[1:] for row in features.rows.tolist()] if aligned else []
    if any(others):
        texts = encoder.encode_texts([*chain(*others)], stage="other captions", project=False)
        counts = torch.tensor([*map(len, others)])
        owner = torch.arange(len(others)).repeat_interleave(counts)
        order = torch.argsort(torch.cat([torch.arange(len(others)), owner]), stable=True)
        captions = torch.cat([features.text.float(), texts.float()])[order]
        features = replace(features, captions=captions, counts=1 + counts)
    image = encoder.project("image", features.image)
    text = encoder.project("text", features.text)
    joint = replace(features, image=image, text=text, captions=None, counts=None)
    towers, columns = encoder.model.towers, dict[str, Tensor]()  # which read some of the columns
    for name, tower in zip(("image", "text", "captions"), ["visual", "text", "text"], strict=True):
        if (rows := getattr(features, name)) is not None:
            columns[name] = rows[:, read_columns(getattr(towers, tower), rows.shape[1])]
    return joint, replace(features, **columns)


def encode_pairs(
    encoder: Encoder, pairs: ExploredPairs, rows: Rows, *, project: bool = True
) -> Features:
    """Features of those rows whose image can be read; all have captions."""
    if not len(rows):
        raise ValueError(f"{pairs.name}: no pair has a caption")
    images = encoder.encode_images(pairs.images(rows), stage="images", project=project)
    captions = [pairs.caption(row) for row in rows.tolist()]
    texts = encoder.encode_texts(captions, stage="captions", project=project)
    is_read = torch.ones(len(rows), dtype=torch.bool)
    is_read[[row for row, _ in images.bad]] = False
    has_hashes = len(images.content) == len(images.features)  # features from `align` have none
    return Features(
        captioned=torch.from_numpy(rows),
        rows=torch.from_numpy(rows)[is_read],
        image=images.features,
        text=texts if bool(is_read.all()) else texts[is_read],
        content=images.content if has_hashes else None,
    )
