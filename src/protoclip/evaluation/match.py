"""Which pretrained encoders fit each other, measured on pairs before anything is trained.

They have never met. Each encodes the images or the captions of the same pairs once. Then every
image encoder is compared with every text encoder, by pure functions of features.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from protoclip.config import SEVERAL, EngineName, ImageTowerConfig, ModelConfig, TextTowerConfig
from protoclip.data.loader import Item, read_sample
from protoclip.data.pairs import BadSample, Pairs, Sample, SampleStream
from protoclip.data.split import connect_rows
from protoclip.data.summary import draw_samples
from protoclip.data.transforms import EvaluationTransform
from protoclip.encode.encoder import Encoder, freeze, image_side, open_encoder, text_side
from protoclip.encode.linear_maps import canonical_projections, choose_columns, moments_of_images
from protoclip.encode.run import encode_missing
from protoclip.encode.store import FULL, Store, hash_ids
from protoclip.evaluation import retrieval
from protoclip.evaluation.datasets import match_captions
from protoclip.evaluation.geometry import nearest_others
from protoclip.evaluation.metrics import interval, sum_by_group
from protoclip.files import checksum
from protoclip.models.joined import AUTO, name_layers, read_columns
from protoclip.models.loading import Pooling
from protoclip.models.projections import FrozenEncoders
from protoclip.models.protoclip import autocast, image_input, resolve_encoding, seed_weights
from protoclip.models.start import names_model, small_start
from protoclip.models.timm import PUBLISHED
from protoclip.progress import Progress
from protoclip.prototypes.kmeans import kmeans
from protoclip.prototypes.targets import agreement
from protoclip.terminal import without_secrets

RECALL_AT = 10
LEAST = 30  # pairs of which no two share an image or a caption; half of them are for evaluation
PAIRS_PER_GROUP, ITERATIONS = 10, 20  # of K-means, as in training

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Pairs of a source. Equal images are one, and equal captions."""

    images: Sequence[Item]  # the row of each, or the sample that a stream gave
    contents: Sequence[str]  # a checksum of each image
    captions: tuple[str, ...]
    image_of_pair: Int[Tensor, " p"]
    text_of_pair: Int[Tensor, " p"]
    skipped: int  # pairs that could not be read
    reason: str  # why the first of these could not


@dataclass(frozen=True, kw_only=True)
class Side:
    """What an encoder makes of the images, or of the captions; NaN where one cannot be read."""

    name: str
    features: Float[Tensor, "n d"]
    per_second: float | None  # how many it encoded; None if all that can be read were stored
    options: Mapping[str, Int[Tensor, " c"]]  # columns that `align` chooses among, by their layers
    reason: str = ""  # why the first that cannot be read could not


class Space(NamedTuple):
    """An encoder's features by pair; of the pairs that share nothing also those of its last layer,
    their nearest others and their groups."""

    side: Side
    pairs: Float[Tensor, "p d"]
    distinct: Float[Tensor, "n d"]
    nearest: Int[Tensor, "n k"]
    groups: Int[Tensor, " n"]


def match(
    images: Sequence[str],
    texts: Sequence[str],
    source: Pairs | SampleStream,
    *,
    pairs: int = 4000,
    seed: int = 0,
    pooling: Pooling | None = None,
    batch_size: int = 64,
    cache: Path | None = None,
    device: torch.device,
    engine: EngineName = "auto",
) -> list[Record]:
    """Hold each image encoder against each text encoder.

    Mutual neighbours, CKA and groups are those of pairs of which no two share an image or a
    caption; the first of those that do is taken.

    Args:
        images, texts: Encoders, as `open_encoder` takes them.
        pairs: How many pairs to draw, evenly; of a stream the first ones. Of several captions of a
            sample the first is taken.
        seed: Of the draw, of K-means and of the split that fits and evaluates.
        pooling: How a Hugging Face model's tokens become one feature; unset, as its files say.
        cache: Folder in which features are stored by content; unset, none are.
        engine: As `encode.engine`.

    Returns:
        A record for each image encoder and text encoder, the highest `recall@10` first; also for
        the first two of each as one. docs/match.md lists what is in it.

    Raises:
        ValueError: An encoder cannot be opened, which is seen before any encodes, or its features
            are not finite; or the pairs that can be read are too few.
    """
    if pairs < LEAST:
        raise ValueError(f"--pairs: {pairs} are too few; at least {LEAST}")

    open_any = partial(open_encoder, pooling=pooling or "mean", device=device)

    def open_one(name: str, modality: str) -> Encoder:
        encoder, setting = None, f"--{modality}s"
        # `open_encoder` tells what is wrong with an encoder, or is not installed.
        with suppress(ValueError, ImportError):
            encoder = open_layers(name, modality, pooling, device)
        if encoder is None:
            encoder = open_any(name, modality=modality, setting=setting)
        return replace(encoder, name=without_secrets(name), engine=engine)

    image_encoders = {name: open_one(name, "image") for name in dict.fromkeys(images)}
    text_encoders = {name: open_one(name, "text") for name in dict.fromkeys(texts)}
    drawn = draw(source, pairs, seed)

    def read_image(number: int) -> Sample:
        return read_sample(source, drawn.images[number])

    def read_caption(number: int) -> Sample:
        captions = drawn.captions[number : number + 1]
        return Sample(sample_id=str(number), image=b"", captions=captions, where=source.name)

    image_spaces = [
        encode(name, encoder, drawn.contents, read_image, batch_size, cache)
        for name, encoder in image_encoders.items()
    ]
    can_be_read = torch.stack([side.features.isfinite().all(dim=1) for side in image_spaces]).all(0)
    is_usable = can_be_read[drawn.image_of_pair]
    reasons = (side.reason for side in image_spaces if side.reason)
    drawn = replace(
        drawn,
        image_of_pair=drawn.image_of_pair[is_usable],
        text_of_pair=drawn.text_of_pair[is_usable],
        skipped=drawn.skipped + int((~is_usable).sum()),
        reason=drawn.reason or next(reasons, ""),
    )
    number = len(torch.unique(group_pairs(drawn.image_of_pair, drawn.text_of_pair)))
    if number < LEAST:
        reason = f", since {drawn.skipped} cannot be read ({drawn.reason})" * bool(drawn.reason)
        raise ValueError(
            f"{source.name}: {number} of the drawn pairs share no image and no caption{reason}: "
            f"too few, at least {LEAST} are needed; raise --pairs, or name other data"
        )
    text_spaces = [
        encode(name, encoder, drawn.captions, read_caption, batch_size, cache)
        for name, encoder in text_encoders.items()
    ]
    return measure(join_first(image_spaces), join_first(text_spaces), drawn, seed)


def open_layers(
    name: str, modality: str, pooling: Pooling | None, device: torch.device
) -> Encoder | None:
    """A model of timm or a text model as `align` reads it, with the layers that it chooses among.

    None for towers of other models.
    """
    kind, _, model = name.partition(":")
    image, text = ImageTowerConfig(), TextTowerConfig()
    if modality == "image" and kind == "timm":
        model, _, file = model.partition("/")
        image = ImageTowerConfig(name=model, weights=file or PUBLISHED, joined_layers=AUTO)
    elif modality == "text" and pooling != "pooler" and not names_model("text", name):
        text = TextTowerConfig(name=name, pooling=pooling, joined_layers=AUTO)
    else:
        return None
    start = small_start(ModelConfig(image=image, text=text))
    context = autocast(resolve_encoding("auto", device), device)
    with seed_weights(0):
        towers = freeze(start.build_towers(), device)
    if modality == "text":
        return text_side(FrozenEncoders(towers), start.tokenizer(), autocast=context)
    encoders = FrozenEncoders(SimpleNamespace(visual=towers.visual, text=nn.Identity()))
    return image_side(encoders, EvaluationTransform(**image_input(towers)), autocast=context)


def draw(source: Pairs | SampleStream, number: int, seed: int) -> Drawn:
    """Draw pairs, and read them to see which images are equal."""

    def read(item: Item) -> tuple[str, str, str]:
        sample = read_sample(source, item)
        return sample.sample_id, checksum(sample.image), sample.captions[0]

    if isinstance(source, Pairs):
        number = min(number, len(source))
    image_of: dict[str, int] = {}
    text_of: dict[str, int] = {}
    images, seen, bad = list[Item](), set[str](), set[str]()
    of_pairs: dict[tuple[int, int], None] = {}
    reason = ""
    progress = Progress(f"read {source.name}", number)
    for done, (item, facts) in enumerate(draw_samples(source, number, read, seed=seed), 1):
        progress.update(done)
        if isinstance(facts, BadSample):
            bad.add(facts.sample_id)  # a stream gives samples again
            reason = reason or str(facts)
            continue
        sample_id, content, caption = facts
        if content not in image_of:
            if sample_id in seen:
                raise ValueError(f"{source.name}: sample id '{sample_id}' is not unique")
            images.append(item)
        seen.add(sample_id)
        image = image_of.setdefault(content, len(image_of))
        of_pairs[image, text_of.setdefault(caption, len(text_of))] = None
    numbers = torch.tensor([*of_pairs], dtype=torch.long).reshape(-1, 2)
    return Drawn(
        images=images,
        contents=[*image_of],
        captions=(*text_of,),
        image_of_pair=numbers[:, 0],
        text_of_pair=numbers[:, 1],
        skipped=len(bad),
        reason=reason,
    )


def encode(
    name: str,
    encoder: Encoder,
    contents: Sequence[str],
    read: Callable[[int], Sample],
    batch_size: int,
    cache: Path | None,
) -> Side:
    """Encode each item that is not stored; `contents` tell items apart in any data."""
    folder = None if cache is None else cache / encoder.key()
    store, hashes = Store(folder, dtype=FULL, is_optional=True), hash_ids(contents)
    missing, started = int((~store.has(hashes)).sum()), time.monotonic()
    bad = encode_missing(store, encoder, hashes, read, batch_size=batch_size)
    seconds, encoded = max(time.monotonic() - started, 1e-9), missing - len(bad)
    features = torch.full((len(hashes), encoder.width), torch.nan)
    is_stored = store.has(hashes)
    if is_stored.any():
        features[is_stored] = torch.from_numpy(store.read(store.find(hashes[is_stored])))
    module, width = encoder.module, encoder.width
    layers = getattr(module, "options", [[]])  # those of a `JoinedTower`
    return Side(
        name=name,
        features=features,
        options={name_layers(option): read_columns(module, width, option) for option in layers},
        per_second=encoded / seconds if encoded else None,
        reason=str(next(iter(bad.values()), "")),
    )


def join_first(sides: Sequence[Side]) -> list[Side]:
    """The encoders, and the first two of them as one where `align` joins such."""
    both = [side for side in sides if "" not in side.options][:2]
    if len(both) < 2:
        return [*sides]
    one, other = both
    options = zip(one.options.items(), other.options.items(), strict=False)
    rates = [1 / side.per_second for side in both if side.per_second]
    joined = Side(
        name=SEVERAL.join([one.name, other.name]),
        features=torch.cat([one.features, other.features], dim=1),
        per_second=1 / sum(rates) if len(rates) == 2 else None,
        options={
            SEVERAL.join([layers, more]): torch.cat([of, one.features.shape[1] + others])
            for (layers, of), (more, others) in options
        },
    )
    return [*sides, joined]


def measure(images: Sequence[Side], texts: Sequence[Side], drawn: Drawn, seed: int) -> list[Record]:
    """Measure each image encoder with each text encoder, from their features."""
    groups = group_pairs(drawn.image_of_pair, drawn.text_of_pair)
    distinct = torch.from_numpy(np.sort(np.unique(groups.numpy(), return_index=True)[1]))
    captions = [drawn.captions[number] for number in drawn.text_of_pair.tolist()]
    progress = Progress("match", len(images) + len(texts) + len(images) * len(texts))
    spaces: dict[str, list[Space]] = {"image": [], "text": []}
    for modality, sides, numbers in (
        ("image", images, drawn.image_of_pair),
        ("text", texts, drawn.text_of_pair),
    ):
        for side in sides:
            features = side.features[numbers]
            rows = features[distinct][:, next(iter(side.options.values()))]
            number = max(2, len(rows) // PAIRS_PER_GROUP)
            groups = kmeans(rows, number, iterations=ITERATIONS, seed=seed).assignments
            spaces[modality].append(Space(side, features, rows, nearest_others(rows), groups))
            progress.update(sum(map(len, spaces.values())))
    records: list[Record] = []
    for image, text in product(spaces["image"], spaces["text"]):
        options = image.side.options, text.side.options
        pairs = image.pairs, text.pairs, drawn.image_of_pair, captions
        ways = {
            "agreement/text_from_image": agreement(image.groups, text.groups),
            "agreement/image_from_text": agreement(text.groups, image.groups),
        }
        records.append(
            {
                "image": image.side.name,
                "text": text.side.name,
                **canonical_recall(*pairs, options=options, seed=seed),
                "mutual_neighbours": shared_neighbours(image.nearest, text.nearest),
                "cka": linear_cka(image.distinct, text.distinct),
                "agreement": sum(ways.values()) / 2,
                **ways,
                "images_per_second": image.side.per_second,
                "captions_per_second": text.side.per_second,
                "pairs": len(captions),
                "apart": len(distinct),
                "skipped": drawn.skipped,
            }
        )
        progress.update(len(images) + len(texts) + len(records))
    return sorted(records, key=lambda record: -record[f"recall@{RECALL_AT}"])


def group_pairs(
    image_of_pair: Int[Tensor, " p"], text_of_pair: Int[Tensor, " p"]
) -> Int[Tensor, " p"]:
    """The group of each pair, from 0: pairs that share an image or a caption are in one, and so are
    those that further pairs join."""
    if not len(image_of_pair):
        return image_of_pair
    texts = text_of_pair + image_of_pair.max() + 1
    edges = torch.stack([image_of_pair, texts]).numpy()
    components = connect_rows(np.arange(edges.max() + 1), edges)
    numbers = torch.from_numpy(components)[image_of_pair]
    groups: Tensor = torch.unique(numbers, return_inverse=True)[1]
    return groups


def draw_half(groups: Int[Tensor, " p"], seed: int) -> Bool[Tensor, " p"]:
    """Half of the rows, drawn by group: the largest groups first, each to the smaller side."""
    sizes = torch.bincount(groups)
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed))
    order = order[torch.argsort(sizes[order], descending=True, stable=True)]
    chosen, balance = torch.zeros(len(sizes), dtype=torch.bool), 0
    for group, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        chosen[group] = balance <= 0
        balance += size if balance <= 0 else -size
    return chosen[groups]


def shared_neighbours(one: Int[Tensor, "n k"], other: Int[Tensor, "n k"]) -> float:
    """Share of the neighbours in one space that are neighbours in the other too, in [0, 1].

    The mutual k-NN alignment of Huh et al. 2024 (arXiv 2405.07987); k / (n - 1) by chance.
    """
    return float((one.unsqueeze(2) == other.unsqueeze(1)).any(dim=2).double().mean())


def linear_cka(one: Float[Tensor, "n d"], other: Float[Tensor, "n e"]) -> float:
    """Linear CKA (Kornblith et al. 2019, arXiv 1905.00414) of the same samples in two spaces.

    1 if they are equal up to rotation and scale, about 0 by chance: it is made of unbiased
    estimates of HSIC (Song et al. 2012), or wide spaces would seem alike. 0 if all rows of a space
    are equal. Needs four rows or more.
    """
    rows, others = (space.double() - space.double().mean(dim=0) for space in (one, other))
    between = unbiased_hsic(rows, others)
    within = unbiased_hsic(rows, rows) * unbiased_hsic(others, others)
    return between / within**0.5 if within > 0 else 0.0


def unbiased_hsic(rows: Float[Tensor, "n d"], others: Float[Tensor, "n e"]) -> float:
    """HSIC of two linear kernels times n (n - 3), from centred rows: no matrix of n times n."""
    number = len(rows)
    norms, other_norms = rows.square().sum(dim=1), others.square().sum(dim=1)
    joint = (rows.T @ others).square().sum()
    same = (norms @ other_norms) * number / (number - 2)
    means = norms.sum() * other_norms.sum() / ((number - 1) * (number - 2))
    return float(joint - same + means)


def canonical_recall(
    images: Float[Tensor, "p d"],
    texts: Float[Tensor, "p e"],
    image_of_pair: Int[Tensor, " p"],
    captions: Sequence[str],
    *,
    options: Sequence[Mapping[str, Tensor]] = (),
    seed: int = 0,
) -> Record:
    """How often the closed form that `align` begins with finds the partner of an image or a text.

    `canonical_projections` of half of the pairs lead both spaces into one. There an image of the
    other half looks for its text, and a text for its image. Pairs that share an image or a caption
    are in one half. The fitted half chooses among `options` for the columns of both spaces.

    Returns:
        `recall@10/text_to_image` and `recall@10/image_to_text` as `retrieval` defines them, their
        mean `recall@10`, its 95% interval, about what that is by chance; what was chosen, as
        `image_layers` and `image_width`, and of texts; and `judged`, the number of evaluated pairs.
    """
    number_of: dict[str, int] = {}
    text_of_pair = torch.tensor([number_of.setdefault(text, len(number_of)) for text in captions])
    groups = group_pairs(image_of_pair, text_of_pair)
    is_tested = draw_half(groups, seed)
    counts = torch.ones(int((~is_tested).sum()), dtype=torch.long)
    one, other = options or [{"": torch.arange(space.shape[1])} for space in (images, texts)]
    columns = [*one.values()], [*other.values()]
    choice, _ = choose_columns(images[~is_tested], texts[~is_tested], counts, columns)
    images, texts = images[:, columns[0][choice[0]]], texts[:, columns[1][choice[1]]]
    moments = moments_of_images(images[~is_tested], texts[~is_tested], counts)
    maps = canonical_projections(moments)
    (rows,) = is_tested.nonzero(as_tuple=True)
    tested = match_captions(
        [(captions[pair],) for pair in rows.tolist()],
        [""] * len(rows),
        content=image_of_pair[rows].tolist(),
    )
    pair_of = {captions[pair]: pair for pair in rows.tolist()}
    text_rows = torch.tensor([pair_of[text] for text in tested.texts])
    image_features, text_features = (
        F.normalize(features.double() @ projection, dim=1)
        for features, projection in zip(
            (images[rows[tested.rows]], texts[text_rows]), maps, strict=True
        )
    )
    image_ranks, text_ranks = retrieval.retrieval_ranks(image_features, text_features, tested)
    recalls, influence = dict[str, float](), np.zeros(int(groups.max()) + 1)
    for way, ranks, pairs in (
        ("text_to_image", text_ranks, text_rows),
        ("image_to_text", image_ranks, rows[tested.rows]),
    ):
        recalls[way] = retrieval.recall_at(ranks, RECALL_AT)
        parts = ((ranks < RECALL_AT).double() - recalls[way]) / len(ranks) / 2
        influence += sum_by_group(parts.numpy(), groups[pairs].numpy(), len(influence))
    influence, recall = influence[np.unique(groups[rows])], sum(recalls.values()) / len(recalls)
    candidates = [len(torch.unique(n[is_tested])) for n in (image_of_pair, text_of_pair)]
    by_chance = sum(min(1.0, RECALL_AT / number) for number in candidates) / len(candidates)
    return {
        f"recall@{RECALL_AT}": recall,
        f"recall@{RECALL_AT}/interval": interval(recall, influence),
        **{f"recall@{RECALL_AT}/{way}": value for way, value in recalls.items()},
        f"recall@{RECALL_AT}/by_chance": by_chance,
        "judged": len(rows),
        "image_layers": [*one][choice[0]],
        "text_layers": [*other][choice[1]],
        "image_width": images.shape[1],
        "text_width": texts.shape[1],
    }
