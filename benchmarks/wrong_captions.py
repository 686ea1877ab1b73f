"""How many planted wrong captions `protoclip data score` finds, beside cleanlab if it is there.

    python benchmarks/wrong_captions.py SOURCE [--root FOLDER] [--pairs 6000]
        [--image NAME --weights FILE] [--text NAME]

In each of three draws one image in twenty gets the captions of another one; with `--single` it gets
one of them, in the place of its first. Images are ordered by
the caption that agrees least, and by the mean of theirs. cleanlab scores labels and no captions, so
it gets groups of captions as labels (K-means, a group for 100 images), and for these probabilities
out of fold, by linear probes of the same image features. A row has the precision among the first
1, 2 and 5% and the average precision, in percent; the last one how long 100,000 pairs take.
"""

import argparse
import time
from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score

from protoclip.config import Config, DataConfig
from protoclip.data.pairs import evenly_spaced
from protoclip.data.sources import open_samples
from protoclip.encode.linear_maps import deal
from protoclip.evaluation.probes import best_linear_probe
from protoclip.explore.atlas import cross_fit_disagreement
from protoclip.explore.score import CAPTIONS, encode_to_score
from protoclip.prototypes.kmeans import kmeans

SWAPPED, DRAWS, WIDTH = 0.05, 3, 128


def swap(
    captions: list[list[int]], seed: int, *, single: bool
) -> tuple[list[list[int]], np.ndarray]:
    """The captions with some swapped, and which images have wrong ones."""
    draws = np.random.default_rng(seed)
    chosen = draws.choice(len(captions), round(SWAPPED * len(captions)), replace=False)
    given, is_wrong = list(captions), np.zeros(len(captions), bool)
    for one, other in zip(chosen, np.roll(chosen, 1), strict=True):
        if not {*captions[one]} & {*captions[other]}:
            wrong = [captions[other][0], *captions[one][1:]] if single else captions[other]
            given[one], is_wrong[one] = wrong, True
    return given, is_wrong


def score_by_cleanlab(
    images: torch.Tensor, means: torch.Tensor, groups: torch.Tensor
) -> torch.Tensor:
    """The quality of each image's label, which is the group of its captions."""
    from cleanlab.rank import get_label_quality_scores

    number = max(2, len(means) // 100)
    labels = kmeans(F.normalize(means.float()), number, iterations=20, seed=0).assignments
    rows = F.normalize(images.float())
    rows = rows @ torch.pca_lowrank(rows, WIDTH)[2]
    probabilities = torch.full((len(rows), number), 1e-6)
    for fold in deal(groups, 0):
        others = torch.ones(len(rows), dtype=torch.bool)
        others[fold] = False
        probe = best_linear_probe(rows[others], labels[others])
        probabilities[fold[:, None], probe.classes] = probe.logits(rows[fold]).softmax(1).float()
    probabilities /= probabilities.sum(1, keepdim=True)
    return torch.from_numpy(get_label_quality_scores(labels.numpy(), probabilities.numpy()))


def describe(name: str, scores: list[torch.Tensor], wrong: list[np.ndarray]) -> None:
    """Print the mean over draws, and the lowest and highest average precision."""
    rows = []
    for quality, is_wrong in zip(scores, wrong, strict=True):
        order = np.argsort(quality.numpy(), kind="stable")
        firsts = [is_wrong[order[: round(p / 100 * len(order))]].mean() for p in (1, 2, 5)]
        rows.append([*firsts, average_precision_score(is_wrong, -quality.numpy())])
    values = 100 * np.array(rows)
    ends = f"[{values[:, 3].min():.1f}, {values[:, 3].max():.1f}]"
    print(f"{name:<28}", *(f"{value:6.1f}" for value in values.mean(0)), ends, flush=True)


def time_scores(pairs: int) -> tuple[float, float]:
    """Seconds, and those of processors, to score pairs of random features, as wide as the default
    encoders' two layers."""
    draws = torch.Generator().manual_seed(0)
    shared = torch.randn(pairs, 64, generator=draws)
    images, texts = (
        (shared @ torch.randn(64, width, generator=draws)).half() for width in (1600, 768)
    )
    every, started = torch.arange(pairs), (time.perf_counter(), time.process_time())
    compared = torch.tensor(evenly_spaced(pairs, min(pairs, CAPTIONS), 0))
    cross_fit_disagreement(images, texts, every, every, every, compared=compared, seed=0)
    return time.perf_counter() - started[0], time.process_time() - started[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("--root")
    parser.add_argument("--pairs", type=int, default=6000)
    parser.add_argument("--image", default="timm:efficientnet_lite0")
    parser.add_argument("--weights")
    parser.add_argument("--size", type=int)
    parser.add_argument("--text", default="minilm")
    parser.add_argument("--single", action="store_true", help="swap one caption alone")
    parser.add_argument("--time", type=int, default=0, help="pairs of random features to time")
    given = parser.parse_args()
    data = {"train": given.source} | ({"root": given.root} if given.root else {})
    samples = open_samples(Config(data=DataConfig(**data)))
    if len(samples) > given.pairs:
        samples = samples.subset(np.array(evenly_spaced(len(samples), given.pairs, 0)))
    image = {"name": given.image, "weights": given.weights, "size": given.size}
    image = {name: value for name, value in image.items() if value is not None}
    settings = {"data": data, "model": {"image": image, "text": {"name": given.text}}}
    encoded, images, texts = encode_to_score(samples, settings, torch.device("cpu"))
    first, listed = encoded.listing.first, encoded.listing.captions
    captions = [
        [*dict.fromkeys(listed[first[number] : first[number + 1]].tolist())]
        for number in encoded.good.at(np.arange(len(encoded)))
    ]
    groups = torch.arange(len(captions))
    print(f"{samples.name}: {len(captions):,} images, {sum(map(len, captions)):,} pairs")
    wrong, found = [], {"least agreement": [], "mean agreement": [], "cleanlab, on groups": []}
    for seed in range(DRAWS):
        given_captions, is_wrong = swap(captions, seed, single=given.single)
        wrong.append(is_wrong)
        counts = torch.tensor([*map(len, given_captions)])
        image_of_pair = groups.repeat_interleave(counts)
        text_of_pair = torch.tensor([text for several in given_captions for text in several])
        _, loss, _ = cross_fit_disagreement(
            images, texts, image_of_pair, text_of_pair, groups, seed=0
        )
        zeros = torch.zeros(len(captions))
        for name, way in (("least agreement", "amin"), ("mean agreement", "mean")):
            scores = zeros.scatter_reduce(0, image_of_pair, -loss, way, include_self=False)
            found[name].append(scores)
        if find_spec("cleanlab") and not given.single:
            means = torch.zeros(len(captions), texts.shape[1])
            means.index_add_(0, image_of_pair, texts[text_of_pair].float())
            found["cleanlab, on groups"].append(score_by_cleanlab(images, means, groups))
    print(
        f"{'ordered by':<28}", *(f"{name:>6}" for name in ("1%", "2%", "5%", "AP")), "AP of draws"
    )
    for name, scores in found.items():
        if scores:
            describe(name, scores, wrong)
    if given.time:
        seconds, processors = time_scores(given.time)
        print(
            f"{given.time:,} pairs: {seconds:.0f} s after encoding, {processors:.0f} of processors"
        )


if __name__ == "__main__":
    main()
