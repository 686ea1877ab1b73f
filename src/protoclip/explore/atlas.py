"""How a model maps and groups pairs: positions on the map, prototypes, and how far pairs agree.

Everything is computed once and kept in the cache, so that the next start shows it at once.
"""

import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from protoclip.data.sampler import evenly_spaced
from protoclip.encode.canonical import out_of_fold
from protoclip.explore.pairs import ExploredPairs
from protoclip.files import (
    checksum,
    file_checksum,
    read_sealed,
    replacing,
    sealed,
    to_json,
    write_atomically,
)
from protoclip.progress import Progress
from protoclip.prototypes.kmeans import kmeans
from protoclip.prototypes.nearest import nearest
from protoclip.terminal import say

Layout = Literal["pca", "umap"]
Modality = Literal["image", "text"]
Heads = Mapping[str, Callable[[Tensor], Tensor]]
Array = npt.NDArray[Any]
MODALITIES: tuple[Modality, ...] = ("image", "text")
OTHER: dict[str, Modality] = {"image": "text", "text": "image"}

# Part of the name of every file. Change it when what is kept changes.
FORM = 10
MAP_PAIRS = 10_000  # drawn on the map; more would lie over each other, and are slow to draw
PAIRS_PER_PROTOTYPE, MOST_PROTOTYPES = 10, 1000
FITTED_ROWS, ITERATIONS = 100_000, 20  # of K-means; other rows are assigned
OTHERS = 1024  # pairs that each pair's loss is computed against
# Images may be near-duplicates from this cosine on, and are from this likeness of their pixels on;
# each of some images is compared with all of them.
LEAST_SIMILAR, LEAST_ALIKE, MOST_DUPLICATES, COMPARED_ROWS = 0.97, 0.8, 500, 20_000
HASHED_PAIRS = 5 * COMPARED_ROWS  # to find as many different images; each costs a look or a read
EPOCHS = 200  # of UMAP
# An image or text lies at the weighted mean of this many near ones; the nearest weighs most.
NEAR, SOFTNESS = 8, 0.03
CHUNK = 4096
USUAL_SCALE = 1 / 0.07  # of logits, for a model without a scale of its own
EQUAL = 1e-3  # share of a row's norm by which copies of an image may differ in half precision
# Copies of a row are looked for among its 64 next ones along a line. On 16 random lines together,
# two rows are hardly ever 8 times as far apart as they are.
ALONG, LINES, APART = 64, 16, 8
LEAST_IMAGES = 100  # of pairs that heads are fitted to; fewer say nothing of others


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of pairs, of any norm.

    `rows` are those of the pairs that could be read, `captioned` of all that have a caption. Those
    of a model are of one width; two halves have one each. `captions` are all captions, pair after
    pair, `counts` of each, and `text` is the first; unset, there is one.
    """

    captioned: Int[Tensor, " c"]
    rows: Int[Tensor, " n"]
    image: Float[Tensor, "n d"]
    text: Float[Tensor, "n e"]
    captions: Float[Tensor, "m e"] | None = None
    counts: Int[Tensor, " n"] | None = None


@dataclass(frozen=True, kw_only=True)
class Atlas:
    """The map and the groups of pairs: NumPy arrays of a value a pair `(n,)`, quick to open.

    Attributes:
        captioned: Rows of the data that have a caption `(c,)`.
        rows: The pairs, as rows of the data: those whose image can be read too.
        drawn: Which of these are drawn on the map `(m,)`.
        image_map_position, text_map_position: Where on the map each lies `(n, 2)`.
        image_prototype, text_prototype: Its prototype in its own modality.
        image_similarity, text_similarity: Cosine to the prototype's centroid.
        distance: One minus the cosine of image and text, in [0, 2].
        loss: InfoNCE of the pair among others, in nats.
        unseen: Whether distance and loss are by heads that have not seen the pair, and not by the
            model itself.
        duplicates: Pairs of near-duplicate images `(p, 2)`, the most alike first;
            `duplicate_likeness` is the correlation of their pixels, and 1 for copies alone.
        number: Prototypes of each modality.
        space: What was clustered, `projections` or `features`.
        layout: How the map was made, `pca` or `umap`.
        compared: Images among which near-duplicates were looked for.
        run_prototypes: For each modality, how many prototypes the run itself has, and how many of
            them are dead, which means nearest to no pair.
    """

    captioned: Array
    rows: Array
    drawn: Array
    image_map_position: Array
    text_map_position: Array
    image_prototype: Array
    text_prototype: Array
    image_similarity: Array
    text_similarity: Array
    distance: Array
    loss: Array
    duplicates: Array
    duplicate_likeness: Array
    number: int
    space: str
    layout: str
    compared: int
    run_prototypes: Mapping[str, Sequence[int]]
    unseen: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def prototype(self, modality: str) -> Array:
        values: Array = getattr(self, f"{modality}_prototype")
        return values

    def similarity(self, modality: str) -> Array:
        values: Array = getattr(self, f"{modality}_similarity")
        return values

    def map_position(self, modality: str) -> Array:
        values: Array = getattr(self, f"{modality}_map_position")
        return values


def num_prototypes(pairs: int) -> int:
    """A tenth of the pairs, from 2 to 1,000."""
    return min(max(2, min(pairs // PAIRS_PER_PROTOTYPE, MOST_PROTOTYPES)), pairs)


def require_groups(number: int | None, pairs: int) -> None:
    """Refuse more prototypes than pairs that K-means is fitted to."""
    if number is not None and number > (most := min(pairs, FITTED_ROWS)):
        raise ValueError(f"--groups: {number} is too large; at most {most} for these pairs")


@torch.inference_mode()
def make_atlas(
    features: Features,
    pairs: ExploredPairs | None = None,
    *,
    heads: Heads | None = None,
    halves: Features | None = None,
    aligned: bool = False,
    scale: float = USUAL_SCALE,
    layout: Layout = "pca",
    number: int | None = None,
    run_prototypes: Mapping[str, Float[Tensor, "k p"]] | None = None,
    seed: int = 0,
) -> Atlas:
    """Map and group pairs.

    Args:
        pairs: What the features are of. Their images decide which are near-duplicates; unset, each
            pair has its own, and near-duplicates are by cosine alone.
        heads: Projection heads by modality, whose outputs are clustered; unset, features are.
        halves: What the frozen halves of the model make of the same pairs. Then near-duplicates
            are looked for among these.
        aligned: Whether the model was aligned on these pairs. Then distance and loss are
            `unseen_disagreement` of the halves, where there are enough pairs.
        scale: Inverse temperature of the model's own loss.
        number: Prototypes of each modality; see `num_prototypes`.
        run_prototypes: Those of the run itself, by modality, of which the dead are counted.

    Raises:
        ValueError: Fewer than two pairs, or more prototypes than pairs.
    """
    total = len(features.rows)
    if total < 2:
        raise ValueError(f"{total} pair can be read; exploring needs two or more")
    require_groups(number, total)
    number = number or num_prototypes(total)
    drawn = torch.tensor(evenly_spaced(total, min(total, MAP_PAIRS), seed))
    say("computing: prototypes")
    groups: dict[str, Array] = {}
    dead: dict[str, list[int]] = {}
    for modality in MODALITIES:
        rows = getattr(features, modality)
        head = None if heads is None else heads[modality]
        assigned, similarity = cluster_rows(rows, head, number=number, seed=seed)
        groups[f"{modality}_prototype"] = assigned.int().numpy()
        groups[f"{modality}_similarity"] = similarity.numpy()
        if run_prototypes and modality in run_prototypes:
            own = run_prototypes[modality]
            used = torch.cat([nearest(part, own)[0] for part in project_rows(rows, head)])
            dead[modality] = [len(own), len(own) - len(torch.unique(used))]
    say(f"computing: map{', by UMAP, which is compiled first' if layout == 'umap' else ''}")
    positions = map_positions(features, drawn, layout=layout, seed=seed)
    say("computing: agreement of pairs")
    unseen = unseen_disagreement(halves, seed=seed) if halves and aligned else None
    distance, loss = unseen or disagreement(features, scale=scale, seed=seed)
    say("computing: near-duplicates")
    duplicates, likeness, compared = find_duplicates(halves or features, pairs, seed=seed)
    return Atlas(
        captioned=features.captioned.numpy(),
        rows=features.rows.numpy(),
        drawn=drawn.numpy(),
        image_map_position=positions["image"],
        text_map_position=positions["text"],
        distance=distance.numpy(),
        loss=loss.numpy(),
        duplicates=duplicates.numpy(),
        duplicate_likeness=likeness.numpy(),
        number=number,
        space="features" if heads is None else "projections",
        layout=layout,
        compared=compared,
        run_prototypes=dead,
        unseen=unseen is not None,
        **groups,
    )


def normalize(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return F.normalize(rows.float(), dim=1)


def project_rows(
    rows: Float[Tensor, "n d"], head: Callable[[Tensor], Tensor] | None
) -> Iterator[Float[Tensor, "b p"]]:
    """Unit-norm rows of the space that is clustered, some thousands at a time."""
    for part in torch.split(rows, CHUNK):
        yield normalize(part if head is None else head(part.float()))


def cluster_rows(
    rows: Float[Tensor, "n d"], head: Callable[[Tensor], Tensor] | None, *, number: int, seed: int
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """The prototype of each row, and the cosine to its centroid."""
    fitted = torch.tensor(evenly_spaced(len(rows), min(len(rows), FITTED_ROWS), seed))
    sample = torch.cat(list(project_rows(rows[fitted], head)))
    centroids = kmeans(sample, number, iterations=ITERATIONS, seed=seed).centroids
    assigned, similarity = [], []
    for part in project_rows(rows, head):
        numbers = nearest(part, centroids)[0]
        assigned.append(numbers)
        similarity.append((part * normalize(centroids)[numbers]).sum(1))
    return torch.cat(assigned), torch.cat(similarity)


def map_positions(
    features: Features, drawn: Int[Tensor, " m"], *, layout: Layout, seed: int
) -> dict[Modality, Array]:
    """Where images and texts lie on one map of both, fitted to the pairs that are drawn.

    The features of images and of texts lie in two clouds apart, so a map of all of them shows the
    gap and not what they mean. Therefore each modality is centred at its own mean first, and the
    map is fitted to pairs: to the mean of a pair's image and text. An image then lies where the
    pairs of the images nearest to it lie, itself the first; and likewise a text.
    """
    means = {m: normalize(getattr(features, m)[drawn]).mean(0) for m in MODALITIES}

    def centre(rows: Tensor, modality: Modality) -> Tensor:
        return normalize(normalize(rows) - means[modality])

    drawn_rows = {m: centre(getattr(features, m)[drawn], m) for m in MODALITIES}
    fitted = normalize(drawn_rows["image"] + drawn_rows["text"])
    if layout == "pca":
        from sklearn.decomposition import PCA

        solver = "randomized" if fitted.shape[1] > 50 else "full"
        flat = PCA(2, svd_solver=solver, random_state=0).fit(fitted.numpy())
    else:
        on_map = torch.from_numpy(umap_positions(fitted, seed=seed))

    positions = {}
    for modality in MODALITIES:
        parts = []
        for rows in torch.split(getattr(features, modality), CHUNK):
            rows = centre(rows, modality)
            if layout == "pca":
                parts.append(flat.transform(rows.numpy()))
                continue
            cosine, near = (rows @ drawn_rows[modality].T).topk(min(NEAR, len(drawn)), dim=1)
            weights = torch.softmax(cosine / SOFTNESS, dim=1)
            parts.append((on_map[near] * weights.unsqueeze(2)).sum(1).numpy())
        positions[modality] = np.concatenate(parts).astype(np.float32)
    return positions


def umap_positions(rows: Float[Tensor, "n d"], *, seed: int) -> Array:
    """Two coordinates of each unit-norm row by UMAP. A terminal shows how far it is.

    The exact neighbours are computed here: UMAP's search takes longer to compile than all the rest
    takes.
    """
    if bool((rows == rows[0]).all()):  # UMAP would scale by their spread
        return np.zeros((len(rows), 2), np.float32)
    if len(rows) == 2:  # of which UMAP makes no graph
        return np.array([[-1, 0], [1, 0]], np.float32)
    import umap

    few = min(15, len(rows))
    neighbours = [(part @ rows.T).topk(few, dim=1) for part in torch.split(rows, CHUNK)]
    cosine = torch.cat([part.values for part in neighbours])
    near = torch.cat([part.indices for part in neighbours])
    # UMAP expects each row as its first neighbour, also among equal rows.
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
    with warnings.catch_warnings():  # that UMAP cannot map other rows later
        warnings.simplefilter("ignore")
        on_map: Array = reducer.fit_transform(rows.numpy()).astype(np.float32)
    return on_map


def disagreement(
    features: Features, *, scale: float, seed: int
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """One minus the cosine of each pair's image and text, and its InfoNCE among other pairs.

    The loss is the mean of both directions, against at most 1,024 pairs that are drawn evenly.
    """
    total = len(features.rows)
    others = torch.tensor(evenly_spaced(total, min(total, OTHERS), seed))
    other_images, other_texts = normalize(features.image[others]), normalize(features.text[others])
    distance, loss = [], []
    for rows in torch.split(torch.arange(total), CHUNK):
        image, text = normalize(features.image[rows]), normalize(features.text[rows])
        cosine = (image * text).sum(1)
        is_self = others.unsqueeze(0) == rows.unsqueeze(1)
        both = []
        for one, other in ((image, other_texts), (text, other_images)):
            logits = (scale * one @ other.T).masked_fill(is_self, float("-inf"))
            logits = torch.cat([logits, scale * cosine.unsqueeze(1)], dim=1)
            both.append(logits.logsumexp(1) - scale * cosine)
        distance.append(1 - cosine)
        loss.append((both[0] + both[1]) / 2)
    return torch.cat(distance), torch.cat(loss)


def unseen_disagreement(
    halves: Features, *, seed: int
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]] | None:
    """The same by heads in closed form that were fitted to pairs of other images; the loss is among
    pairs that these heads have not seen either.

    A model that was trained on a wrong pair has learned it, and finds that it fits. Pairs of one
    caption may be apart: those with other images tell what it means.

    Returns:
        None if there are too few images to fit heads.
    """
    images = equal_rows(halves.image)
    if len(torch.unique(images)) < LEAST_IMAGES:
        return None
    distance, loss = torch.zeros(2, len(images))
    captions = halves.text if halves.captions is None else halves.captions
    counts = torch.ones_like(images) if halves.counts is None else halves.counts
    progress, done = Progress("agreement of pairs", len(images)), 0
    for rows, image, text in out_of_fold(halves.image, captions, counts, images, seed=seed):
        fold = Features(captioned=rows, rows=rows, image=image, text=text)
        distance[rows], loss[rows] = disagreement(fold, scale=USUAL_SCALE, seed=seed)
        done += len(rows)
        progress.update(done)
    return distance, loss


def equal_rows(features: Float[Tensor, "n d"]) -> Int[Tensor, " n"]:
    """A number for each row from 0 on, in order of appearance, the same for equal rows.

    Copies of an image may differ in the last bits, if they were encoded in other batches. Along a
    line they are still near each other, with few other rows in between.
    """
    rows, width = features.float(), features.shape[1]
    along = rows @ torch.randn(width, LINES, generator=torch.Generator().manual_seed(0))
    most, order = EQUAL * rows.norm(dim=1), torch.argsort(along[:, 0])
    edges = [torch.zeros(2, 0, dtype=torch.long)]
    for step in range(1, min(ALONG, len(rows) - 1) + 1):
        one, other = order[:-step], order[step:]
        near = (along[other] - along[one]).norm(dim=1) <= APART * most[other]
        for pairs in torch.split(torch.stack([one[near], other[near]]), CHUNK, dim=1):
            equal = (rows[pairs[0]] - rows[pairs[1]]).norm(dim=1) <= most[pairs[1]]
            edges.append(pairs[:, equal])
    groups = connect(torch.cat(edges, dim=1).numpy().T, len(rows))
    numbers: dict[int, int] = {}
    return torch.tensor([numbers.setdefault(group, len(numbers)) for group in groups.tolist()])


def connect(pairs: Array, number: int) -> Array:
    """The group `(number,)` of each number; pairs `(p, 2)` join them, also through others."""
    graph = coo_array((np.ones(len(pairs), np.int8), tuple(pairs.T)), (number, number))
    groups: Array = connected_components(graph, directed=False)[1]
    return groups


def all_but_first(pairs: Iterable[Sequence[int]]) -> set[int]:
    """The numbers that pairs join, directly or through others, except the lowest of each group.

    >>> sorted(all_but_first([(0, 2), (1, 2), (5, 7)]))
    [1, 2, 7]
    """
    numbers, places = np.unique(np.array(list(pairs), np.int64).reshape(-1, 2), return_inverse=True)
    groups = connect(places.reshape(-1, 2), len(numbers))
    first = np.unique(groups, return_index=True)[1]
    return {*np.delete(numbers, first).tolist()}


def find_duplicates(
    features: Features, pairs: ExploredPairs | None, *, seed: int
) -> tuple[Int[Tensor, "p 2"], Float[Tensor, " p"], int]:
    """Near-duplicate images, how alike they are, and among how many images they were looked for.

    Where several pairs show an image, it is compared once, as that of the first of them. An encoder
    may not tell left from right, so pixels decide about what it proposes.
    """
    total, data_rows = len(features.rows), features.rows.numpy()
    images = np.array(evenly_spaced(total, min(total, HASHED_PAIRS), seed))
    if pairs is not None:
        first = np.unique(pairs.hash_images(data_rows[images]), return_index=True)[1]
        images = images[np.sort(first)]
    images = images[evenly_spaced(len(images), min(len(images), COMPARED_ROWS), seed)]
    compared = torch.from_numpy(images)
    near, values = near_duplicates(features.image[compared])
    near = compared[near]
    if pairs is not None:
        both = data_rows[near.numpy()].tolist()
        values = torch.tensor([pairs.correlate_images(*rows) for rows in both])
        order = values.argsort(descending=True, stable=True)
        order = order[values[order] >= LEAST_ALIKE]
        near, values = near[order], values[order]
    return near, values, len(compared)


def near_duplicates(
    features: Float[Tensor, "n d"], *, batch: int = 512
) -> tuple[Int[Tensor, "p 2"], Float[Tensor, " p"]]:
    """Pairs of rows of a cosine from 0.97 on, the most similar first, at most 500.

    Each row stands with its nearest other row only.
    """
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


@dataclass(frozen=True, kw_only=True)
class Prototype:
    """One group of a modality.

    Attributes:
        tightness: Mean cosine of its members to its centroid.
        agreement: Share of its members whose partners are together in one prototype of the other
            modality, `partner`.
    """

    number: int
    modality: str
    size: int
    tightness: float
    agreement: float
    partner: int


def list_prototypes(atlas: Atlas, modality: Modality) -> list[Prototype]:
    """The prototypes of a modality by number, empty ones included."""
    assigned = atlas.prototype(modality)
    sizes = np.bincount(assigned, minlength=atlas.number)
    sums = np.bincount(assigned, atlas.similarity(modality), minlength=atlas.number)
    together = count_together(assigned, atlas.prototype(OTHER[modality]), atlas.number)
    # The first entry of each row is its largest, and of equal ones that of the lowest column.
    order = np.lexsort((together.col, -together.data, together.row))
    rows, first = np.unique(together.row[order], return_index=True)
    partners, shared = np.zeros((2, atlas.number), np.int64)
    partners[rows], shared[rows] = together.col[order][first], together.data[order][first]
    return [
        Prototype(
            number=number,
            modality=modality,
            size=int(sizes[number]),
            tightness=float(sums[number] / max(1, sizes[number])),
            agreement=float(shared[number] / max(1, sizes[number])),
            partner=int(partners[number]),
        )
        for number in range(atlas.number)
    ]


def count_together(one: Array, other: Array, number: int) -> coo_array:
    """How many pairs are in each two groups `(number, number)`."""
    ones = np.ones(len(one), np.int64)
    return coo_array((ones, (one, other)), (number, number)).tocsr().tocoo()


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What one model groups differently from another, in one modality.

    Groups of both are matched one to one so that the most pairs stay.

    Attributes:
        pairs: Positions in the two atlases of the pairs that moved `(p, 2)`, those of the largest
            movements first.
        groups: The group of each in the first model and in the second `(p, 2)`.
        flows: The movements, the largest first: number of pairs, group in the first model, and in
            the second `(f, 3)`.
        common: Pairs in both atlases.
    """

    pairs: Array
    groups: Array
    flows: Array
    common: int


def find_moved(first: Atlas, second: Atlas, modality: str) -> Moved:
    """The pairs that two models on the same data put into groups that do not match."""
    _, one, other = np.intersect1d(first.rows, second.rows, assume_unique=True, return_indices=True)
    number = max(first.number, second.number)
    before, after = first.prototype(modality)[one], second.prototype(modality)[other]
    changed = change_groups(before, after, number)
    pairs = np.stack([one, other], axis=1)[changed]
    groups = np.stack([before, after], axis=1)[changed].astype(np.int64)
    ways, way, counts = np.unique(groups @ (number, 1), return_inverse=True, return_counts=True)
    order = np.lexsort((way, -counts[way]))
    flows = np.stack([counts, ways // number, ways % number], axis=1)
    return Moved(
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
    again, _ = cluster_rows(getattr(features, modality), head, number=atlas.number, seed=1)
    return float(change_groups(atlas.prototype(modality), again.numpy(), atlas.number).mean())


def change_groups(before: Array, after: Array, number: int) -> Array:
    """Whether each pair `(n,)` leaves its group, if groups are matched so that the most stay."""
    together = count_together(before, after, number).toarray()
    rows, columns = linear_sum_assignment(together, maximize=True)
    match = np.empty(number, np.int64)
    match[rows] = columns
    changed: Array = match[before] != after
    return changed


def write_atlas(path: Path, atlas: Atlas) -> None:
    """Write an atlas, and beside it its numbers and the checksum of the file."""
    values = {entry.name: getattr(atlas, entry.name) for entry in fields(atlas)}
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    facts = {name: value for name, value in values.items() if name not in arrays}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as scratch, scratch.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    facts["file"] = file_checksum(path)
    write_atomically(path.with_suffix(".json"), to_json(sealed(facts)))


def read_atlas(path: Path) -> Atlas | None:
    """An atlas that `write_atlas` wrote; None if it is missing or damaged."""
    try:
        facts = read_sealed(path.with_suffix(".json"))
        if facts.pop("file") != file_checksum(path):
            return None
        with np.load(path) as arrays:
            return Atlas(**arrays, **facts)
    except (OSError, ValueError, KeyError, TypeError, EOFError, AttributeError):
        return None


def atlas_path(folder: Path, *parts: object) -> Path:
    """The file of an atlas that is made of these parts."""
    return folder / f"{checksum(json.dumps([FORM, *map(str, parts)]).encode())}.npz"
