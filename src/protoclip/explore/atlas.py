"""How a model maps, groups and names pairs, and how far images and captions agree.

Everything is computed once and kept in the cache, so that the next start shows it at once.
"""

import json
import math
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from torch import Tensor

from protoclip.data.pairs import evenly_spaced
from protoclip.data.split import connect_rows
from protoclip.encode.linear_maps import FOLDS, out_of_fold
from protoclip.explore.pairs import ExploredPairs
from protoclip.files import replacing, to_json
from protoclip.progress import Progress
from protoclip.prototypes.kmeans import kmeans, nearest
from protoclip.terminal import say

Layout = Literal["pca", "umap"]
Modality = Literal["image", "text"]
Heads = Mapping[str, Callable[[Tensor], Tensor]]
MODALITIES: tuple[Modality, ...] = ("image", "text")
OTHER = {"image": "text", "text": "image"}
Array = npt.NDArray[Any]
BY_MODALITY = ("map_position", "prototype", "similarity")  # fields of an atlas

# Part of the name of every file. Change it when the content changes.
FORM = 15
FITTED_PAIRS = 10_000  # that the map is fitted to; others lie among their neighbours
PAIRS_PER_PROTOTYPE, MOST_PROTOTYPES = 10, 1000
FITTED_ROWS, ITERATIONS = 40_000, 20  # of K-means; other rows are assigned
OTHERS = 1024  # pairs that each pair's loss is computed against
# Images may be near-duplicates from this cosine on, and are from this likeness of their pixels on.
# At most this many images are compared with each other.
LEAST_SIMILAR, LEAST_ALIKE, MOST_DUPLICATES, COMPARED_ROWS = 0.97, 0.8, 500, 20_000
EPOCHS = 200  # of UMAP
# An image or text lies at the weighted mean of this many near ones; the nearest weighs most.
NEAR, SOFTNESS = 8, 0.03
CHUNK = 4096
COMPARED_AT_ONCE = 512  # pairs, with many texts
USUAL_SCALE = 1 / 0.07  # of logits, for a model without a scale of its own
LEAST_IMAGES = 100  # for fitting heads; with fewer they tell nothing about other pairs
COARSE, FINER, LEVELS = 12, 3, 3  # 12 groups of the map, then 36, then 108
PAIRS_PER_GROUP = 8  # on average at least, so that a group's words are not those of one caption
WORDS, LEAST = 3, 0.4  # in a name; each scores at least this share of the first word's score
READ = 300  # characters of a caption
PART_NEAR_MIDDLE = 4  # of a group's pairs, a quarter may be its example


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of pairs, of any norm.

    `rows` are the pairs that could be read, `captioned` all pairs with a caption. A model's
    features have one width; two encoders have a width each. `content` are hashes of the encoded
    images, if known. `captions` are all captions, pair after pair, and `counts` their numbers;
    `text` is the first one, and the only one if these are unset.
    """

    captioned: Int[Tensor, " c"]
    rows: Int[Tensor, " n"]
    image: Float[Tensor, "n d"]
    text: Float[Tensor, "n e"]
    content: Int[Tensor, " n"] | None = None
    captions: Float[Tensor, "m e"] | None = None
    counts: Int[Tensor, " n"] | None = None


@dataclass(frozen=True, kw_only=True)
class Prototype:
    """One group of a modality."""

    number: int
    modality: str
    size: int
    tightness: float  # mean cosine of its members to its centroid
    agreement: float  # share of its members whose other side is in `partner`
    partner: int  # the most frequent prototype of the other modality


@dataclass(frozen=True, kw_only=True)
class Atlas:
    """The map and the groups of pairs: NumPy arrays of a value a pair `(n,)`, quick to open."""

    captioned: Array  # rows of the data that have a caption `(c,)`
    rows: Array  # the pairs, as rows of the data: those whose image can be read too
    images: Array  # the image of each pair, as the position of the first pair that shows it
    map_position: Mapping[str, Array]  # by modality `(n, 2)`
    prototype: Mapping[str, Array]  # by modality
    similarity: Mapping[str, Array]  # by modality, cosines to the centroids of these
    distance: Array  # one minus the cosine of image and text, in [0, 2]
    loss: Array  # InfoNCE of the pair among others, in nats
    chance: float  # the loss from which on a caption fits no better than one drawn by chance
    duplicates: Array  # pairs of near-duplicate images `(p, 2)`, the most alike first
    # Correlation of their pixels `(p,)`: 1 only for copies, negative if one is the other mirrored.
    duplicate_likeness: Array
    number: int  # of prototypes in each modality
    space: str  # that was clustered, `projections` or `features`
    layout: str  # the method of the map, `pca` or `umap`
    compared: int  # images among which near-duplicates were looked for
    # By modality, how many prototypes the run itself has, and how many are nearest to no pair.
    run_prototypes: Mapping[str, Sequence[int]]
    unseen: bool = False  # whether distance and loss come from heads that have not seen the pair

    def __len__(self) -> int:
        return len(self.rows)

    def list_prototypes(self, modality: str) -> list[Prototype]:
        """The prototypes of a modality by number, empty ones included."""
        groups, number = self.prototype[modality], self.number
        sizes = np.bincount(groups, minlength=number)
        cosines = np.bincount(groups, self.similarity[modality], minlength=number)
        together = count_together(groups, self.prototype[OTHER[modality]], number)
        # The first entry of each row is its largest; among equal ones, that of the lowest column.
        order = np.lexsort((together.col, -together.data, together.row))
        rows, first = np.unique(together.row[order], return_index=True)
        partner, shared = np.zeros((2, number), np.int64)
        partner[rows], shared[rows] = together.col[order][first], together.data[order][first]
        return [
            Prototype(
                number=index,
                modality=modality,
                size=int(sizes[index]),
                tightness=float(cosines[index] / max(1, sizes[index])),
                agreement=float(shared[index] / max(1, sizes[index])),
                partner=int(partner[index]),
            )
            for index in range(number)
        ]


def count_together(one: Array, other: Array, number: int) -> coo_array:
    """How many pairs are in each combination of groups `(number, number)`."""
    ones = np.ones(len(one), np.int64)
    return coo_array((ones, (one, other)), (number, number)).tocsr().tocoo()


@torch.inference_mode()
def make_atlas(
    features: Features,
    pairs: ExploredPairs | None = None,
    *,
    heads: Heads | None = None,
    encoder_features: Features | None = None,
    aligned: bool = False,
    scale: float = USUAL_SCALE,
    layout: Layout = "pca",
    number: int | None = None,
    run_prototypes: Mapping[str, Float[Tensor, "k p"]] | None = None,
    seed: int = 0,
) -> Atlas:
    """Map and group pairs.

    Args:
        pairs: The pairs of the features; unset, each pair has its own image, and near-duplicates
            are found by cosine alone.
        heads: Projection heads by modality, whose outputs are clustered; unset, features are.
        encoder_features: Features of the same pairs by the model's frozen encoders, if it has two.
            Then near-duplicates are looked for among these.
        aligned: Whether the model was aligned on these pairs. Then distance and loss are
            `cross_fit_disagreement` of the encoders, if there are enough pairs.
        scale: Inverse temperature of the model's own loss.
        number: Prototypes of each modality; unset, a tenth of the pairs, from 2 to 1,000.
        run_prototypes: Prototypes of the run itself, by modality; the dead ones are counted.

    Raises:
        ValueError: Fewer than two pairs.
    """
    total = len(features.rows)
    if total < 2:
        raise ValueError(f"{total} pair can be read; exploring needs two or more")
    usual = max(2, min(total // PAIRS_PER_PROTOTYPE, MOST_PROTOTYPES))
    number = number or min(usual, total)
    say("computing: prototypes")
    prototype, similarity = dict[str, Array](), dict[str, Array]()
    dead: dict[str, list[int]] = {}
    for modality in MODALITIES:
        rows = getattr(features, modality)
        head = None if heads is None else heads[modality]
        assignments, cosines = cluster_rows(rows, head, number=number, seed=seed)
        prototype[modality] = assignments.int().numpy()
        similarity[modality] = cosines.numpy()
        if run_prototypes and modality in run_prototypes:
            centroids = run_prototypes[modality]
            used = torch.cat([nearest(part, centroids)[0] for part in project_rows(rows, head)])
            dead[modality] = [len(centroids), len(centroids) - len(torch.unique(used))]
    say(f"computing: map{', by UMAP, which is compiled first' if layout == 'umap' else ''}")
    fitted = torch.tensor(evenly_spaced(total, FITTED_PAIRS, seed))
    positions = place_pairs(features, fitted, layout=layout, seed=seed)
    every = images = np.arange(total)
    if pairs is not None:
        content = None if features.content is None else features.content.numpy()
        images = pairs.number_images(features.rows.numpy(), content)
    say("computing: near-duplicates")
    duplicates, likeness, compared = find_duplicates(
        encoder_features or features, pairs, images, seed=seed
    )
    say("computing: agreement of pairs")
    unseen, chance = None, compute_chance(total)
    if encoder_features and aligned and len(np.unique(images)) >= LEAST_IMAGES:
        texts, counts = encoder_features.captions, encoder_features.counts
        if texts is None or counts is None:
            texts, counts = encoder_features.text, torch.ones(total, dtype=torch.long)
        # Each text was encoded once, so equal captions have equal features.
        texts, text_of_pair = torch.unique(texts.float(), dim=0, return_inverse=True)
        alike = connect_rows(every, np.hstack([duplicates.numpy().T, [every, images]]))
        groups, first = torch.from_numpy(alike), counts.cumsum(0) - counts
        of_pairs = torch.arange(total).repeat_interleave(counts), text_of_pair, groups
        made = cross_fit_disagreement(encoder_features.image, texts, *of_pairs, seed=seed)
        unseen, chance = [part[first] for part in made[:2]], compute_chance(len(made[0]) // FOLDS)
    distance, loss = unseen or measure_disagreement(features, scale=scale, seed=seed)
    return Atlas(
        captioned=features.captioned.numpy(),
        rows=features.rows.numpy(),
        images=images,
        map_position=positions,
        prototype=prototype,
        similarity=similarity,
        distance=distance.numpy(),
        loss=loss.numpy(),
        chance=chance,
        duplicates=duplicates.numpy(),
        duplicate_likeness=likeness.numpy(),
        number=number,
        space="features" if heads is None else "projections",
        layout=layout,
        compared=compared,
        run_prototypes=dead,
        unseen=unseen is not None,
    )


def normalize(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return F.normalize(rows.float(), dim=1)


def project_rows(
    rows: Float[Tensor, "n d"], head: Callable[[Tensor], Tensor] | None
) -> Iterator[Float[Tensor, "b p"]]:
    """Unit-norm rows of the space to cluster, in chunks."""
    for part in torch.split(rows, CHUNK):
        yield normalize(part if head is None else head(part.float()))


def cluster_rows(
    rows: Float[Tensor, "n d"], head: Callable[[Tensor], Tensor] | None, *, number: int, seed: int
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """The prototype of each row, and the cosine to its centroid."""
    fitted = torch.tensor(evenly_spaced(len(rows), FITTED_ROWS, seed))
    sample = torch.cat(list(project_rows(rows[fitted], head)))
    centroids = kmeans(sample, number, iterations=ITERATIONS, seed=seed).centroids
    assignments, similarity = [], []
    for part in project_rows(rows, head):
        numbers = nearest(part, centroids)[0]
        assignments.append(numbers)
        similarity.append((part * normalize(centroids)[numbers]).sum(1))
    return torch.cat(assignments), torch.cat(similarity)


def place_pairs(
    features: Features, fitted: Int[Tensor, " m"], *, layout: Layout, seed: int
) -> dict[str, Array]:
    """Positions of images and texts on one map, fitted to some pairs.

    The features of images and of texts lie in two separate clouds, so a map of all of them would
    show the gap and not their meaning. Therefore each modality is centred at its own mean first,
    and the map is fitted to the mean of each pair's image and text. An image then lies where the
    pairs of the nearest images lie, its own pair first; and likewise a text.
    """
    means = {m: normalize(getattr(features, m)[fitted]).mean(0) for m in MODALITIES}

    def centre(rows: Tensor, modality: Modality) -> Tensor:
        return normalize(normalize(rows) - means[modality])

    fitted_rows = {m: centre(getattr(features, m)[fitted], m) for m in MODALITIES}
    middles = normalize(fitted_rows["image"] + fitted_rows["text"])
    if layout == "pca":
        from sklearn.decomposition import PCA

        solver = "randomized" if middles.shape[1] > 50 else "full"
        flat = PCA(2, svd_solver=solver, random_state=0).fit(middles.numpy())
    else:
        on_map = torch.from_numpy(place_by_umap(middles, seed=seed))

    positions = dict[str, Array]()
    for modality in MODALITIES:
        parts = []
        for rows in torch.split(getattr(features, modality), CHUNK):
            rows = centre(rows, modality)
            if layout == "pca":
                parts.append(flat.transform(rows.numpy()))
                continue
            cosine, near = (rows @ fitted_rows[modality].T).topk(min(NEAR, len(fitted)), dim=1)
            weights = torch.softmax(cosine / SOFTNESS, dim=1)
            parts.append((on_map[near] * weights.unsqueeze(2)).sum(1).numpy())
        positions[modality] = np.concatenate(parts).astype(np.float32)
    return positions


def place_by_umap(rows: Float[Tensor, "n d"], *, seed: int) -> Array:
    """Two coordinates of each unit-norm row by UMAP. The exact neighbours are computed here, since
    UMAP's search takes longer to compile than all the rest takes."""
    import umap

    few = min(15, len(rows))
    neighbours = [(part @ rows.T).topk(few, dim=1) for part in torch.split(rows, CHUNK)]
    cosine = torch.cat([part.values for part in neighbours])
    near = torch.cat([part.indices for part in neighbours])
    # UMAP expects each row as its own first neighbour, also among equal rows.
    itself = torch.arange(len(rows)).unsqueeze(1)
    order = torch.argsort((near != itself).int(), dim=1, stable=True)
    near, distance = near.gather(1, order), (1 - cosine.gather(1, order)).clamp(min=0)
    near[:, :1], distance[:, 0] = itself, 0
    reducer = umap.UMAP(
        n_neighbors=few,
        precomputed_knn=(near.numpy(), distance.numpy()),
        n_epochs=EPOCHS,
        init="pca",
        metric="cosine",
        random_state=seed,
        n_jobs=1,
        tqdm_kwds={"disable": not sys.stderr.isatty(), "leave": False},
    )
    with warnings.catch_warnings():  # UMAP warns that it cannot map other rows later
        warnings.simplefilter("ignore")
        on_map: Array = reducer.fit_transform(rows.numpy()).astype(np.float32)
    return on_map


def measure_disagreement(
    features: Features, *, scale: float, seed: int, equal: Sequence[Int[Tensor, " n"]] = ()
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """One minus the cosine of each pair's image and text, and its InfoNCE in both directions among
    at most 1,024 other pairs, which are drawn evenly. Pairs that are `equal`, such as in the number
    of their image, are not held against each other."""
    total = len(features.rows)
    equal = [torch.arange(total), *equal]
    others = torch.tensor(evenly_spaced(total, OTHERS, seed))
    other_images, other_texts = normalize(features.image[others]), normalize(features.text[others])
    distance, loss = [], []
    for rows in torch.split(torch.arange(total), CHUNK):
        image, text = normalize(features.image[rows]), normalize(features.text[rows])
        cosine = (image * text).sum(1)
        is_self = torch.stack([n[others] == n[rows].unsqueeze(1) for n in equal]).any(0)
        both = []
        for one, other in ((image, other_texts), (text, other_images)):
            logits = (scale * one @ other.T).masked_fill(is_self, float("-inf"))
            logits = torch.cat([logits, scale * cosine.unsqueeze(1)], dim=1)
            both.append(logits.logsumexp(1) - scale * cosine)
        distance.append(1 - cosine)
        loss.append((both[0] + both[1]) / 2)
    return torch.cat(distance), torch.cat(loss)


def compute_chance(pairs: int) -> float:
    """What `measure_disagreement` has as loss, in nats, if all of these pairs fit equally well."""
    return math.log(min(pairs, OTHERS))


def cross_fit_disagreement(
    images: Float[Tensor, "i q"],
    texts: Float[Tensor, "t r"],
    image_of_pair: Int[Tensor, " n"],
    text_of_pair: Int[Tensor, " n"],
    groups: Int[Tensor, " i"],
    *,
    compared: Int[Tensor, " o"] | None = None,
    seed: int,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Int[Tensor, " n"]]:
    """`measure_disagreement` by heads in closed form that were fitted to pairs of other images; the
    loss is among pairs that these heads have not seen either. And the text that fits each image
    best, of those that are `compared` and its own.

    A model that was trained on a wrong pair has learned it, and finds that it fits. Pairs of one
    caption need not be in one fold: the pairs with other images tell what the caption means.

    Args:
        images, texts: Features of any norm, by two encoders.
        image_of_pair, text_of_pair: Numbers of both, image after image. Each image has a pair.
        groups: Equal for images that stay in one fold, such as copies; two or more.
    """
    distance, loss = torch.zeros(2, len(image_of_pair))
    best, counts = text_of_pair.clone(), torch.bincount(image_of_pair)
    progress, done = Progress("agreement of pairs", len(best)), 0
    folds = out_of_fold(images, texts[text_of_pair], counts, groups, seed=seed)
    for rows, image_map, text_map in folds:
        is_in_fold = torch.zeros(len(images), dtype=torch.bool).index_fill(0, rows, True)
        pairs = is_in_fold[image_of_pair].nonzero()[:, 0]
        fold = Features(
            captioned=pairs,
            rows=pairs,
            image=normalize(images[image_of_pair[pairs]].float() @ image_map),
            text=texts[text_of_pair[pairs]].float() @ text_map,
        )
        equal = groups[image_of_pair[pairs]], text_of_pair[pairs]
        distance[pairs], loss[pairs] = measure_disagreement(
            fold, scale=USUAL_SCALE, seed=seed, equal=equal
        )
        if compared is not None:
            others = normalize(texts[compared].float() @ text_map)
            for numbers in torch.split(torch.arange(len(pairs)), COMPARED_AT_ONCE):
                highest, at = (fold.image[numbers] @ others.T).max(1)
                # Rounding decides nothing where the own text is among the compared ones.
                is_better = highest > 1 - distance[pairs[numbers]] + 1e-6
                best[pairs[numbers]] = compared[at].where(is_better, best[pairs[numbers]])
        done += len(pairs)
        progress.update(done)
    return distance, loss, best


def find_repeats(pairs: Iterable[Sequence[int]]) -> set[int]:
    """All numbers in pairs, except the lowest of each connected group.

    >>> sorted(find_repeats([(0, 2), (1, 2), (5, 7)]))
    [1, 2, 7]
    """
    edges = np.array(list(pairs), np.int64).reshape(-1, 2).T
    numbers = np.unique(edges)
    first = np.unique(connect_rows(numbers, edges), return_index=True)[1]
    return {*np.delete(numbers, first).tolist()}


def find_duplicates(
    features: Features, pairs: ExploredPairs | None, images: Array, *, seed: int
) -> tuple[Int[Tensor, "p 2"], Float[Tensor, " p"], int]:
    """Near-duplicate images, how alike they are, and how many images were compared.

    An image that several pairs show is compared once, as the image of the first of them. An encoder
    may not tell left from right, so pixels decide on its proposals.
    """
    different = np.unique(images)
    some = different[evenly_spaced(len(different), COMPARED_ROWS, seed)]
    compared = torch.from_numpy(some)
    near, values = find_similar_rows(features.image[compared])
    near = compared[near]
    if pairs is not None:
        both = features.rows[near].tolist()
        values = torch.tensor([pairs.correlate_images(*rows) for rows in both])
        order = torch.from_numpy(np.lexsort((-values.abs(), values < 0)))
        order = order[values[order].abs() >= LEAST_ALIKE]
        near, values = near[order], values[order]
    return near, values, len(compared)


def find_similar_rows(
    features: Float[Tensor, "n d"], *, batch: int = 512
) -> tuple[Int[Tensor, "p 2"], Float[Tensor, " p"]]:
    """At most 500 pairs of rows with a cosine of 0.97 or more, each row with its nearest other one
    only; the most similar first."""
    rows, pairs, values = normalize(features), [], []
    for numbers in torch.split(torch.arange(len(rows)), batch):
        similarity = rows[numbers] @ rows.T
        similarity[torch.arange(len(numbers)), numbers] = -torch.inf
        value, other = similarity.max(dim=1)
        near = value >= LEAST_SIMILAR
        pairs.append(torch.stack([numbers, other], 1)[near].sort(dim=1).values)
        values.append(value[near])
    all_pairs, all_values = torch.cat(pairs), torch.cat(values)
    first = torch.from_numpy(np.unique(all_pairs.numpy(), axis=0, return_index=True)[1])
    order = first[all_values[first].argsort(descending=True, stable=True)][:MOST_DUPLICATES]
    return all_pairs[order], all_values[order]


# Two models


@dataclass(frozen=True, kw_only=True)
class Movements:
    """The pairs that one model groups differently from another, in one modality.

    Groups of both are matched one to one, so that as many pairs as possible stay.
    """

    pairs: Array  # positions in both atlases `(p, 2)`, the largest movements first
    groups: Array  # the group of each in both models `(p, 2)`
    flows: Array  # number of pairs, and the groups in both models `(f, 3)`, the largest first
    common: int  # pairs in both atlases


def find_movements(first: Atlas, second: Atlas, modality: str) -> Movements:
    """The pairs that two models on the same data put into groups that do not match."""
    _, one, other = np.intersect1d(first.rows, second.rows, assume_unique=True, return_indices=True)
    number = max(first.number, second.number)
    before, after = first.prototype[modality][one], second.prototype[modality][other]
    changed = find_changes(before, after, number)
    pairs = np.stack([one, other], axis=1)[changed]
    groups = np.stack([before, after], axis=1)[changed].astype(np.int64)
    ways, way, counts = np.unique(groups @ (number, 1), return_inverse=True, return_counts=True)
    order = np.lexsort((way, -counts[way]))
    flows = np.stack([counts, ways // number, ways % number], axis=1)
    return Movements(
        pairs=pairs[order],
        groups=groups[order],
        flows=flows[np.argsort(-counts, kind="stable")],
        common=len(one),
    )


@torch.inference_mode()
def share_moved_by_seed(
    atlas: Atlas, features: Features, heads: Heads | None, modality: str
) -> float:
    """The share of pairs whose group changes if K-means has another seed, in [0, 1]."""
    head = None if heads is None else heads[modality]
    groups, _ = cluster_rows(getattr(features, modality), head, number=atlas.number, seed=1)
    return float(find_changes(atlas.prototype[modality], groups.numpy(), atlas.number).mean())


def find_changes(before: Array, after: Array, number: int) -> Array:
    """Whether each pair `(n,)` leaves its group, with groups matched so that the most stay."""
    together = count_together(before, after, number).toarray()
    rows, columns = linear_sum_assignment(together, maximize=True)
    match = np.empty(number, np.int64)
    match[rows] = columns
    changed: Array = match[before] != after
    return changed


# Words of captions


@dataclass(frozen=True, kw_only=True)
class Group:
    """A group of the map, around the median `x`, `y` of its points."""

    level: int  # 0 is the coarsest
    name: str
    coarse: str  # name of the coarse group that most of its pairs are in
    x: float
    y: float
    # Among pairs near the middle whose caption has the first word of the name, the one whose image
    # and caption agree best.
    example: int
    size: int  # pairs


def count_words(captions: Sequence[str]) -> tuple[Array, Any]:
    """The words of captions `(w,)`, and a sparse matrix of which captions have which `(n, w)`."""
    from sklearn.feature_extraction.text import CountVectorizer

    counter = CountVectorizer(binary=True, stop_words="english", token_pattern=word_pattern())
    try:
        has = counter.fit_transform([caption[:READ] for caption in captions])
    except ValueError:  # no caption has a word
        return np.array([], str), np.zeros((len(captions), 0), np.int64)
    return counter.get_feature_names_out(), has


@cache
def word_pattern() -> str:
    """Matches words that begin with a letter, so that no number is a name. Many scripts write
    vowels as marks, which are no part of a word for `re`."""
    marks = [c for c in map(chr, range(0x300, 0x10000)) if unicodedata.category(c).startswith("M")]
    return rf"(?u)\b[^\W\d_][\w{''.join(marks)}]+"


def name_groups(
    captions: Sequence[str], assignments: Array, number: int, *, distinct: bool = False
) -> list[str]:
    """One to three words for each group, by class-based TF-IDF; empty where no word is found.

    A word scores the share of the group's captions that have it, times log(1 + A / f): f captions
    have the word, and a group has A captions on average. A word of a single caption names a group
    only if its captions share no word. `distinct` names prefer words that no larger group has in
    its name, or that most captions of the group have.
    """
    words, has = count_words(captions)
    if not len(words):
        return [""] * number
    frequency = np.asarray(has.sum(0)).ravel()
    rarity = np.log1p(len(captions) / number / frequency)
    names, used = [""] * number, set[str]()
    sizes = np.bincount(assignments, minlength=number)
    for group in np.argsort(-sizes, kind="stable").tolist():
        members = np.flatnonzero(assignments == group)
        holders = np.asarray(has[members].sum(0)).ravel()
        score = holders / max(1, len(members)) * rarity
        if (shared := holders > 1).any():  # else rare words of one caption would come first
            score = score * shared
        best = np.lexsort((-frequency, -score))[: 4 * WORDS]
        good = best[score[best] > LEAST * score[best[0]]]
        new = [
            word
            for word in good
            if 2 * holders[word] > len(members) or not is_form_of(words[word], used)
        ]
        chosen: list[str] = []
        for word in words[new if distinct and new else good].tolist():
            if not is_form_of(word, chosen):
                chosen.append(word)
        used.update(chosen[:WORDS])
        names[group] = ", ".join(chosen[:WORDS])
    return names


def is_form_of(word: str, others: Collection[str]) -> bool:
    """Whether a word is another one with an ending, or vice versa."""
    return any(word.startswith(other) or other.startswith(word) for other in others)


def group_map(
    map_positions: Array, captions: Sequence[str], distance: Array
) -> tuple[list[Group], list[str]]:
    """Groups of pairs that lie together, coarse and large ones first; and the name of each pair's
    coarse group. Positions are those of image and text of each pair `(n, 2, 2)`."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    middles = map_positions.mean(1)
    most = min(max(1, len(middles) // PAIRS_PER_GROUP), len(np.unique(middles, axis=0)))
    numbers = sorted({min(most, COARSE * FINER**level) for level in range(LEVELS)})
    groups: list[Group] = []
    coarse: list[str] = []
    for level, number in enumerate(numbers):
        with warnings.catch_warnings():  # of fewer groups than asked for, because of copies
            warnings.simplefilter("ignore", ConvergenceWarning)
            assignments = KMeans(number, n_init=1, random_state=0).fit_predict(middles)
        names = name_groups(captions, assignments, number, distinct=level == 0)
        coarse = coarse or [names[group] for group in assignments]
        sizes = np.bincount(assignments, minlength=number)
        for group in np.argsort(-sizes, kind="stable").tolist():
            members = np.flatnonzero(assignments == group)
            if not len(members):  # fewer middles differ in K-means' precision
                continue
            middle = np.median(map_positions[members].reshape(-1, 2), axis=0)
            word = names[group].partition(",")[0]
            holders = [row for row in members.tolist() if word in captions[row].lower()]
            candidates = np.array(holders) if holders else members  # `lower` may change the word
            from_middle = np.linalg.norm(map_positions[candidates, 0] - middle, axis=1)
            central = candidates[np.argsort(from_middle, kind="stable")]
            central = central[: -(-len(central) // PART_NEAR_MIDDLE)]
            groups.append(
                Group(
                    level=level,
                    name=names[group],
                    coarse=Counter(coarse[row] for row in members.tolist()).most_common(1)[0][0],
                    x=float(middle[0]),
                    y=float(middle[1]),
                    example=int(central[distance[central].argmin()]),
                    size=len(members),
                )
            )
    return groups, coarse


# Files


def write_atlas(path: Path, atlas: Atlas) -> None:
    """Write an atlas as arrays, of which `facts` holds the rest as JSON."""
    arrays, facts = dict[str, Array](), dict[str, Any]()
    for name, value in vars(atlas).items():
        if name in BY_MODALITY:
            arrays |= {f"{name} {modality}": rows for modality, rows in value.items()}
        elif isinstance(value, np.ndarray):
            arrays[name] = value
        else:
            facts[name] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as scratch, scratch.open("wb") as file:
        np.savez(file, facts=np.array(to_json(facts)), **arrays)  # type: ignore[arg-type]


def read_atlas(path: Path) -> Atlas | None:
    """An atlas that `write_atlas` wrote; None if it is missing or damaged."""
    try:
        with np.load(path) as arrays:  # which compares the checksums that the file holds
            values: dict[str, Any] = dict(arrays)
        values |= json.loads(str(values.pop("facts")))
        for name in BY_MODALITY:
            values[name] = {m: values.pop(f"{name} {m}") for m in MODALITIES}
        return Atlas(**values)
    except Exception:  # what NumPy raises for a damaged file has no common class
        return None
