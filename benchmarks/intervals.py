"""Do the 95% intervals of an evaluation hold the truth in 95 of 100 test sets?

Draws test sets from a known population many times: concepts of some classes, images of a concept,
and five captions an image, each of which resembles what it belongs to. Two models see them with
errors that are partly the same; some concepts are harder than others, and some captions are near to
everything. Each time all metrics are computed by the package's functions, with their intervals of
one model and of the difference of both. The truth is the mean over all test sets. Training images,
on which the linear probe and kNN are fitted, and the names of classes stay the same.

The column "alone" has the share where each image and each caption counts as a group of its own, as
up to version 0.2. AMI is measured with the influences that leaving out one group at a time gives.

With --over-seeds, each model is trained with five seeds of many. A seed turns what the towers make
of everything, and makes them better or worse. The intervals are those of the mean gain over seeds
and samples together, and the truth is the mean over seeds and test sets. The largest test sets are
left out.

With --equal, up to twelve models that are equally good are compared with the first by six recalls.
A model makes errors of its own on each sample; with three seeds it makes others with each. Counted
is how many comparisons give a star to any difference, by each interval alone and by Holm's test.
Only the small test sets are drawn.

    python benchmarks/intervals.py [--repeats 1000] [--over-seeds 0] [--equal 0] [--seed 0]
        [--ami 0] > FILE
"""

import argparse
import datetime
import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import adjusted_mutual_info_score
from torch import Tensor

from protoclip.evaluation.geometry import clustering
from protoclip.evaluation.metrics import (
    MULTILABEL,
    RECALLS,
    Floats,
    SampleResults,
    compute_influences,
    difference,
    interval,
    interval_of_difference,
    mark_clear,
    sum_by_group,
)
from protoclip.evaluation.probes import best_linear_probe, count_votes
from protoclip.evaluation.retrieval import best_relevant_rank, crowding
from protoclip.evaluation.zero_shot import mean_average_precision, zero_shot_ranks
from protoclip.progress import Progress
from protoclip.training.watch import describe_environment

WIDTH, CLASSES, CAPTIONS, TRAIN = 24, 8, 5, 400
SEEDS, OF_SEEDS = 5, 100  # of a comparison, and of all that there are
# How far seeds turn features, and how much their errors differ.
STRENGTHS = {"seeds that differ little": (0.03, 0.02), "seeds that differ much": (0.1, 0.05)}
ERRORS = (0.9, 1.0)  # of the two models
EQUAL = {1: (2, 5, 8, 12), 3: (2, 5)}  # numbers of equal models, by how many seeds each has
# Values, their influences, and whether candidates decide them.
Metrics = dict[str, tuple[float, Floats, bool]]


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


class Towers(NamedTuple):
    """A model: its error, what it turns images and texts by, and what it was fitted to."""

    error: float
    of_images: Tensor
    of_texts: Tensor
    names: Tensor
    probe: Any
    train: tuple[Tensor, Tensor]


class World(NamedTuple):
    """What stays the same in all test sets: classes, two models, and pairs of these by seed."""

    centres: Tensor
    models: list[Towers]
    by_seed: dict[str, list[list[Towers]]]


def normal(draw: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(draw.normal(size=shape)).float()


def make_world(seed: int, *, seeds: int = 0) -> World:
    draw = np.random.default_rng(seed)
    centres = normal(draw, CLASSES, WIDTH)
    labels = torch.from_numpy(draw.integers(CLASSES, size=TRAIN))
    images = centres[labels] + 1.3 * normal(draw, TRAIN, WIDTH)

    def fitted(error: float, of_images: Tensor, of_texts: Tensor) -> Towers:
        names = F.normalize((centres + 0.8 * normal(draw, CLASSES, WIDTH)) @ of_texts, dim=1)
        seen = images + 1.5 * error * normal(draw, TRAIN, WIDTH)
        seen = F.normalize(seen @ of_images, dim=1)
        probe = best_linear_probe(seen, labels)
        return Towers(error, of_images, of_texts, names, probe, (seen, labels))

    def of_seed(error: float, turn: float, better: float) -> Towers:
        turns = [torch.eye(WIDTH) + turn * normal(draw, WIDTH, WIDTH) for _ in range(2)]
        return fitted(error * math.exp(better * draw.normal()), *turns)

    models = [fitted(error, torch.eye(WIDTH), torch.eye(WIDTH)) for error in ERRORS]
    by_seed = {
        name: [[of_seed(error, *strength) for error in ERRORS] for _ in range(seeds)]
        for name, strength in STRENGTHS.items()
    }
    return World(centres, models, by_seed)


def draw_test_set(
    world: World, population: Population, models: list[Towers], *seed: int
) -> list[SampleResults]:
    """The results of some models on one test set."""
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
    noise = [normal(draw, *values.shape) for values in (images, images, texts, concepts)]
    found = []
    for model in models:

        def seen(clean: Tensor, noise: Tensor, scale: Tensor | float) -> Tensor:
            own = 0.7 * normal(draw, *clean.shape)
            return clean + 0.7 * model.error * scale * (noise + own)  # noqa: B023

        image = F.normalize(seen(images, noise[0], hard) @ model.of_images, dim=1)
        of_image = images + 0.6 * hard * noise[1]  # what all captions of an image get wrong
        text = seen(of_image[image_of], noise[2], hard[image_of])
        text = F.normalize((text + common) @ model.of_texts, dim=1)
        names = F.normalize(seen(concepts, noise[3], 1.0) @ model.of_texts, dim=1)
        group = torch.arange(len(images))
        to_text = best_relevant_rank(image, text, group, image_of)
        to_image = best_relevant_rank(text, image, image_of, group)
        of_texts = crowding(image, text, to_text, concept, concept[image_of])
        of_images = crowding(text, image, to_image, concept[image_of], concept)
        columns = {
            "zero_shot_rank": zero_shot_ranks(image, names, concept),
            "zero_shot_class": concept,
            "zero_shot_subgroup_rank": zero_shot_ranks(image, model.names, labels),
            "image_to_text_rank": to_text,
            **{f"text_to_image_crowding_{k}": taken for k, taken in of_images.items()},
            "linear_probe_correct": model.probe.predict(image) == labels,
            "linear_probe_rank": model.probe.ranks(image, labels),
            "knn_correct": count_votes(*model.train, image).argmax(1) == labels,
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
        scores = image @ model.names.T
        metrics = {**samples.means}
        metrics[MULTILABEL], parts = mean_average_precision(scores, present)
        found.append(replace(samples, metrics=metrics, parts={MULTILABEL: parts}))
        found[-1].images["features"] = image  # type: ignore[index]
    return found


def alone(samples: SampleResults) -> SampleResults:
    """Without groups, among given candidates."""
    parts = (samples.images, samples.texts)
    images, texts = (
        {k: v for k, v in columns.items() if k != "group" and "crowding" not in k}
        for columns in parts
    )
    return SampleResults(images=images, texts=texts)


def holds(
    truth: float, value: float, influence: Floats, *, paired: bool
) -> tuple[bool, float] | None:
    """Whether the interval holds the truth, and half its width; `None` without an interval."""
    ends = interval_of_difference([value], influence) if paired else interval(value, influence)
    return None if ends is None else (ends[0] <= truth <= ends[1], (ends[1] - ends[0]) / 2)


def ami_by_group(samples: SampleResults) -> tuple[float, Floats, bool]:
    """AMI, and its influences: without each group in turn, the clusters of the others staying."""
    labels, group = samples.images["class"], samples.images["group"]
    found = clustering(samples.images["features"], torch.from_numpy(labels))
    clusters, names = found["cluster"].numpy(), np.unique(group)
    without = np.array(
        [adjusted_mutual_info_score(labels[group != n], clusters[group != n]) for n in names]
    )
    number = len(names)
    parts = (without.mean() - without) * (number - 1) / number
    return found["ami"], sum_by_group(parts, np.arange(number), number), False


def rows_of(repeats: list[list[Metrics]], apart: list[list[Mapping[str, Floats]]]) -> list[str]:
    """A row a metric: its mean, and how often the intervals hold the truth."""
    lines = []
    for name in repeats[0][0]:
        cells = [name]
        for paired in (False, True):
            values, held, without = [], [], []
            for (one, two), sides in zip(repeats, apart, strict=True):
                value, influence, decided = one[name]
                lonely = sides[0].get(name) if sides else None
                if paired:
                    value, influence = two[name][0] - value, two[name][1] - influence
                    lonely = sides[1][name] - lonely if lonely is not None else None
                values.append((value, influence, lonely, decided and not paired))
            truth = float(np.mean([value for value, *_ in values]))
            for value, influence, lonely, decided in values:
                ends = None if decided else holds(truth, value, influence, paired=paired)
                held.append(ends)
                if lonely is not None:
                    without.append(holds(truth, value, lonely, paired=paired))
            spread = 1.96 * float(np.std([value for value, *_ in values], ddof=1))
            cells += [f"{100 * truth:.1f}", f"{100 * spread:.1f}"]
            given = [outcome for outcome in held if outcome is not None]
            enough = len(given) >= len(held) / 2
            cells.append(f"{100 * np.mean([width for _, width in given]):.1f}" if enough else "-")
            cells.append(
                f"**{100 * np.mean([is_held for is_held, _ in given]):.1f}**" if enough else "-"
            )
            alike = [outcome[0] for outcome in without if outcome is not None]
            cells.append(f"{100 * np.mean(alike):.1f}" if enough and alike else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def with_influences(measured: list[SampleResults]) -> list[Metrics]:
    """Of each model its metrics that have influences, with these."""
    moved = [compute_influences(samples) for samples in measured]
    return [
        {key: (samples.metrics[key], by_metric[key], key in crowded) for key in by_metric}
        for samples, (by_metric, crowded) in zip(measured, moved, strict=True)
    ]


def rows_of_seeds(repeats: list[list[list[Metrics]]]) -> list[str]:
    """A row a metric: how often the intervals of the mean gain hold the truth, by what they cover.

    A repeat has both models by seed.
    """
    lines = []
    for name in repeats[0][0][0]:
        pairs = [[(one[name], two[name]) for one, two in repeat] for repeat in repeats]
        gains = np.array([[two[0] - one[0] for one, two in repeat] for repeat in pairs])
        moved = [np.stack([two[1] - one[1] for one, two in repeat]) for repeat in pairs]
        truth, held = float(gains.mean()), dict[str, list[bool]]()
        for own, influence in zip(gains, moved, strict=True):
            both = {
                "five": interval_of_difference(own, influence),
                "three": interval_of_difference(own[:3], influence[:3]),
                "seeds": interval_of_difference(own),
                "samples": interval_of_difference([own.mean()], influence.mean(axis=0)),
            }
            for kind, ends in both.items():
                if ends is not None:
                    held.setdefault(kind, []).append(ends[0] <= truth <= ends[1])
        spread = 1.96 * float(gains.mean(axis=1).std(ddof=1))
        of_seeds = float(np.sqrt(gains.var(axis=1, ddof=1).mean()))
        cells = [name, f"{100 * truth:.1f}", f"{100 * of_seeds:.1f}", f"{100 * spread:.1f}"]
        for kind in ("five", "three", "seeds", "samples"):
            given = held.get(kind, [])
            enough = len(given) >= len(repeats) / 2
            share = f"{100 * np.mean(given):.1f}" if enough else "-"
            cells.append(f"**{share}**" if enough and kind in ("five", "three") else share)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def over_seeds(world: World, repeats: int, seed: int) -> None:
    """Print a table a population, of models that are trained with several seeds."""
    print("# Over seeds and samples together\n")
    print(
        f"{repeats} test sets, each with {SEEDS} of {OF_SEEDS} seeds. The mean gain, the standard"
    )
    print("deviation of gains over seeds, 1.96 standard deviations of the mean over test sets with")
    print("their seeds, and in how many of 100 the interval holds the truth: over five seeds and")
    print("samples, over three and samples, over five seeds alone, over samples alone.\n")
    quick = [name for name, population in POPULATIONS.items() if population.concepts <= 300]
    for name, strength in product(quick, STRENGTHS):
        population, by_seed = POPULATIONS[name], world.by_seed[strength]
        progress = Progress(f"{strength}: {population.concepts} concepts", repeats)
        found = []
        for repeat in range(repeats):
            draw = np.random.default_rng([seed, repeat])
            chosen = draw.choice(OF_SEEDS, size=SEEDS, replace=False)
            models = [model for seed in chosen for model in by_seed[seed]]
            metrics = with_influences(draw_test_set(world, population, models, seed, repeat))
            found.append([metrics[first : first + 2] for first in range(0, len(metrics), 2)])
            progress.update(repeat + 1)
        print(f"## {name}; {strength}\n")
        print("| metric | gain | over seeds | spread | five seeds | three | seeds alone ", end="")
        print("| samples alone |")
        print("|---" * 8 + "|")
        print(*rows_of_seeds(found), sep="\n")
        print(flush=True)


def stars(models: list[list[Metrics]]) -> tuple[bool, bool]:
    """Whether any difference to the first model has an interval without 0, and any is clear.

    Args:
        models: The metrics of each model by seed.
    """
    found = []
    for name, other in product(RECALLS, models[1:]):
        pairs = [(one[name], two[name]) for one, two in zip(models[0], other, strict=True)]
        gains = [two[0] - one[0] for one, two in pairs]
        found.append(difference(gains, np.stack([two[1] - one[1] for one, two in pairs])))
    mark_clear(found)
    alone = any(difference["p"] is not None and difference["p"] < 0.05 for difference in found)
    return alone, any(difference["beyond"] for difference in found)


def equal_models(world: World, repeats: int, seed: int) -> None:
    """Print a table of how many comparisons of equal models give a star."""
    print("# Stars among equal models\n")
    print(f"In how many of 100 comparisons, of {repeats} test sets, any difference to the first of")
    print("equally good models has a star, by six recalls: as each interval says alone, and by")
    print(f"Holm's test. Standard error of a 5: {100 * math.sqrt(0.05 * 0.95 / repeats):.1f}.\n")
    print("| test sets | seeds | models | each alone | Holm |")
    print("|---" * 5 + "|")
    small = [name for name, population in POPULATIONS.items() if population.concepts < 300]
    for name, seeds in product(small, EQUAL):
        progress = Progress(f"equal models: {name}, {seeds} seeds", repeats)
        found: dict[int, list[tuple[bool, bool]]] = {number: [] for number in EQUAL[seeds]}
        for repeat in range(repeats):
            models = [world.models[0]] * max(found) * seeds
            drawn = draw_test_set(world, POPULATIONS[name], models, seed, seeds, repeat)
            metrics = with_influences(drawn)
            by_model = [metrics[at : at + seeds] for at in range(0, len(metrics), seeds)]
            for number, of_number in found.items():
                of_number.append(stars(by_model[:number]))
            progress.update(repeat + 1)
        for number, of_number in found.items():
            alone, clear = 100 * np.mean(of_number, axis=0)
            print(f"| {name} | {seeds} | {number} | {alone:.1f} | **{clear:.1f}** |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--over-seeds", type=int, default=0, help="repeats with five seeds")
    parser.add_argument("--equal", type=int, default=0, help="repeats with equal models")
    parser.add_argument("--ami", type=int, default=0, help="repeats with K-means")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    given = parser.parse_args()
    torch.set_num_threads(1)
    world = make_world(given.seed, seeds=OF_SEEDS if given.over_seeds else 0)
    facts = describe_environment(torch.device("cpu"))
    print("# Do intervals hold the truth?\n")
    print(f"`python benchmarks/intervals.py --repeats {given.repeats} --seed {given.seed}", end="")
    print(f" --over-seeds {given.over_seeds} --equal {given.equal} --ami {given.ami}`, ", end="")
    print(f"{datetime.date.today().isoformat()}; {facts['device']}, torch {facts['torch']}.\n")
    print("Percent. Of one model and of the difference of two: the truth, 1.96 standard deviations")
    print("over test sets, the mean half-width of the intervals, in how many of 100 test sets the")
    print("interval holds the truth, and in how many if each image and caption counted alone.")
    print("A dash stands where most test sets give no interval: too few groups differ, or few")
    print("candidates decide a recall of one model.\n")
    error = 100 * math.sqrt(0.95 * 0.05 / (given.repeats or given.over_seeds or given.equal))
    print(f"Standard error of a 95: {error:.1f}.\n")
    for name, population in POPULATIONS.items() if given.repeats else ():
        progress = Progress(f"intervals: {population.concepts} concepts", given.repeats)
        repeats: list[list[Metrics]] = []
        apart: list[list[Mapping[str, Floats]]] = []
        clustered: list[list[Metrics]] = []
        for seed in range(given.repeats):
            both = draw_test_set(world, population, world.models, given.seed, seed)
            repeats.append(with_influences(both))
            apart.append([compute_influences(alone(samples))[0] for samples in both])
            if seed < given.ami:
                clustered.append([{"clustering/ami": ami_by_group(one)} for one in both])
            progress.update(seed + 1)
        print(f"## {name}\n")
        print("| metric | one model | spread | half-width | held | alone ", end="")
        print("| difference | spread | half-width | held | alone |")
        print("|---" * 11 + "|")
        print(*rows_of(repeats, apart), sep="\n")
        if clustered:
            print(*rows_of(clustered, [[] for _ in clustered]), sep="\n")
        print(flush=True)
    if given.over_seeds:
        over_seeds(world, given.over_seeds, given.seed)
    if given.equal:
        equal_models(world, given.equal, given.seed)


if __name__ == "__main__":
    main()
