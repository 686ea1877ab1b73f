"""How many planted wrong captions `protoclip data score` finds, beside cleanlab if it is there.

    python benchmarks/wrong_captions.py SOURCE [--root FOLDER] [--pairs 6000]
        [--image NAME --weights FILE] [--text NAME] [--held 1000]

In each of three draws one image in twenty gets the captions of another one; with `--single` it gets
one of them, in the place of its first. Images are ordered by
the caption that agrees least, and by the mean of theirs. cleanlab scores labels and no captions, so
it gets groups of captions as labels (K-means, a group for 100 images), and for these probabilities
out of fold, by linear probes of the same image features. A row has the precision among the first
1, 2 and 5% and the average precision, in percent; the last one how long 100,000 pairs take.

With `--held` as many images keep their own captions and are left out. Heads in closed form are then
fitted to all other images, to those that `data score --keep 0.95` keeps, to as many drawn by
chance, and to those with right captions. A row has the text-to-image recall@10 among the held-out
images, and its gain over all with a 95% interval over draws and images.
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
from protoclip.encode.linear_maps import canonical_projections, deal, moments_of_images
from protoclip.evaluation.metrics import interval_of_difference
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


def find_held_out(
    images: torch.Tensor,
    texts: torch.Tensor,
    captions: list[list[int]],
    fitted: np.ndarray,
    held: np.ndarray,
) -> np.ndarray:
    """The share of each held-out image's captions that find it among the first ten, by heads in
    closed form that were fitted to other images."""
    counts = torch.tensor([len(captions[number]) for number in fitted])
    of_fitted = torch.tensor([text for number in fitted for text in captions[number]])
    maps = canonical_projections(moments_of_images(images[fitted], texts[of_fitted], counts))
    owner = torch.tensor([row for row, one in enumerate(held) for _ in captions[one]])
    of_held = torch.tensor([text for one in held for text in captions[one]])
    led_images = F.normalize(images[held].float() @ maps[0].float())
    cosines = F.normalize(texts[of_held].float() @ maps[1].float()) @ led_images.T
    found = (cosines > cosines.gather(1, owner[:, None])).sum(1) < 10
    shares = torch.zeros(len(held)).index_add_(0, owner, found.float())
    return (shares / torch.bincount(owner)).double().numpy()


def describe_gains(found: dict[str, list[np.ndarray]]) -> None:
    """Print the recall of each choice of training images, and its gain over all of them."""
    for name, shares in found.items():
        differences = np.array(shares) - np.array(found["all"])
        line = f"{name:<28} {100 * np.mean(shares):6.1f}"
        if name != "all":
            images = differences.shape[1]
            centred = differences - differences.mean(1, keepdims=True)
            influence = centred / np.sqrt(images * (images - 1))
            ends = interval_of_difference(differences.mean(1).tolist(), influence)
            said = "" if ends is None else f"[{100 * ends[0]:+.1f}, {100 * ends[1]:+.1f}]"
            line += f" {100 * differences.mean():+6.1f} {said}"
        print(line, flush=True)


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
    parser.add_argument("--held", type=int, default=0, help="images to measure heads on")
    parser.add_argument("--time", type=int, default=0, help="pairs of random features to time")
    given = parser.parse_args()
    data = {"train": given.source} | ({"root": given.root} if given.root else {})
    samples = open_samples(Config(data=DataConfig(**data)))
    if len(samples) > (most := given.pairs + given.held):
        samples = samples.subset(np.array(evenly_spaced(len(samples), most, 0)))
    image = {"name": given.image, "weights": given.weights, "size": given.size}
    image = {name: value for name, value in image.items() if value is not None}
    settings = {"data": data, "model": {"image": image, "text": {"name": given.text}}}
    encoded, images, texts = encode_to_score(samples, settings, torch.device("cpu"))
    first, listed = encoded.listing.first, encoded.listing.captions
    captions = [
        [*dict.fromkeys(listed[first[number] : first[number + 1]].tolist())]
        for number in encoded.good.at(np.arange(len(encoded)))
    ]
    order = np.random.default_rng(0).permutation(len(captions))
    held, others = order[: given.held], np.sort(order[given.held :])
    print(f"{samples.name}: {len(others):,} images, {len(held):,} held out")
    wrong, found = [], {"least agreement": [], "mean agreement": [], "cleanlab, on groups": []}
    gains = {"all": [], "kept by data score": [], "as many by chance": [], "right ones alone": []}
    groups, own = torch.arange(len(others)), images[others]
    for seed in range(DRAWS):
        swapped, is_wrong = swap([captions[one] for one in others], seed, single=given.single)
        wrong.append(is_wrong)
        counts = torch.tensor([*map(len, swapped)])
        image_of_pair = groups.repeat_interleave(counts)
        text_of_pair = torch.tensor([text for several in swapped for text in several])
        _, loss, _ = cross_fit_disagreement(own, texts, image_of_pair, text_of_pair, groups, seed=0)
        zeros = torch.zeros(len(others))
        for name, way in (("least agreement", "amin"), ("mean agreement", "mean")):
            scores = zeros.scatter_reduce(0, image_of_pair, -loss, way, include_self=False)
            found[name].append(scores)
        if find_spec("cleanlab") and not given.single:
            means = torch.zeros(len(others), texts.shape[1])
            means.index_add_(0, image_of_pair, texts[text_of_pair].float())
            found["cleanlab, on groups"].append(score_by_cleanlab(own, means, groups))
        if given.held:
            dropped = round(SWAPPED * len(others))
            best_last = np.argsort(found["least agreement"][-1].numpy(), kind="stable")
            drawn = np.random.default_rng(seed).permutation(len(others))
            choices = (np.arange(len(others)), best_last[dropped:], drawn[dropped:])
            now = dict(zip(others, swapped, strict=True))
            given_now = [now.get(one, several) for one, several in enumerate(captions)]
            for name, chosen in zip(gains, (*choices, np.flatnonzero(~is_wrong)), strict=True):
                shares = find_held_out(images, texts, given_now, others[np.sort(chosen)], held)
                gains[name].append(shares)
    print(
        f"{'ordered by':<28}", *(f"{name:>6}" for name in ("1%", "2%", "5%", "AP")), "AP of draws"
    )
    for name, scores in found.items():
        if scores:
            describe(name, scores, wrong)
    if given.held:
        print(f"{'heads fitted to':<28} {'recall':>6} {'gain':>6}")
        describe_gains(gains)
    if given.time:
        seconds, processors = time_scores(given.time)
        print(
            f"{given.time:,} pairs: {seconds:.0f} s after encoding, {processors:.0f} of processors"
        )


if __name__ == "__main__":
    main()
