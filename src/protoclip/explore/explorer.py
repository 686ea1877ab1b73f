"""A model over pairs: opens both, and finds what is near to a text, an image or a pair."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property, partial
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from protoclip.config import Config
from protoclip.data.access import start_thread
from protoclip.data.decode import decode
from protoclip.data.index import cache_folder
from protoclip.data.pairs import BadSample
from protoclip.data.view import Rows
from protoclip.evaluation.encoders import JoinedEncoder, encoder_of
from protoclip.evaluation.features import RETRIED, Encoder
from protoclip.explore.atlas import (
    MODALITIES,
    USUAL_SCALE,
    Atlas,
    Features,
    Heads,
    Layout,
    atlas_path,
    make_atlas,
    normalize,
    read_atlas,
    require_groups,
    write_atlas,
)
from protoclip.explore.names import frequent_words
from protoclip.explore.pairs import ExploredPairs
from protoclip.models import loading
from protoclip.models.protoclip import ProtoCLIP, evaluation_mode, to_float
from protoclip.models.saved import is_aligned, read_config, read_prototypes, run_of
from protoclip.models.start import find_start
from protoclip.terminal import say
from protoclip.training.run_folder import flat, positives_of

SEARCH_PIXELS = 50_000_000  # of a query image; decoding takes 20 bytes a pixel
MAX_QUERY = 1000  # characters of a query text
ARTICLE = re.compile(r"^(a|an|the)\s+(?=\S)", re.IGNORECASE)
CHUNK_ELEMENTS = 20_000_000  # similarities in memory at a time

# Words of captions that explain answers, and how many an answer names at most. A word is near to
# something if its cosine is this many standard deviations above the mean of all words.
MOST_WORDS, NAMED_WORDS, NEARER = 1000, 3, 1.0

# Pairs to look at for each requested image, until enough different images are among them.
PAIRS_PER_IMAGE = (2, 16, 128, 1024)
SHARING, TIMES_MORE = 16, 8  # pairs of an image to look for at first, and the factor of each retry
SAME_IMAGE = 0.999  # cosine above which two pairs may show one image; features are rounded

# A pair's position in the atlas, and its cosine to the query.
Near = list[tuple[int, float]]
NearestRows = tuple[Float[Tensor, "b k"], Int[Tensor, "b k"]]  # similarities, and rows


class UnreadableImage(ValueError):
    """A query image cannot be decoded."""


class Neighbours:
    """Finds the rows whose features are nearest to a query.

    Args:
        features: Rows of any norm, which may be mapped into memory.
    """

    def __init__(self, features: Float[Tensor, "n d"]) -> None:
        self.features = features
        norms = [chunk.norm(dim=1) for chunk in torch.split(features, 1 << 16)]
        self.norms = torch.cat(norms).clamp(min=1e-12)

    def __len__(self) -> int:
        return len(self.features)

    def rows(self, rows: Int[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """Unit-norm features of some rows."""
        return self.features[rows] / self.norms[rows].unsqueeze(1)

    def search(self, queries: Float[Tensor, "b d"], number: int) -> NearestRows:
        """The `number` nearest rows of each query, the nearest first; fewer if there are fewer."""
        queries, number = F.normalize(queries.float(), dim=1), min(number, len(self))
        best: NearestRows | None = None
        size = max(number, CHUNK_ELEMENTS // max(1, len(queries)))
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            similarity = queries @ self.features[part].float().T / self.norms[part]
            near = similarity.topk(min(number, similarity.shape[1]), dim=1)
            values, rows = near.values, near.indices + start
            if best is not None:
                values, rows = torch.cat([best[0], values], 1), torch.cat([best[1], rows], 1)
                top = values.topk(min(number, values.shape[1]), dim=1)
                values, rows = top.values, rows.gather(1, top.indices)
            best = values, rows
        assert best is not None
        return best


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The images and the captions nearest to a query.

    Attributes:
        sharing: For each image, by its position, the other pairs found that show the same one.
        words: The words of captions that are nearest to the query.
        shared: For each image and each text by modality, the words near both to it and the query.
    """

    images: Near
    texts: Near
    sharing: Mapping[int, Sequence[int]] = field(default_factory=dict)
    words: Sequence[str] = ()
    shared: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Explorer:
    """One model over pairs.

    Attributes:
        name: The model's reference.
        encoded: Features of the pairs in the atlas; unset, they are opened when a query needs them.
        heads: As `make_atlas` takes them.
        teachers: Teachers of the run that trained the model, and what it learned from each.
        positives: How that run treated equal pairs: its `loss.positives`.
    """

    name: str
    pairs: ExploredPairs
    encoder: Encoder
    atlas: Atlas
    encoded: Features | None = None
    heads: Heads | None = None
    teachers: str = ""
    positives: str = ""
    _lock: Any = field(default_factory=Lock, repr=False)

    @cached_property
    def features(self) -> Features:
        if self.encoded is not None:
            return self.encoded
        # The atlas has their rows, which spares reading all captions.
        features = encode_pairs(self.encoder, self.pairs, self.atlas.captioned)
        return select_rows(features, self.atlas.rows)

    @cached_property
    def _spaces(self) -> dict[str, Neighbours]:
        return {m: Neighbours(getattr(self.features, m)) for m in MODALITIES}

    def space(self, modality: str) -> Neighbours:
        """The features of a modality, ready to be searched."""
        with self._lock:
            return self._spaces[modality]

    @cached_property
    def _words(self) -> tuple[list[str], Float[Tensor, "w d"]]:
        captions = []
        for row in self.atlas.rows[self.atlas.drawn].tolist():
            with suppress(BadSample):
                captions.append(self.pairs.caption(row))
        words = frequent_words(captions, MOST_WORDS)
        if not words:
            return [], torch.zeros(0, 0)
        return words, normalize(self.encoder.texts(words, stage="words of captions"))

    def words(self) -> tuple[list[str], Float[Tensor, "w d"]]:
        """The most frequent words of captions, and their features, of unit norm."""
        with self._lock:
            return self._words

    def prepare(self) -> None:
        """Open features and words in a thread, so that the first query need not wait."""

        def open_both() -> None:
            self.space("image")
            self.words()

        start_thread(open_both, name="protoclip-features")  # the first question says what is wrong

    def row(self, position: int) -> int:
        """The row in the data of a pair in the atlas."""
        return int(self.atlas.rows[position])

    def position(self, row: int) -> int | None:
        """The position of a row of the data in the atlas; None if it is not there."""
        position = int(np.searchsorted(self.atlas.rows, row))
        return position if row in self.atlas.rows[position : position + 1] else None

    def image_key(self, position: int) -> str:
        """Identifies the image of a pair in the atlas; equal for pairs that show one image."""
        return self.pairs.image_key(self.row(position))

    def search_text(self, text: str, number: int = 24) -> Answer:
        """The pairs nearest to the first 1,000 characters of a text.

        A leading article is dropped: it does not change the meaning, and misleads a small model
        whose captions have hardly any.

        Raises:
            ValueError: The text is empty.
        """
        text = text[:MAX_QUERY].encode("utf-8", "replace").decode().replace("\0", " ").strip()
        if not text:
            raise ValueError("an empty text finds nothing; write some words")
        text = ARTICLE.sub("", text)
        encoder = self.encoder
        with self._lock, evaluation_mode(encoder.model), torch.inference_mode():
            tokens = encoder.tokens([text]).to(encoder.device)
            with encoder.context():
                query = encoder.model.encode_text(tokens).float().cpu()
        return self._explain(query, self.near(query, number))

    def search_image(self, encoded: bytes, number: int = 24) -> Answer:
        """The pairs nearest to an image; raises `UnreadableImage` if it cannot be decoded."""
        encoder = self.encoder
        # One at a time, since an image may be large.
        with self._lock, evaluation_mode(encoder.model), torch.inference_mode():
            try:
                image = Image.fromarray(decode(encoded, max_pixels=SEARCH_PIXELS))
            except ValueError as error:
                raise UnreadableImage(str(error)) from None
            pixels = encoder.transform(image).unsqueeze(0).to(encoder.device)
            with encoder.context():
                query = encoder.model.encode_image(pixels).float().cpu()
        return self._explain(query, self.near(query, number))

    def nearest(self, position: int, modality: str, number: int = 12) -> Answer:
        """The images and texts nearest to a pair's image or text, except its own."""
        query = self.space(modality).rows(torch.tensor([position]))
        answer = self.near(query, number + 1)
        key = self.image_key(position)
        images = [near for near in answer.images if self.image_key(near[0]) != key]
        texts = [near for near in answer.texts if near[0] != position]
        return replace(answer, images=images[:number], texts=texts[:number])

    def near(self, query: Float[Tensor, "1 d"], number: int) -> Answer:
        """The nearest different images, and the nearest texts."""
        for times in PAIRS_PER_IMAGE:
            showing: dict[str, Near] = {}
            for near in self._near_pairs(query, "image", times * number):
                showing.setdefault(self.image_key(near[0]), []).append(near)
            # Pairs of one image are neighbours in the list, so only the last image may lack some.
            if len(showing) > number:
                break
        images: Near = []
        sharing: dict[int, list[int]] = {}
        for pairs in [*showing.values()][:number]:
            first, *others = sorted(position for position, _ in pairs)
            images.append((first, pairs[0][1]))
            sharing[first] = others
        return Answer(images=images, texts=self._near_pairs(query, "text", number), sharing=sharing)

    def _near_pairs(self, query: Float[Tensor, "1 d"], modality: str, number: int) -> Near:
        similarity, rows = self.space(modality).search(query, number)
        return list(zip(rows[0].tolist(), similarity[0].tolist(), strict=True))

    def _explain(self, query: Float[Tensor, "1 d"], answer: Answer) -> Answer:
        """Add the words near to the query, and those also near to each result."""
        words, features = self.words()
        if not words:
            return answer

        def standardize(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n w"]:
            cosine = normalize(rows) @ features.T
            return (cosine - cosine.mean(1, keepdim=True)) / (cosine.std(1, keepdim=True) + 1e-6)

        def near_words(nearness: Float[Tensor, "n w"]) -> list[list[str]]:
            best = nearness.topk(min(NAMED_WORDS, len(words)), dim=1)
            return [
                [words[number] for value, number in zip(*row, strict=True) if value > NEARER]
                for row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]

        to_query, shared = standardize(query), {}
        for modality, near in (("image", answer.images), ("text", answer.texts)):
            rows = self.space(modality).rows(torch.tensor([row for row, _ in near]).long())
            shared[modality] = near_words(torch.minimum(standardize(rows.float()), to_query))
        return replace(answer, words=near_words(to_query)[0], shared=shared)

    def find_sharing(self, positions: Sequence[int]) -> dict[int, list[int]]:
        """For each of these pairs, all others that show the same image."""
        space, key_of, sharing = self.space("image"), cache(self.image_key), dict[int, list[int]]()
        waiting, number = torch.tensor(positions).long(), SHARING
        while len(waiting):
            # Smaller batches for more results each.
            for batch in torch.split(waiting, max(1, CHUNK_ELEMENTS // number)):
                similarity, rows = space.search(space.rows(batch), number)
                same = similarity >= SAME_IMAGE
                for position, near, is_same in zip(batch.tolist(), rows, same, strict=True):
                    if not is_same[-1] or number >= len(space):  # then there are no more
                        others = sorted({*near[is_same].tolist()} - {position})
                        key = key_of(position)
                        sharing[position] = [other for other in others if key_of(other) == key]
            waiting = torch.tensor([row for row in waiting.tolist() if row not in sharing])
            number *= TIMES_MORE
        return sharing


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
        reference: As `protoclip.load` takes it.
        number: Prototypes of each modality; unset, a tenth of the pairs, from 2 to 1,000.
        trained_on: Whether the model was trained on these data. If `align` made it, heads that have
            not seen a pair then tell how odd it is.

    Raises:
        ValueError: There is no such model, no image can be read, too few pairs, or more prototypes
            than pairs.
    """
    require_groups(number, len(pairs))
    model, transform, tokenizer = loading.load(reference)
    checkpoint = find_start(reference).checkpoint if isinstance(model, ProtoCLIP) else None
    config = None if checkpoint is None else read_run_config(reference)
    encoder = encoder_of(
        loading.to_device(model, device),
        transform,
        tokenizer,
        aligned_by=config,
        batch_size=batch_size,
        workers=workers,
        cache=cache_folder() / "features" if cache else None,
        show=True,
    )
    heads = projection_heads(model, config)
    aligned = trained_on and checkpoint is not None and is_aligned(checkpoint)
    path = None
    if cache:
        parts = encoder.key, pairs.key, layout, number, bool(heads), aligned
        path = atlas_path(cache_folder() / "atlas", *parts)
    atlas, encoded = None if path is None else read_current_atlas(path, pairs), None
    if atlas is None:
        say("computing: features")
        encoded, encoder_features = encode_to_map(encoder, pairs, aligned=aligned)
        atlas = make_atlas(
            encoded,
            pairs,
            heads=heads,
            encoder_features=encoder_features,
            aligned=aligned,
            scale=loss_scale(model),
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
        positives="" if config is None else positives_of(flat(asdict(config))),
    )


def read_run_config(reference: str) -> Config | None:
    """The settings of the run that a run or checkpoint folder belongs to, if it has some."""
    run = run_of(reference)
    return None if run is None else read_config(run)


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


def loss_scale(model: Any) -> float:
    """Inverse temperature of the model's own loss, at most 100 as in CLIP."""
    scale = getattr(getattr(model, "towers", None), "logit_scale", None)
    return USUAL_SCALE if scale is None else min(100.0, float(scale.detach().exp()))


def read_current_atlas(path: Path, pairs: ExploredPairs) -> Atlas | None:
    """The cached atlas; None if there is none, or if an unreadable image has become readable."""
    atlas = read_atlas(path)
    if atlas is None:
        return None
    bad = np.setdiff1d(atlas.captioned, atlas.rows)
    for row in bad[:: len(bad) // RETRIED + 1].tolist():
        with suppress(BadSample):
            pairs.image(row)
            return None
    return atlas


def encode_to_map(
    encoder: Encoder, pairs: ExploredPairs, *, aligned: bool
) -> tuple[Features, Features | None]:
    """The features of all pairs that can be read, and for a model of two frozen encoders also
    theirs; with all captions if the model was aligned on these pairs."""
    rows = pairs.find_captioned()
    if not isinstance(encoder, JoinedEncoder):
        return encode_pairs(encoder, pairs, rows), None
    features = encode_pairs(encoder.frozen, pairs, rows)
    if aligned:
        features = add_captions(encoder.frozen, pairs, features)
    image, text = encoder.joint(features.image, features.text)
    return replace(features, image=image, text=text, captions=None, counts=None), features


def encode_pairs(encoder: Encoder, pairs: ExploredPairs, rows: Rows) -> Features:
    """Features of those rows whose image can be read; all have captions."""
    if not len(rows):
        raise ValueError(f"{pairs.name}: no pair has a caption")
    images = encoder.images(pairs.images(rows), stage="images")
    captions = (pairs.caption(row) for row in rows.tolist())
    texts = encoder.texts(captions, stage="captions", content=f"first captions of {pairs.key}")
    is_read = torch.ones(len(rows), dtype=torch.bool)
    is_read[[row for row, _ in images.bad]] = False
    if len(images.content) == len(images.features):  # features from `align` have no hashes
        pairs.keep_content(rows[is_read.numpy()], images.content.numpy())
    return Features(
        captioned=torch.from_numpy(rows),
        rows=torch.from_numpy(rows)[is_read],
        image=images.features,
        text=texts if bool(is_read.all()) else texts[is_read],
    )


def select_rows(features: Features, rows: Rows) -> Features:
    """Features of the rows of an atlas, which may be fewer than can be read now.

    Raises:
        ValueError: The image of a row cannot be read any more.
    """
    wanted = torch.from_numpy(np.asarray(rows, np.int64))
    numbers = torch.searchsorted(features.rows, wanted).clamp(max=len(features.rows) - 1)
    if lost := int((features.rows[numbers] != wanted).sum()):
        raise ValueError(
            f"{lost} images of the map cannot be read any more; mend them, or make it anew with "
            "--no-cache"
        )
    image, text = features.image[numbers], features.text[numbers]
    return replace(features, rows=wanted, image=image, text=text)


def add_captions(encoder: Encoder, pairs: ExploredPairs, features: Features) -> Features:
    """Features with all captions of each pair."""
    others = [pairs.sample_captions(row)[1:] for row in features.rows.tolist()]
    if not any(others):
        return features
    texts = encoder.texts(chain(*others), stage="other captions")
    counts = torch.tensor([*map(len, others)])
    owner = torch.arange(len(others)).repeat_interleave(counts)
    order = torch.argsort(torch.cat([torch.arange(len(others)), owner]), stable=True)
    captions = torch.cat([features.text.float(), texts.float()])[order]
    return replace(features, captions=captions, counts=1 + counts)
