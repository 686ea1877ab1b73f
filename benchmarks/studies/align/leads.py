"""Leads between frozen halves, in closed form: other starts, pruning, images without captions.

    python benchmarks/studies/align/leads.py --captions PAIRS --root IMAGES
        --image-features FILE.parquet --text-features FOLDER

Would a ridge regression between the halves be a better start than canonical correlation? Is half of
the images worth more if groups choose it? What do images without captions add to 1,000 that have
them? Each row but those of regressions fits the heads that `protoclip align` starts from. It has
the mean of six recalls (both ways, at 1, 5 and 10) on the validation half of the held-out pairs;
intervals (95%) are over images. PAIRS has a row a caption; image_features.py and
`embed-teacher` make the features.
"""

import argparse
import sys
import tomllib
from dataclasses import replace
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from protoclip.config import Config
from protoclip.data import sources
from protoclip.encode.canonical import SecondMoments, canonical_projections, moments_of_images
from protoclip.encode.teachers import read_teacher
from protoclip.evaluation.metrics import Floats, half_of_seeds
from protoclip.evaluation.validation import judged
from protoclip.prototypes.kmeans import KMeans, kmeans

STUDIES = Path(__file__).parents[1]
sys.path.append(str(STUDIES))
from judge import held_out  # noqa: E402

GROUPS, CAPTIONED, NEAR = 300, 1000, 2000
Features = tuple[Tensor, Tensor]  # of images `(n, q)`, and of the captions of each `(n, c, r)`


def moments_of(x: Tensor, y: Tensor) -> SecondMoments:
    return moments_of_images(x, y.flatten(0, 1), torch.full((len(x),), y.shape[1]))


def read_features(given: argparse.Namespace) -> list[Features]:
    """Of the images to fit to, and of those to judge by."""
    data = tomllib.loads((STUDIES / "photographs.toml").read_text(encoding="utf-8"))["data"]
    config = Config.from_dict({"data": data | {"train": given.captions, "root": given.root}})
    pairs, ids = sources.pairs(config), dict[str, list[str]]()
    for row in range(len(pairs)):
        ids.setdefault(pairs.where(row), []).append(pairs.sample_id(row))
    if len({*map(len, ids.values())}) > 1:
        raise ValueError(f"{given.captions}: give every image equally many captions")
    image_half, text_half = read_teacher(given.image_features), read_teacher(given.text_features)
    held, found = held_out(config, "validation").splits["validation"].images, []
    for view in (judged(config, pairs).training, held):
        own = [ids[file] for file in dict.fromkeys(map(view.where, range(len(view))))]
        x, y = image_half.rows([of[0] for of in own]), text_half.rows([*chain(*own)])
        if not (x.isfinite().all() and y.isfinite().all()):
            raise ValueError(f"{given.captions}: some pairs lack features; make them of this table")
        found.append((x.float(), F.normalize(y.float(), dim=1).unflatten(0, (len(own), -1))))
    return found


def recalls(image: Tensor, text: Tensor, held: Features) -> Floats:
    """The mean of the six recalls, in points, of each image with its captions, by two maps."""
    x = F.normalize(held[0].double() @ image, dim=1)
    y = F.normalize(held[1].double() @ text, dim=2)
    likeness = x @ y.flatten(0, 1).T
    own = likeness.view(len(x), *y.shape[:2]).diagonal().T
    ranks = [(likeness > own.amax(1, keepdim=True)).sum(1), (likeness > own.flatten()).sum(0)]
    hits = [(of.view(len(x), -1) < k).double().mean(1) for of in ranks for k in (1, 5, 10)]
    return 100 * torch.stack(hits).mean(0).numpy()


def show(arms: dict[str, SecondMoments], held: Features) -> None:
    print_table(
        {f"{n} | {m.samples:,}": recalls(*canonical_projections(m), held) for n, m in arms.items()}
    )


def print_table(found: dict[str, Floats]) -> None:
    print("\n| fitted to | images | mean recall | difference from the first |\n|---|---|---|---|")
    for name, values in found.items():
        gains = values - next(iter(found.values()))
        mean, half = gains.mean(), half_of_seeds(gains)  # images are independent, as seeds are
        gap = f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]" if gains.any() else "-"
        print(f"| {name} | {values.mean():.1f} | {gap} |")


def regressed(moments: SecondMoments, held: Features) -> dict[str, Floats]:
    """Heads by a ridge regression of one half's features on the other's, which stay as they are.

    Features are not centred: heads have no bias. Penalties are in mean squares of a dimension.
    """
    arms = {"canonical correlation": canonical_projections(moments)}
    image, text, cross = moments.image, moments.text, moments.cross
    for share in (0.01, 0.1, 1.0):
        penalty = [share * m.trace() / len(m) * torch.eye(len(m)).double() for m in (image, text)]
        to_texts = torch.linalg.solve(image + penalty[0], cross)
        to_images = torch.linalg.solve(text + penalty[1], cross.T)
        arms[f"images to texts, penalty {share}"] = to_texts, torch.eye(len(text)).double()
        arms[f"texts to images, penalty {share}"] = torch.eye(len(image)).double(), to_images
    samples = f"{moments.samples:,}"
    return {f"{name} | {samples}": recalls(*maps, held) for name, maps in arms.items()}


def pruned(
    x: Tensor, y: Tensor, unit: Tensor, found: KMeans, draws: list[Tensor]
) -> dict[str, SecondMoments]:
    half = len(x) // 2
    near = (unit * F.normalize(found.centroids[found.assignments], dim=1)).sum(1)
    chosen = {f"half at random, draw {n}": draw[:half] for n, draw in enumerate(draws)}
    for name, order in {"nearest": (-near).argsort(), "farthest from": near.argsort()}.items():
        groups = [order[found.assignments[order] == number] for number in range(GROUPS)]
        kept = torch.cat([own[: -(-len(own) // 2)] for own in groups])
        kept = kept[np.random.default_rng(0).permutation(len(kept))]  # odd groups give one too many
        chosen[f"half of each of {GROUPS} groups, {name} the centre"] = kept[:half]
    of_groups = (draws[0][found.assignments[draws[0]] == n].tolist() for n in range(GROUPS))
    in_turn = [row for row in chain(*zip_longest(*of_groups)) if row is not None]
    chosen["equal numbers of each group"] = torch.tensor(in_turn[:half])
    return {n: moments_of(x[r], y[r]) for n, r in chosen.items()} | {"all": moments_of(x, y)}


def lent(
    x: Tensor, y: Tensor, unit: Tensor, found: KMeans, draw: Tensor
) -> dict[str, SecondMoments]:
    """Images with their captions, and others that are lent captions by those, or have none."""
    known, rest = draw[:CAPTIONED], draw[CAPTIONED:]
    own, every, number = moments_of(x[known], y[known]), moments_of(x, y), f"{len(rest):,}"
    likeness = unit[rest] @ unit[known].T
    captions, near = y[known][likeness.argmax(1)], (-likeness.amax(1)).argsort()[:NEAR]
    arms = {f"{CAPTIONED:,} captioned": own}
    arms[f"and {number} with the captions of the nearest"] = own + moments_of(x[rest], captions)
    arms[f"and the {NEAR:,} nearest of them"] = own + moments_of(x[rest][near], captions[near])
    for heat in (0.02, 0.05, 0.1):
        mixed = ((likeness / heat).softmax(1) @ y[known].mean(1))[:, None]
        arms[f"and {number} with a mixture, temperature {heat}"] = own + moments_of(x[rest], mixed)
    means = torch.zeros(GROUPS, y.shape[2]).index_add_(
        0, found.assignments[known], y[known].mean(1)
    )
    filled = F.normalize(means, dim=1)  # a group's text prototype, or 0 without captions
    in_group = found.assignments[rest]
    taught = filled[in_group].norm(dim=1) > 0
    carried = filled[in_group][taught][:, None]
    name = f"and {int(taught.sum()):,} with the text prototype of their group of images"
    arms[name] = own + moments_of(x[rest][taught], carried)
    share = own.samples / every.samples
    of_images = {"image": every.image * share, "sum_of_images": every.sum_of_images * share}
    return arms | {f"and {number} in the image moments alone": replace(own, **of_images)}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    for option in ("--captions", "--root", "--image-features", "--text-features"):
        parser.add_argument(option, required=True)
    (x, y), held = read_features(parser.parse_args())
    unit = F.normalize(x - x.mean(0), dim=1)
    draws = [torch.tensor(np.random.default_rng(n).permutation(len(x))) for n in range(3)]
    print_table(regressed(moments_of(x, y), held))
    found = kmeans(unit, GROUPS, iterations=20, seed=0)
    show(pruned(x, y, unit, found, draws), held)
    show(lent(x, y, unit, found, draws[0]), held)


if __name__ == "__main__":
    main()
