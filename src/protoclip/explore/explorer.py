"""A model over pairs: opens both, and answers what is near to a text, an image or a pair.

The search itself is in `neighbours.py`, and pages of the answers are made in `render.py`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property, partial
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from protoclip.config import Config
from protoclip.data.access import begun
from protoclip.data.decode import decode
from protoclip.data.index import cache_folder
from protoclip.data.pairs import BadSample
from protoclip.data.view import Rows
from protoclip.evaluation import analysis
from protoclip.evaluation.encoders import JoinedEncoder, encoder_of
from protoclip.evaluation.features import RETRIED, Encoder
from protoclip.explore.atlas import (
    MODALITIES,
    USUAL_SCALE,
    Atlas,
    Features,
    Layout,
    keep,
    make_atlas,
    path_of,
    read_kept,
    require_groups,
    unit,
    with_umap,
)
from protoclip.explore.names import vocabulary
from protoclip.explore.neighbours import CHUNK_ELEMENTS, Neighbours
from protoclip.explore.pairs import ExploredPairs
from protoclip.explore.thumbnails import likeness
from protoclip.models import loading
from protoclip.models.protoclip import ProtoCLIP, evaluation_mode, to_float
from protoclip.models.saved import is_aligned, read_config, run_of
from protoclip.models.start import find_start
from protoclip.terminal import say
from protoclip.training.run_folder import flat, positives_of

SEARCH_PIXELS = 50_000_000  # of an image that is searched for; decoding takes 20 bytes a pixel

MAX_QUERY = 1000  # characters of a text that is searched for
ARTICLE = re.compile(r"^(a|an|the)\s+(?=\S)", re.IGNORECASE)

# Words of captions that answers are explained by, and how many an answer names at most. A word is
# near to something if its cosine is this many standard deviations above that of words on average.
MOST_WORDS, NAMED_WORDS, NEARER = 1000, 3, 1.0

# So many times as many pairs as images are asked for, until that many images are among them.
PAIRS_PER_IMAGE = (2, 16, 128, 1024)
SHARING, TIMES_MORE = 16, 8  # pairs of an image that are looked for at first; how many more then
SAME_IMAGE = 0.999  # cosine above which two pairs may show one image, whose features are rounded

# A pair's position in the atlas, and its cosine to what was asked.
Near = list[tuple[int, float]]


class UnreadableImage(ValueError):
    """An image that is searched for cannot be decoded."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The images and the captions nearest to a query.

    Attributes:
        sharing: Of each image, by its position, the other pairs found that show the same one.
        words: The words of captions that are nearest to the query.
        shared: Of each image and each text by modality, the words near both to it and the query.
    """

    images: Near
    texts: Near
    sharing: Mapping[int, Sequence[int]] = field(default_factory=dict)
    words: Sequence[str] = ()
    shared: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Explorer:
    """One model over pairs. Features are opened when the first question needs them.

    Attributes:
        name: The model's reference.
        heads: As `make_atlas` takes them.
        teachers: Of the run that trained it, and what was learned of each.
        positives: What equal pairs were to that run: its `loss.positives`.
        kept: Where the atlas is kept; None if it is not.
        make_umap: Makes the atlas with a map by UMAP, where `atlas` has that by PCA meanwhile, and
            tells the share that is done.
    """

    name: str
    pairs: ExploredPairs
    encoder: Encoder
    atlas: Atlas
    features: Callable[[], Features]
    heads: dict[str, Callable[[Tensor], Tensor]] | None = None
    teachers: str = ""
    positives: str = ""
    kept: Path | None = None
    make_umap: Callable[[Callable[[float], None]], Atlas] | None = None
    _lock: Any = field(default_factory=Lock, repr=False)

    @cached_property
    def _spaces(self) -> dict[str, Neighbours]:
        features = self.features()
        return {modality: Neighbours(getattr(features, modality)) for modality in MODALITIES}

    def space(self, modality: str) -> Neighbours:
        """The features of a modality, to be searched."""
        with self._lock:
            return self._spaces[modality]

    @cached_property
    def _words(self) -> tuple[list[str], Float[Tensor, "w d"]]:
        captions = []
        for row in self.atlas.rows[self.atlas.drawn].tolist():
            with suppress(BadSample):
                captions.append(self.pairs.caption(row))
        words = vocabulary(captions, MOST_WORDS)
        if not words:
            return [], torch.zeros(0, 0)
        return words, unit(self.encoder.texts(words, stage="words of captions"))

    def words(self) -> tuple[list[str], Float[Tensor, "w d"]]:
        """The most frequent words of captions, and their features, of unit norm."""
        with self._lock:
            return self._words

    def prepare(self) -> None:
        """Open features and words in a thread, so that the first question need not wait."""

        def opened() -> None:
            self.space("image")
            self.words()

        begun(opened, name="protoclip-features")  # the first question says what is wrong

    def row(self, position: int) -> int:
        """The row in the data of a pair in the atlas."""
        return int(self.atlas.rows[position])

    def image_key(self, position: int) -> str:
        """Names the image of a pair in the atlas; pairs that show the same one have one name."""
        return self.pairs.image_key(self.row(position))

    def position(self, row: int) -> int | None:
        """Where in the atlas a row of the data is; None if it is not there."""
        position = int(np.searchsorted(self.atlas.rows, row))
        return position if row in self.atlas.rows[position : position + 1] else None

    def near(self, query: Float[Tensor, "1 d"], number: int) -> Answer:
        """The nearest images, each once however many pairs show it, and the nearest texts."""
        images, sharing = self._images_near(query, number)
        return Answer(images=images, texts=self._pairs_near(query, "text", number), sharing=sharing)

    def _pairs_near(self, query: Float[Tensor, "1 d"], modality: str, number: int) -> Near:
        similarity, rows = self.space(modality).search(query, number)
        near = zip(rows[0].tolist(), similarity[0].tolist(), strict=True)
        return [(row, value) for row, value in near if row >= 0]

    def _images_near(
        self, query: Float[Tensor, "1 d"], number: int
    ) -> tuple[Near, dict[int, list[int]]]:
        for times in PAIRS_PER_IMAGE:
            showing: dict[str, Near] = {}
            for entry in self._pairs_near(query, "image", times * number):
                showing.setdefault(self.image_key(entry[0]), []).append(entry)
            # Pairs of one image follow each other, so of all but the last none is missing.
            if len(showing) > number:
                break
        images: Near = []
        sharing: dict[int, list[int]] = {}
        for entries in [*showing.values()][:number]:
            first, *others = sorted(position for position, _ in entries)
            images.append((first, entries[0][1]))
            sharing[first] = others
        return images, sharing

    def sharing(self, positions: Sequence[int]) -> dict[int, list[int]]:
        """Of each of these pairs, all others that show the same image."""
        space, key_of, sharing = self.space("image"), cache(self.image_key), dict[int, list[int]]()
        waiting, number = torch.tensor(positions).long(), SHARING
        while len(waiting):
            # Few at a time where each has very many.
            for some in torch.split(waiting, max(1, CHUNK_ELEMENTS // number)):
                similarity, rows = space.search(space.rows(some), number)
                same = (similarity >= SAME_IMAGE) & (rows >= 0)
                for position, near, is_same in zip(some.tolist(), rows, same, strict=True):
                    if not is_same[-1] or number >= len(space):  # then there are no more
                        others = sorted({*near[is_same].tolist()} - {position})
                        key = key_of(position)
                        sharing[position] = [other for other in others if key_of(other) == key]
            waiting = torch.tensor([each for each in waiting.tolist() if each not in sharing])
            number *= TIMES_MORE
        return sharing

    def explained(self, query: Float[Tensor, "1 d"], answer: Answer) -> Answer:
        """An answer with the words that are near to the query, and near to each result too."""
        words, features = self.words()
        if not words:
            return answer

        def nearness(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n w"]:
            cosine = unit(rows) @ features.T
            return (cosine - cosine.mean(1, keepdim=True)) / (cosine.std(1, keepdim=True) + 1e-6)

        def named(rows: Float[Tensor, "n w"]) -> list[list[str]]:
            best = rows.topk(min(NAMED_WORDS, len(words)), dim=1)
            near = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            return [
                [words[number] for value, number in zip(*row, strict=True) if value > NEARER]
                for row in near
            ]

        of_query = nearness(query)
        shared = {}
        for modality, near in (("image", answer.images), ("text", answer.texts)):
            rows = self.space(modality).rows(torch.tensor([row for row, _ in near]).long())
            shared[modality] = named(torch.minimum(nearness(rows.float()), of_query))
        return replace(answer, words=named(of_query)[0], shared=shared)

    def search_text(self, text: str, number: int = 24) -> Answer:
        """The pairs nearest to a text, of which the first 1,000 characters count.

        An article before everything else is left out: what is looked for is the same without it,
        and a small model whose captions have hardly an article is led astray by one.

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
        return self.explained(query, self.near(query, number))

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
        return self.explained(query, self.near(query, number))

    def nearest(self, position: int, modality: str, number: int = 12) -> Answer:
        """What is nearest to a pair's image or text; its own image and text are left out."""
        query = self.space(modality).rows(torch.tensor([position]))
        answer = self.near(query, number + 1)

        own = self.image_key(position)
        images = [entry for entry in answer.images if self.image_key(entry[0]) != own]
        texts = [entry for entry in answer.texts if entry[0] != position]
        return replace(answer, images=images[:number], texts=texts[:number])


def open_explorer(
    reference: str,
    pairs: ExploredPairs,
    *,
    device: torch.device,
    layout: Layout = "pca",
    umap_later: bool = False,
    number: int | None = None,
    trained_on: bool = True,
    batch_size: int = 256,
    workers: int | None = None,
    cache: bool = True,
    show: Callable[[str], None] = lambda stage: None,
) -> Explorer:
    """Open a model over pairs; features and the atlas come from the cache, or are made and kept.

    Args:
        reference: As `protoclip.load` takes it.
        umap_later: Have the map by PCA where that by UMAP is not kept; `make_umap` makes it.
        number: Prototypes of each modality; unset, a tenth of the pairs, from 2 to 1,000.
        trained_on: Whether the pairs are of the data that the model was trained on. If it was by
            `align`, heads that have not seen a pair tell then how odd it is.
        show: Called with the name of each stage of the work.

    Raises:
        ValueError: There is no such model, no image can be read, too few pairs, or more prototypes
            than pairs.
    """
    require_groups(number, len(pairs))
    model, transform, tokenizer = loading.load(reference)
    checkpoint = find_start(reference).checkpoint if isinstance(model, ProtoCLIP) else None
    config = None if checkpoint is None else run_config(reference)
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
    heads = heads_of(model, config)
    aligned = trained_on and checkpoint is not None and is_aligned(checkpoint)

    def path_for(layout: Layout) -> Path | None:
        """Where the atlas with this map is kept; None if it is not."""
        parts = encoder.key, pairs.key, layout, number, bool(heads), aligned
        return path_of(cache_folder() / "atlas", *parts) if cache else None

    path = path_for(layout)
    atlas = kept_atlas(path, pairs)
    umap_follows = atlas is None and umap_later and layout == "umap"
    if umap_follows:
        path, layout = path_for("pca"), "pca"
        atlas = kept_atlas(path, pairs)
    made: Features | None = None
    if atlas is None:
        show("features")
        made, halves = features_to_map(encoder, pairs, aligned=aligned)
        rows = made.rows
        atlas = make_atlas(
            made,
            heads=heads,
            halves=halves if aligned else None,
            images=(halves or made).image,
            shown_images=lambda of: pairs.shown_images(rows[of].numpy()),
            likeness=lambda one, other: likeness(pairs, int(rows[one]), int(rows[other])),
            scale=scale_of(model),
            layout=layout,
            number=number,
            run_prototypes=analysis.run_prototypes(checkpoint) if heads and checkpoint else {},
            show=show,
        )
        keep_if_possible(path, atlas)

    first = atlas

    def features() -> Features:
        if made is not None:
            return made
        # The rows are known from the atlas, which spares reading all captions to find them.
        return of_rows(encoded(encoder, pairs, first.captioned), first.rows)

    def make_umap(done: Callable[[float], None]) -> Atlas:
        with_map = with_umap(first, features(), done=done)
        keep_if_possible(path_for("umap"), with_map)
        return with_map

    return Explorer(
        name=reference,
        teachers="" if config is None else config.uses_of_teachers,
        positives="" if config is None else positives_of(flat(asdict(config))),
        pairs=pairs,
        encoder=encoder,
        atlas=atlas,
        features=features,
        heads=heads,
        kept=path,
        make_umap=make_umap if umap_follows else None,
    )


def kept_atlas(path: Path | None, pairs: ExploredPairs) -> Atlas | None:
    """The atlas that is kept, unless an image that could not be read then can be now."""
    atlas = None if path is None else read_kept(path)
    if atlas is None:
        return None
    bad = np.setdiff1d(atlas.captioned, atlas.rows)
    some = bad[:: len(bad) // RETRIED + 1].tolist()
    return None if any(can_be_read(pairs, row) for row in some) else atlas


def keep_if_possible(path: Path | None, atlas: Atlas) -> None:
    if path is None:
        return
    try:
        keep(path, atlas)
    except OSError as error:
        say(f"warning: the map is not kept ({error})")


def features_to_map(
    encoder: Encoder, pairs: ExploredPairs, *, aligned: bool
) -> tuple[Features, Features | None]:
    """The features of all pairs that can be read; and where a model joins two halves, those of the
    halves: if it was aligned on these pairs, of all their captions."""
    rows = pairs.with_captions()
    if not isinstance(encoder, JoinedEncoder):
        return encoded(encoder, pairs, rows), None
    halves = encoded(encoder.frozen, pairs, rows)
    if aligned:
        halves = with_all_captions(encoder.frozen, pairs, halves)
    image, text = encoder.joint(halves.image, halves.text)
    return replace(halves, image=image, text=text, captions=None, counts=None), halves


def scale_of(model: Any) -> float:
    """Inverse temperature of the model's own loss, at most 100 as in CLIP."""
    scale = getattr(getattr(model, "towers", None), "logit_scale", None)
    return USUAL_SCALE if scale is None else min(100.0, float(scale.detach().exp()))


def can_be_read(pairs: ExploredPairs, row: int) -> bool:
    try:
        pairs.image(row)
    except BadSample:
        return False
    return True


def encoded(encoder: Encoder, pairs: ExploredPairs, rows: Rows) -> Features:
    """Features of those rows, which have captions, whose image can be read."""
    if not len(rows):
        raise ValueError(f"{pairs.name}: no pair has a caption")
    images = encoder.images(pairs.images(rows), stage="images")
    captions = (pairs.caption(row) for row in rows.tolist())
    texts = encoder.texts(captions, stage="captions", content=f"first captions of {pairs.key}")
    kept = torch.ones(len(rows), dtype=torch.bool)
    kept[[row for row, _ in images.bad]] = False
    if len(images.content) == len(images.features):  # what `align` has encoded comes without
        pairs.keep_content(rows[kept.numpy()], images.content.numpy())
    return Features(
        captioned=torch.from_numpy(rows),
        rows=torch.from_numpy(rows)[kept],
        image=images.features,
        text=texts if bool(kept.all()) else texts[kept],
    )


def of_rows(features: Features, rows: Rows) -> Features:
    """Those of these rows; when an atlas was made, the image of another may have been unreadable.

    Raises:
        ValueError: The image of one of them cannot be read any more.
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


def with_all_captions(encoder: Encoder, pairs: ExploredPairs, features: Features) -> Features:
    """The same with all captions of each pair."""
    others = [pairs.sample_captions(row)[1:] for row in features.rows.tolist()]
    if not any(others):
        return features
    texts = encoder.texts(chain(*others), stage="other captions")
    counts = torch.tensor([*map(len, others)])
    owner = torch.arange(len(others)).repeat_interleave(counts)
    order = torch.argsort(torch.cat([torch.arange(len(others)), owner]), stable=True)
    captions = torch.cat([features.text.float(), texts.float()])[order]
    return replace(features, captions=captions, counts=1 + counts)


def heads_of(model: Any, config: Config | None) -> dict[str, Callable[[Tensor], Tensor]] | None:
    """The trained projection heads; None for a model without, and for a run that trains none.

    Args:
        config: The settings of the run, if the model is of one.
    """
    if not isinstance(model, ProtoCLIP) or (config is not None and not config.uses_prototypes):
        return None
    device = next(model.parameters()).device

    def projections(head: nn.Module, rows: Tensor) -> Tensor:
        return to_float(head(rows.to(device))).cpu()

    heads = {"image": model.image_head, "text": model.text_head}
    return {modality: partial(projections, head) for modality, head in heads.items()}


def run_config(reference: str) -> Config | None:
    """The settings of the run that a run or checkpoint folder belongs to, if it has some."""
    run = run_of(reference)
    return None if run is None else read_config(run)
