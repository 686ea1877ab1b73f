"""Do the 95% intervals of an evaluation hold the truth in 95 of 100 test sets?

Draws test sets from a known population many times: concepts of some classes, images of a concept,
and five captions an image, each of which resembles what it belongs to. Two models see them with
errors that are partly the same; some concepts are harder than others, and some captions are near to
everything. Each time all metrics are computed by the package's functions, with their intervals of
one model and of the difference of both. The truth is the mean over all test sets. Training images,
on which the linear probe and kNN are fitted, and the names of classes stay the same.

The column "alone" has the share where each image and each caption counts as a group of its own, as
up to version 0.2. AMI is measured with the influences that leaving out one group at a time gives.

    python benchmarks/intervals.py [--repeats 1000] [--seed 0] [--ami 0] > FILE
"""

import argparse
import datetime
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import adjusted_mutual_info_score
from torch import Tensor

from protoclip.evaluation.clustering import clustering
from protoclip.evaluation.knn import knn_predict
from protoclip.evaluation.linear_probe import best_linear_probe
from protoclip.evaluation.measured import Measured
from protoclip.evaluation.metrics import MULTILABEL, Floats, interval, interval_of_difference
from protoclip.evaluation.retrieval import best_relevant_rank, crowding
from protoclip.evaluation.samples import SampleResults, by_group, influences
from protoclip.evaluation.zero_shot import mean_average_precision, zero_shot_ranks
from protoclip.progress import Progress
from protoclip.training.run_folder import environment

WIDTH, CLASSES, CAPTIONS, TRAIN = 24, 8, 5, 400
ERRORS = (0.9, 1.0)  # of the two models
Metrics = dict[str, tuple[float, Floats]]


class Population(NamedTuple):
    """How many concepts a test set has, the most images of one, and how near all captions lie."""

    concepts: int
    most_images: int
    common: float


POPULATIONS = {
    "300 concepts with 1 to 5 images each": Population(300, 5, 0.5),
    "1,000 images, each of a concept of its own": Population(1000, 1, 1.0),
    "60 concepts with 1 to 5 images each": Population(60, 5, 0.5),
    "150 images, each of a concept of its own, and captions near to everything": Population(
        150, 1, 2.0
    ),
}


class World(NamedTuple):
    """What stays the same in all test sets: classes, and of each model names and a training set."""

    centres: Tensor
    names: list[Tensor]
    probes: list[Any]
    train: list[tuple[Tensor, Tensor]]


def normal(draw: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(draw.normal(size=shape)).float()


def make_world(seed: int) -> World:
    draw = np.random.default_rng(seed)
    centres = normal(draw, CLASSES, WIDTH)
    labels = torch.from_numpy(draw.integers(CLASSES, size=TRAIN))
    images = centres[labels] + 1.3 * normal(draw, TRAIN, WIDTH)
    names, probes, train = [], [], []
    for error in ERRORS:
        names.append(F.normalize(centres + 0.8 * normal(draw, CLASSES, WIDTH), dim=1))
        seen = F.normalize(images + 1.5 * error * normal(draw, TRAIN, WIDTH), dim=1)
        train.append((seen, labels))
        probes.append(best_linear_probe(seen, labels))
    return World(centres, names, probes, train)


def draw_test_set(world: World, population: Population, *seed: int) -> list[Measured]:
    """The results of both models."""
    draw = np.random.default_rng(seed)
    number = population.concepts
    class_of_concept = torch.from_numpy(draw.integers(CLASSES, size=number))
    concepts = world.centres[class_of_concept] + normal(draw, number, WIDTH)
    counts = draw.integers(1, population.most_images + 1, size=number)
    concept = torch.arange(number).repeat_interleave(torch.from_numpy(counts))
    image_of = torch.arange(len(concept)).repeat_interleave(CAPTIONS)
    images = concepts[concept] + 0.8 * normal(draw, len(concept), WIDTH)
    texts = images[image_of]
    labels = class_of_concept[concept]
    near = concepts @ world.centres.T
    present = (near >= near.topk(2).values[:, -1:])[concept]
    hard = (0.5 * normal(draw, number, 1)).exp()[concept]
    common = population.common * (0.5 * normal(draw, len(texts), 1)).exp()
    noise = [normal(draw, *of.shape) for of in (images, images, texts, concepts)]
    found = []
    for model, error in enumerate(ERRORS):

        def seen(clean: Tensor, noise: Tensor, scale: Tensor | float) -> Tensor:
            own = 0.7 * normal(draw, *clean.shape)
            return clean + 0.7 * error * scale * (noise + own)  # noqa: B023

        image = F.normalize(seen(images, noise[0], hard), dim=1)
        of_image = images + 0.6 * hard * noise[1]  # what all captions of an image get wrong
        text = seen(of_image[image_of], noise[2], hard[image_of])
        text = F.normalize(text + common, dim=1)
        names = F.normalize(seen(concepts, noise[3], 1.0), dim=1)
        group = torch.arange(len(images))
        to_text = best_relevant_rank(image, text, group, image_of)
        to_image = best_relevant_rank(text, image, image_of, group)
        of_texts = crowding(image, text, to_text, concept, concept[image_of])
        of_images = crowding(text, image, to_image, concept[image_of], concept)
        probe, (rows, of_rows) = world.probes[model], world.train[model]
        columns = {
            "zero_shot_rank": zero_shot_ranks(image, names, concept),
            "zero_shot_class": concept,
            "zero_shot_subgroup_rank": zero_shot_ranks(image, world.names[model], labels),
            "image_to_text_rank": to_text,
            **{f"text_to_image_crowding_{k}": taken for k, taken in of_images.items()},
            "linear_probe_correct": probe.predict(image) == labels,
            "linear_probe_rank": probe.ranks(image, labels),
            "knn_correct": knn_predict(rows, of_rows, image) == labels,
            "class": labels,
            "group": concept,
        }
        text_columns = {
            "text_to_image_rank": to_image,
            **{f"image_to_text_crowding_{k}": taken for k, taken in of_texts.items()},
            "group": concept[image_of],
        }
        samples = SampleResults(
            images={"sample_id": group.numpy(), **{k: v.numpy() for k, v in columns.items()}},
            texts={"sample_id": -1 - np.arange(len(text))}
            | {k: v.numpy() for k, v in text_columns.items()},
        )
        scores = image @ world.names[model].T
        metrics = {name: samples.mean(name) for name in samples.means()}
        metrics[MULTILABEL] = mean_average_precision(scores, present)
        found.append(Measured(metrics=metrics, samples=samples, scores=(scores, present)))
        found[-1].samples.images["features"] = image  # type: ignore[index]
    return found


def alone(samples: SampleResults) -> SampleResults:
    """Without groups, among given candidates."""
    parts = (samples.images, samples.texts)
    images, texts = (
        {k: v for k, v in of.items() if k != "group" and "crowding" not in k} for of in parts
    )
    return SampleResults(images=images, texts=texts)


def holds(
    truth: float, value: float, influence: Floats, *, paired: bool
) -> tuple[bool, float] | None:
    """Whether the interval holds the truth, and half its width; `None` without an interval."""
    ends = interval_of_difference([value], influence) if paired else interval(value, influence)
    return None if ends is None else (ends[0] <= truth <= ends[1], (ends[1] - ends[0]) / 2)


def ami_by_group(samples: SampleResults) -> tuple[float, Floats]:
    """AMI, and its influences: without each group in turn, the clusters of the others staying."""
    labels, group = samples.images["class"], samples.images["group"]
    found = clustering(samples.images["features"], torch.from_numpy(labels))
    clusters, names = found["cluster"].numpy(), np.unique(group)
    without = np.array(
        [adjusted_mutual_info_score(labels[group != n], clusters[group != n]) for n in names]
    )
    number = len(names)
    parts = (without.mean() - without) * (number - 1) / number
    return found["ami"], by_group(parts, np.arange(number), number)


def rows_of(repeats: list[list[Metrics]], apart: list[list[Mapping[str, Floats]]]) -> list[str]:
    """A row a metric: its mean, and how often the intervals hold the truth."""
    lines = []
    for name in repeats[0][0]:
        cells = [name]
        for paired in (False, True):
            values, held, without = [], [], []
            for (one, two), sides in zip(repeats, apart, strict=True):
                value, influence = one[name]
                lonely = sides[0].get(name) if sides else None
                if paired:
                    value, influence = two[name][0] - value, two[name][1] - influence
                    lonely = sides[1][name] - lonely if lonely is not None else None
                values.append((value, influence, lonely))
            truth = float(np.mean([value for value, _, _ in values]))
            for value, influence, lonely in values:
                held.append(holds(truth, value, influence, paired=paired))
                if lonely is not None:
                    without.append(holds(truth, value, lonely, paired=paired))
            spread = 1.96 * float(np.std([value for value, _, _ in values], ddof=1))
            cells += [f"{100 * truth:.1f}", f"{100 * spread:.1f}"]
            known = [each for each in held if each is not None]
            enough = len(known) >= len(held) / 2
            cells.append(f"{100 * np.mean([width for _, width in known]):.1f}" if enough else "-")
            cells.append(f"**{100 * np.mean([of for of, _ in known]):.1f}**" if enough else "-")
            alike = [each[0] for each in without if each is not None]
            cells.append(f"{100 * np.mean(alike):.1f}" if enough and alike else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--ami", type=int, default=0, help="repeats with K-means")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    given = parser.parse_args()
    torch.set_num_threads(1)
    world = make_world(given.seed)
    facts = environment(torch.device("cpu"))
    print("# Do intervals hold the truth?\n")
    print(f"`python benchmarks/intervals.py --repeats {given.repeats} --seed {given.seed}", end="")
    print(f" --ami {given.ami}`, ", end="")
    print(f"{datetime.date.today().isoformat()}; {facts['device']}, torch {facts['torch']}.\n")
    print("Percent. Of one model and of the difference of two: the truth, 1.96 standard deviations")
    print("over test sets, the mean half-width of the intervals, in how many of 100 test sets the")
    print("interval holds the truth, and in how many if each image and caption counted alone.")
    print("A dash stands where most test sets give no interval, since too few groups differ.\n")
    error = 100 * math.sqrt(0.95 * 0.05 / given.repeats)
    print(f"Standard error of a 95: {error:.1f}.\n")
    for name, population in POPULATIONS.items():
        progress = Progress(f"intervals: {population.concepts} concepts", given.repeats)
        repeats: list[list[Metrics]] = []
        apart: list[list[Mapping[str, Floats]]] = []
        clustered: list[list[Metrics]] = []
        for seed in range(given.repeats):
            both = draw_test_set(world, population, given.seed, seed)
            moved = [of.influences() for of in both]
            repeats.append(
                [
                    {key: (of.metrics[key], by[key]) for key in by}
                    for of, by in zip(both, moved, strict=True)
                ]
            )
            apart.append([influences(alone(of.samples)) for of in both])
            if seed < given.ami:
                clustered.append([{"clustering/ami": ami_by_group(of.samples)} for of in both])
            progress.update(seed + 1)
        print(f"## {name}\n")
        print("| metric | one model | spread | half-width | held | alone ", end="")
        print("| difference | spread | half-width | held | alone |")
        print("|---" * 11 + "|")
        print(*rows_of(repeats, apart), sep="\n")
        if clustered:
            print(*rows_of(clustered, [[] for _ in clustered]), sep="\n")
        print(flush=True)


if __name__ == "__main__":
    main()
