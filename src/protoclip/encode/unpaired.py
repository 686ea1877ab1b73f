"""Images and captions without partner, which join the pairs of `align` by optimal transport.

SOTAlign (arXiv 2602.23353) trains by the plan of transport. Here it counts in the closed form
alone, which found as much in a quarter of the time (docs/LOG.md).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from protoclip.config import Config, DataConfig
from protoclip.data.pairs import Pairs, evenly_spaced
from protoclip.data.sources import PairsView, open_samples
from protoclip.data.tables import read_texts
from protoclip.distributed.collectives import raise_on_all_ranks, rank0_first
from protoclip.encode.features import Encoder
from protoclip.encode.linear_maps import SecondMoments, canonical_projections
from protoclip.encode.rows import PairRows

FEWEST, MOST = 100, 2000  # pairs that gain by others (docs/LOG.md)
MOST_IMAGES, MOST_TEXTS = 2**12, 2**13  # that join them
TEMPERATURE, STEPS = 0.02, 60  # of the plan
WEIGHT = 0.4  # of an image, in pairs


def fit_with_unpaired(
    moments: SecondMoments,
    rows: PairRows,
    columns: Sequence[Int[Tensor, " c"]],
    encoder: Encoder,
    data: DataConfig,
) -> tuple[tuple[Tensor, Tensor], list[str]]:
    """The closed form of pairs together with `data.images` and `data.texts`, and notes. Collective.

    `moments` are of these `columns` of the features of the pairs' `rows`. Pairs out of fold have to
    find their partners better with what joins them, or it stays out.
    """
    if not FEWEST <= len(rows) <= MOST:
        gains = f"{FEWEST} to {MOST:,} pairs gain by images and captions without partner"
        notes = [f"data.images: no effect, since {gains}, and these are {len(rows):,}"]
        return canonical_projections(moments), notes
    images, (texts, notes) = raise_on_all_ranks(lambda: open_unpaired(data))
    encoded = encoder.encode_images(images, stage="data.images", project=False)
    if encoded.bad:
        notes.append(f"data.images: {len(encoded.bad)} cannot be used, such as {encoded.bad[0][1]}")
    of_texts = encoder.encode_texts(texts, stage="data.texts", project=False)
    x, y = encoded.features[:, columns[0]].float(), of_texts[:, columns[1]].float()
    options = [columns[0]], [columns[1]]

    def fit(pairs: SecondMoments) -> tuple[Tensor, Tensor]:
        return canonical_projections(pairs + transport(canonical_projections(pairs), x, y))

    alone, joined = rank0_first(
        lambda: [rows.choose_columns(options, by)[1][0, 0] for by in (None, fit)]
    )
    maps = (fit if joined < alone else canonical_projections)(moments)
    notes.append(
        f"data.images and data.texts: {len(x):,} images and {len(y):,} captions "
        f"{'join the pairs' if joined < alone else 'are left out'}: a partner out of fold is found "
        f"at rank {joined:.2f} on average with them, and at {alone:.2f} without"
    )
    return maps, notes


def open_unpaired(data: DataConfig) -> tuple[PairsView, tuple[list[str], list[str]]]:
    """The images of `data.images`, and the captions of `data.texts` with notes; of many, as many as
    join pairs, evenly spaced."""
    assert data.images is not None and data.texts is not None  # noqa: PT018
    own = DataConfig(train=data.images, root=data.root, allow_links=data.allow_links)
    images = open_samples(Config(data=own), needs_captions=False)
    if not isinstance(images, Pairs):
        raise ValueError("data.images: is a stream; name a folder, a table or local shards")
    texts, notes = read_texts(data.texts)
    chosen = evenly_spaced(len(texts), MOST_TEXTS, seed=0)
    view = PairsView([(images, evenly_spaced(len(images), MOST_IMAGES, seed=0))])
    return view, ([texts[number] for number in chosen], notes)


def transport(
    maps: tuple[Tensor, Tensor], images: Float[Tensor, "n q"], texts: Float[Tensor, "m r"]
) -> SecondMoments:
    """Second moments of images and texts that the plan of transport joins, by the cosines where
    `maps` lead them. An image counts `WEIGHT` of a pair, and has a share of every text."""
    led = [F.normalize(z @ m.to(z), dim=1) for z, m in zip((images, texts), maps, strict=True)]
    plan, samples = solve_transport(led[0] @ led[1].T), round(WEIGHT * len(images))
    x, y = images.double(), texts.double()
    return SecondMoments(
        image=x.T @ x * (samples / len(x)),
        text=y.T @ y * (samples / len(y)),
        cross=x.T @ (plan @ texts).double() * samples,
        sum_of_images=x.mean(0) * samples,
        sum_of_texts=y.mean(0) * samples,
        samples=samples,
    )


def solve_transport(cosines: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    """The plan of largest cosines and entropy, times `TEMPERATURE`, by Sinkhorn's algorithm: rows
    sum to 1/n and columns to 1/m."""
    kernel = ((cosines - cosines.amax(1, keepdim=True)) / TEMPERATURE).exp()
    least, (n, m) = torch.finfo(kernel.dtype).tiny, kernel.shape
    columns = kernel.new_full((m,), 1 / m)
    for _ in range(STEPS):
        rows = 1 / n / (kernel @ columns).clamp(min=least)
        columns = 1 / m / (kernel.T @ rows).clamp(min=least)
    return rows[:, None] * kernel * columns
