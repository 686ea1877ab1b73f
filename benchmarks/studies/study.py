"""Train arms over data sets and seeds, evaluate them by transfer, and print one table a data set.

    python benchmarks/studies/study.py benchmarks/studies/FILE.toml [--seeds 0 1 2] [--jobs 2]
        [--arms NAME ...] [--image-size N] [--emoji-image-teacher FILE]
        [--captions FILE --root FOLDER --teacher FOLDER --image-teacher FILE]
        [--start RUN] [--transfer emoji wds:FOLDER ...] [--test]

A study is a TOML file: a question, and arms, which are changes to the defaults as a recipe makes
them. Arms of one group are settings tried for the same thing; unset, an arm is its own group.

    question = "..."
    reference = "CLIP"              # the group that all others are compared with
    [[arms]]
    name = "CLIP, rate 1e-3"
    group = "CLIP"
    loss.prototypical = 0.0
    optim.learning_rate = 1e-3

More keys of an arm: `schedule`, a factor to the number of episodes; `start`, the arm whose weights
it starts from; `rotate` and `shift`, which take the start's text features away from the images'
(see `displaced`). A teacher's `features = "own"` are those of the data set at hand, `"own images"`
those of its images. `unset` names settings of photographs.toml that an arm leaves open, such as
`["episodes.size"]`. With `align = true`, or the settings of `[align]`, an arm is what `protoclip
align` makes of two encoders, with `finetune = true` what `protoclip finetune` makes of its `start`,
or of the run that `--start` names, without WiSE-FT; both have none of a data set's settings but
those of the data. An arm that sets no `loss.prototypical`, `loss.teacher` or `teacher.distil` has
1, 2 and 0, the defaults when most studies were made.

Pretraining is on the emoji, and on `--captions`, a table or folder of captioned photographs, with
the settings of photographs.toml. Features are fitted and tested on the `--transfer` sets.

Choices are made on validation. Transfer sets are evaluated there by folds over train and
validation, since a small validation split tells no arms apart. `--test` measures one arm of each
group, the best on validation in the mean over data sets, seeds and metrics, and nothing else. It
refuses a study whose arms changed after its test split was opened, and each table says how many
settings were tried.

Runs are kept in `--out` by their settings, go on if they were interrupted, and are not repeated.
Differences are paired by seed, with 95% intervals that cover seeds (Student's t) and samples
(by groups, such as the images of a concept) together; with one seed they cover samples only. AMI
has no interval: how K-means divides other samples does not follow from one division.
"""

import argparse
import datetime
import json
import math
import multiprocessing
import os
import shlex
import sys
import threading
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import ALL, DECIDING, Metrics, measure_run

from protoclip.cli.spec import merge_trees
from protoclip.config import Config
from protoclip.data import sources
from protoclip.data.access import digest
from protoclip.data.pairs import Pairs
from protoclip.evaluation.metrics import half_width, interval_of_difference
from protoclip.files import read_json, to_json, write_atomically
from protoclip.models import loading
from protoclip.models.checkpoint import MODEL, WEIGHTS, write_checkpoint
from protoclip.progress import Progress, duration
from protoclip.rules import check
from protoclip.training import presets, run
from protoclip.training.folder import to_toml
from protoclip.training.plan import make_plan
from protoclip.training.run import align, finetune
from protoclip.training.watch import describe_environment

PHOTOGRAPHS = Path(__file__).with_name("photographs.toml")
LOSS = {"prototypical": 1.0, "teacher": 2.0}  # of arms that set none; see the module's words
OWN = (
    "name",
    "group",
    "schedule",
    "start",
    "rotate",
    "shift",
    "unset",
    "align",
    "finetune",
)  # keys that are no settings


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train. `start`, `rotate` and `shift` are about the weights to start from."""

    name: str
    group: str
    settings: Mapping[str, Any]
    schedule: float = 1.0
    start: str | None = None
    rotate: bool = False
    shift: float = 0.0
    unset: Sequence[str] = ()
    align: bool = field(default=False, repr=False)
    finetune: bool = field(default=False, repr=False)

    @property
    def command(self) -> str:
        return "align" if self.align else "finetune" if self.finetune else "train"

    @property
    def displaces(self) -> bool:
        return self.rotate or self.shift > 0


@dataclass(frozen=True, kw_only=True)
class Study:
    name: str
    question: str
    reference: str
    arms: Mapping[str, Arm]

    @property
    def groups(self) -> dict[str, list[Arm]]:
        found: dict[str, list[Arm]] = {}
        for arm in self.arms.values():
            found.setdefault(arm.group, []).append(arm)
        return found


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """A data set to pretrain on: settings that all arms share, and its teachers' features."""

    name: str
    settings: Mapping[str, Any]
    teacher: str | None
    image_teacher: str | None = None

    @property
    def image_option(self) -> str:
        return "--emoji-image-teacher" if self.name == "emoji" else "--image-teacher"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One run to train and evaluate."""

    study: Study
    data: Pretraining
    arm: Arm
    seed: int
    out: Path
    transfer: tuple[str, ...]
    split: str = "validation"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A run: its metrics, and the seconds that training took."""

    task: Task
    metrics: Metrics
    seconds: float


def read_study(path: Path) -> Study:
    """A study file, checked but for the settings of its arms."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
        arms = {}
        for entry in tree["arms"]:
            own = {key: entry[key] for key in OWN if key in entry}
            settings = {key: value for key, value in entry.items() if key not in OWN}
            if isinstance(own.get("align"), dict):
                settings["align"], own["align"] = own["align"], True
            arm = Arm(**{"group": entry["name"], **own}, settings=settings)
            if arm.name in arms:
                raise ValueError(f"two arms are called '{arm.name}'")
            arms[arm.name] = arm
        study = Study(
            name=path.stem, question=tree["question"], reference=tree["reference"], arms=arms
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a study ({error}); --help shows one") from error
    return whole(study, str(path))


def whole(study: Study, where: str) -> Study:
    """The study, of which no arm that another needs is missing."""
    if study.reference not in study.groups:
        raise ValueError(f"{where}: reference: no group '{study.reference}'")
    for arm in study.arms.values():
        start = None if arm.start is None else study.arms.get(arm.start)
        if arm.start is not None and (start is None or start.start):
            raise ValueError(f"{where}: {arm.name}: start: name an arm that has no start itself")
    return study


def some_arms(study: Study, names: Sequence[str]) -> Study:
    """The study with these arms alone, in its own order.

    Without the reference the first of them stands for it, to measure more seeds of one arm and join
    them to those of others (joined.py).
    """
    if unknown := [name for name in names if name not in study.arms]:
        raise ValueError(f"--arms: {study.name} has no '{unknown[0]}', but {', '.join(study.arms)}")
    arms = {name: arm for name, arm in study.arms.items() if name in names}
    groups = [arm.group for arm in arms.values()]
    reference = study.reference if study.reference in groups else groups[0]
    return whole(replace(study, arms=arms, reference=reference), "--arms")


def at_size(study: Study, size: int) -> Study:
    """The study with images of another size in the arms that set one, or in all if none does."""
    given = {"model": {"image": {"size": size}}}

    def sets_one(arm: Arm) -> bool:
        return "size" in arm.settings.get("model", {}).get("image", {})

    arms = [*filter(sets_one, study.arms.values())] or study.arms.values()
    changed = {arm.name: replace(arm, settings=merge_trees(arm.settings, given)) for arm in arms}
    return replace(study, arms={**study.arms, **changed})


def starting_at(study: Study, start: str | None) -> Study:
    """The study, whose arms that fine-tune begin from this run, but those that name another arm."""
    without = [arm for arm in study.arms.values() if arm.finetune and arm.start is None]
    if without and start is None:
        raise ValueError(f"--start: name the run that '{without[0].name}' fine-tunes")
    if start is not None and not without:
        raise ValueError(f"--start: no arm of {study.name} fine-tunes a run that is given")
    given = {"model": {"start": start}}
    changed = {arm.name: replace(arm, settings=merge_trees(arm.settings, given)) for arm in without}
    return replace(study, arms={**study.arms, **changed})


def photographs(
    captions: str, *, root: str | None, teacher: str | None, image_teacher: str | None = None
) -> Pretraining:
    """Captioned photographs that the user names, with the settings that suit them."""
    settings = tomllib.loads(PHOTOGRAPHS.read_text(encoding="utf-8"))
    given = {"train": captions, **({"root": root} if root else {})}
    return Pretraining(
        name="photographs",
        settings=merge_trees(settings, {"data": given}),
        teacher=teacher,
        image_teacher=image_teacher,
    )


def pretrainings(given: argparse.Namespace) -> list[Pretraining]:
    """The data sets that the options name."""
    data = []
    if not given.without_emoji:
        teachers = {"teacher": "emoji", "image_teacher": given.emoji_image_teacher}
        data.append(Pretraining(name="emoji", settings={}, **teachers))
    if given.captions:
        teachers = {"teacher": given.teacher, "image_teacher": given.image_teacher}
        data.append(photographs(given.captions, root=given.root, **teachers))
    if not data:
        raise ValueError("--without-emoji: nothing is left to pretrain on; name --captions")
    return data


def settings_of(task: Task) -> dict[str, Any]:
    """What a run's data set and arm set, without the folder and the weights that it starts from."""
    arm, data = task.arm, task.data
    of_data = {"data": data.settings.get("data", {})}
    shared = merge_trees({"loss": LOSS}, data.settings) if arm.command == "train" else of_data
    tree = merge_trees(shared, arm.settings)
    for name in arm.unset:
        tree = leaving_out(tree, name.split("."))

    def resolved(teacher: Mapping[str, Any]) -> dict[str, Any]:
        own = {"own": data.teacher, "own images": data.image_teacher}
        features = teacher.get("features")
        if features not in own:
            return {"distil": 0.0, **teacher}
        if own[features] is None:
            option = "--teacher" if features == "own" else data.image_option
            raise ValueError(
                f"{arm.name}: the {data.name} have no such teacher; name its features with {option}"
            )
        return {"distil": 0.0, **teacher, "features": own[features]}

    tree["teacher"] = resolved(tree.get("teacher", {}))
    tree["teachers"] = [resolved(teacher) for teacher in tree.get("teachers", [])]
    return merge_trees(tree, {"run": {"name": arm.name, "seed": task.seed, "evaluate": False}})


def leaving_out(tree: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The tree without the setting that the keys lead to."""
    first, *rest = keys
    others = {key: value for key, value in tree.items() if key != first}
    if not rest or first not in tree:
        return others
    return {**others, first: leaving_out(tree[first], rest)}


def config_of(task: Task) -> Config:
    """The configuration of these settings."""
    arm = task.arm
    try:
        config = Config.from_dict(settings_of(task))
        if arm.command == "train":
            usual = config.episodes.count or presets.EPISODES
            count = max(1, round(arm.schedule * usual))
            config = replace(config, episodes=replace(config.episodes, count=count))
        check(config)
    except ValueError as error:
        raise ValueError(f"{task.study.name}: {arm.name}: {error}") from error
    return config


def name_folder(task: Task) -> Path:
    """Runs of equal settings share a folder, whatever study and arm they are of."""
    config = config_of(task)
    nameless = replace(config, run=replace(config.run, name="", seed=0))
    facts: dict[str, Any] = {"config": to_toml(nameless), "shift": task.arm.shift}
    facts["rotate"] = task.arm.rotate
    if task.arm.start is not None:
        facts["start"] = str(name_folder(replace(task, arm=task.study.arms[task.arm.start])))
    if task.arm.finetune:
        facts["finetune"] = True
    return task.out / "runs" / f"{digest(facts)[:12]}-{task.seed}"


def carry_out(task: Task) -> Measured:
    """Train unless that was done, then evaluate unless that was done."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    folder = name_folder(task)
    with log_to(folder.with_suffix(".log")):
        results = train(task)
        metrics = measure_run(folder, config_of(task), task.transfer, task.split)
    return Measured(task=task, metrics=metrics, seconds=results["train_seconds"])


def train(task: Task) -> dict[str, Any]:
    """The results of a run, which is trained if it was not, or not to its end."""
    config, folder, arm = config_of(task), name_folder(task), task.arm
    if (folder / "results.json").is_file():
        return dict(read_json(folder / "results.json"))
    model, before = config.model, None
    if arm.start is not None:
        first = replace(task, arm=task.study.arms[arm.start])
        train(first)
        before = name_folder(first)
    if arm.finetune:  # whose defaults count what is set, which a configuration does not tell
        given = {"run": {"out": str(folder)}}
        if before is not None:
            given["model"] = {"start": str(before)}
        return finished(finetune(merge_trees(settings_of(task), given), alpha=1.0, resume="auto"))
    if arm.start is not None or arm.displaces:
        start = folder.with_suffix(".start")
        if not (start / MODEL).is_file():
            displaced(config, before, start, rotate=arm.rotate, shift=arm.shift)
        model = replace(model, start=str(start))
    own = replace(config, model=model, run=replace(config.run, out=str(folder)))
    return finished((align if arm.align else run.train)(own, resume="auto"))


def finished(results: dict[str, Any]) -> dict[str, Any]:
    """The results of a run that no signal stopped."""
    if "stopped" in results:
        raise KeyboardInterrupt
    return results


def displaced(
    config: Config, before: Path | None, folder: Path, *, rotate: bool, shift: float
) -> None:
    """Write a start whose text features lie elsewhere: a modality gap as large as one likes.

    Text features are turned by a random rotation of the joint space, then moved by a random
    vector, `shift` times as long as they are in the mean. Both go into the last weights of the
    text tower, so that the model stays what it is. The start is a run, or untrained.
    """
    seed = config.run.seed
    start = make_plan(config).start
    model = loading.load(before)[0] if before else loading.build_model(start, seed=seed)
    towers: Any = model.towers
    if not isinstance(getattr(towers, "text_projection", None), torch.Tensor):
        raise ValueError(f"{config.run.name}: rotate and shift need the small text tower")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        width, joint = towers.text_projection.shape
        if rotate:
            turn = torch.linalg.qr(torch.randn(joint, joint, generator=generator))[0]
            towers.text_projection.copy_(towers.text_projection @ turn)
        if shift:
            samples = sources.open_samples(config)
            assert isinstance(samples, Pairs)
            rows = range(min(256, len(samples)))
            tokens = start.tokenizer()([samples.sample_captions(row)[0] for row in rows])
            length = model.eval().encode_text(tokens).norm(dim=1).mean()
            # The bias before the projection moves features within the space that these fill.
            way = torch.randn(width, generator=generator)
            way *= shift * length / (way @ towers.text_projection).norm()
            towers.ln_final.bias.add_(way)
    facts = {MODEL: start.description}
    write_checkpoint(folder, {WEIGHTS: dict(model.state_dict())}, facts)


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Append what is said on stderr to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file, redirect_stderr(file):
        yield


def end_with_parent() -> None:
    """End this worker process when its parent does: a killed study shall not train on."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def workers(jobs: int) -> ProcessPoolExecutor:
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, mp_context=spawn, initializer=end_with_parent)


def carry_out_all(tasks: Sequence[Task], jobs: int, label: str) -> list[Measured]:
    """All tasks, some at a time; those that others start from come first."""
    progress, done = Progress(label, len(tasks)), dict[int, Measured]()
    starts = {task.arm.start for task in tasks}
    waves = [
        [number for number, task in enumerate(tasks) if (task.arm.name in starts) == first]
        for first in (True, False)
    ]

    def note(number: int, found: Measured) -> None:
        done[number] = found
        progress.update(len(done), found.task.arm.name)

    if jobs == 1:
        for number in (number for wave in waves for number in wave):
            note(number, carry_out(tasks[number]))
        return [done[number] for number in range(len(tasks))]
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes below
    with workers(jobs) as pool:
        for wave in waves:
            found = pool.map(carry_out, [tasks[number] for number in wave])
            for number, run in zip(wave, found, strict=True):
                note(number, run)
    return [done[number] for number in range(len(tasks))]


# From runs to tables.


def difference(found: Mapping[int, Measured], other: Mapping[int, Measured], metric: str) -> Any:
    """How much higher a metric of the first runs is, by seed; its interval as the file's head says.

    `None` if they share no seed.
    """
    seeds = [seed for seed in found if seed in other]
    if not seeds:
        return None
    gaps = np.stack([found[s].metrics[metric] - other[s].metrics[metric] for s in seeds])
    mean = float(gaps[:, 0].mean())
    of_samples = half_width([0.0], gaps[:, 1:])
    of_seeds = half_width(gaps[:, 0].tolist())
    ends = None  # without influences, as AMI is
    if math.isfinite(of_samples):
        ends = interval_of_difference(gaps[:, 0].tolist(), gaps[:, 1:])
    return {
        "mean": mean,
        "interval": ends,
        "half_width": {"seeds": of_seeds, "samples": of_samples},
        "by_seed": dict(zip(seeds, gaps[:, 0].tolist(), strict=True)),
        "beyond": ends is not None and not ends[0] <= 0 <= ends[1],
    }


def by_arm(runs: Sequence[Measured]) -> dict[str, dict[int, Measured]]:
    found: dict[str, dict[int, Measured]] = {}
    for entry in runs:
        found.setdefault(entry.task.arm.name, {})[entry.task.seed] = entry
    return found


def winners(study: Study, runs: Sequence[Measured]) -> dict[str, str]:
    """Of each group the arm with the best mean over data sets, seeds and metrics on validation."""
    assert all(entry.task.split == "validation" for entry in runs), "choices are made on validation"
    scores: dict[str, list[float]] = {}
    for entry in runs:
        scores.setdefault(entry.task.arm.name, []).append(float(entry.metrics[ALL][0]))
    means = {name: float(np.mean(values)) for name, values in scores.items()}
    return {
        group: max((arm.name for arm in arms), key=means.__getitem__)
        for group, arms in study.groups.items()
    }


def entries(study: Study, runs: Sequence[Measured], chosen: Mapping[str, str]) -> list[Any]:
    """The arms of one data set, with their metrics and differences to the reference."""
    arms = by_arm(runs)
    reference = arms[chosen[study.reference]]
    base = np.mean([run.seconds for run in reference.values()])
    found = []
    for name, members in arms.items():
        metrics = {}
        for metric in next(iter(members.values())).metrics:
            values = [float(run.metrics[metric][0]) for run in members.values()]
            metrics[metric] = {
                "mean": float(np.mean(values)),
                "by_seed": dict(zip(members, values, strict=True)),
            }
            if members is not reference:
                metrics[metric]["difference"] = difference(members, reference, metric)
        seconds = float(np.mean([run.seconds for run in members.values()]))
        arm = study.arms[name]
        found.append(
            {
                "name": name,
                "group": arm.group,
                "chosen": chosen[arm.group] == name,
                "settings": dict(arm.settings),
                "metrics": metrics,
                "train_seconds": seconds,
                "time": seconds / base,
            }
        )
    return found


def reached(study: Study, found: Sequence[Any], chosen: Mapping[str, str]) -> list[str]:
    """At which share of the reference's wall clock a group's schedules reach its quality."""
    goals = next(entry for entry in found if entry["name"] == chosen[study.reference])["metrics"]
    lines = []
    for group, arms in study.groups.items():
        names = [arm.name for arm in arms]
        points = sorted((e for e in found if e["name"] in names), key=lambda e: e["time"])
        if group == study.reference or len({arm.schedule for arm in arms}) < 2 or len(points) < 2:
            continue
        for metric in [name for name in DECIDING if name in goals]:
            goal = goals[metric]["mean"]
            curve = [(point["time"], point["metrics"][metric]["mean"]) for point in points]
            share = "not reached"
            if curve[0][1] >= goal:
                share = f"at most {curve[0][0]:.2f}"
            for (x0, y0), (x1, y1) in pairwise(curve):
                if y0 < goal <= y1:
                    share = f"{x0 + (x1 - x0) * (goal - y0) / (y1 - y0):.2f}"
                    break
            lines.append(f"- {group} reaches {study.reference}'s {metric} at: {share}")
    if not lines:
        return []
    return ["Share of the reference's wall clock, by lines between schedules:", "", *lines, ""]


def cell(value: Mapping[str, Any] | None) -> str:
    """Percent, and below it the difference with its interval; a star where that leaves out 0."""
    if value is None:
        return "-"
    text = f"{100 * value['mean']:.1f}"
    if (gap := value.get("difference")) is not None:
        text += f"<br>{100 * gap['mean']:+.1f}"
        if gap["interval"] is not None:
            low, high = (f"{100 * end:+.1f}" for end in gap["interval"])
            text += f" [{low}, {high}]" + "*" * gap["beyond"]
    return text


def table(study: Study, found: Sequence[Any], metrics: Sequence[str]) -> list[str]:
    """One row an arm."""
    lines = ["| arm | " + " | ".join(metrics) + " | time |", "|---" * (len(metrics) + 2) + "|"]
    for entry in found:
        several = len(study.groups[entry["group"]]) > 1
        best = f" (best of {entry['group']})" if entry["chosen"] and several else ""
        cells = [cell(entry["metrics"].get(metric)) for metric in metrics]
        lines.append(f"| {entry['name']}{best} | {' | '.join(cells)} | {entry['time']:.2f} |")
    return [*lines, ""]


def single(found: Sequence[Any], metrics: Sequence[str]) -> list[str]:
    """One row a metric."""
    names = [entry["name"] for entry in found]
    lines = ["| metric | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for metric in metrics:
        cells = [cell(entry["metrics"].get(metric)) for entry in found]
        lines.append(f"| {metric} | {' | '.join(cells)} |")
    return [*lines, ""]


def report(
    study: Study, runs: Sequence[Measured], chosen: Mapping[str, str], *, command: str, opened: int
) -> tuple[str, dict[str, Any]]:
    """The tables in Markdown, and all that is known as JSON."""
    split = runs[0].task.split
    tried = {group: len(arms) for group, arms in study.groups.items()}
    seeds = sorted({entry.task.seed for entry in runs})
    environment = describe_environment(torch.device("cpu"))
    counts = ", ".join(f"{group} {number}" for group, number in tried.items())
    lines = [
        f"# {study.name}: {study.question}",
        "",
        f"`{command}`, {datetime.date.today().isoformat()}; {environment['device']}, "
        f"torch {environment['torch']}, protoclip {environment['protoclip']}.",
        "",
        f"Split: {split}; seeds {seeds}. Settings tried, by group: {counts}. "
        + (f"The test split was opened {opened} time(s). " if split == "test" else "")
        + f"Percent; below, the difference to {chosen[study.reference]} with its 95% interval over "
        + ("seeds and samples" if len(seeds) > 1 else "samples (one seed)")
        + "; * where it leaves out 0. Time is the wall clock of training over the reference's.",
        "",
    ]
    facts: dict[str, Any] = {}
    for name in dict.fromkeys(entry.task.data.name for entry in runs):
        own = [entry for entry in runs if entry.task.data.name == name]
        found = facts[name] = entries(study, own, chosen)
        deciding = [metric for metric in DECIDING if metric in found[0]["metrics"]]
        others = [metric for metric in found[0]["metrics"] if metric not in DECIDING]
        lines += [f"## Pretrained on {name}", "", *table(study, found, deciding)]
        lines += reached(study, found, chosen)
        lines += ["### Single metrics", "", *single(found, others)]
    content = {
        "study": study.name,
        "question": study.question,
        "command": command,
        "date": datetime.date.today().isoformat(),
        "environment": environment,
        "split": split,
        "seeds": seeds,
        "transfer": list(runs[0].task.transfer),
        "settings_tried": tried,
        "chosen_on_validation": dict(chosen),
        "test_opened": opened,
        "pretraining": facts,
    }
    return "\n".join(lines), content


def open_test(study: Study, data: Sequence[Pretraining], out: Path) -> int:
    """Note that the test split is looked at; returns how often it was, this time included.

    Raises:
        ValueError: It was opened before for other arms.
    """
    path = out / "test-opened.jsonl"
    # Other commands than `train` count where they are set, so that files from before still match.
    other = {"align": " align", "finetune": " finetune", "train": ""}
    arms = digest({name: repr(arm) + other[arm.command] for name, arm in study.arms.items()})
    before = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    own = [entry for entry in map(json.loads, before) if entry["study"] == study.name]
    for entry in own:
        if entry["arms"] != arms:
            raise ValueError(
                f"{study.name}: its test split was opened on {entry['date']} for other arms, so it "
                "cannot evaluate a new choice; choose on validation, and confirm on other data"
            )
    today = datetime.date.today().isoformat()
    names = [data_set.name for data_set in data]
    entry = {"study": study.name, "date": today, "arms": arms, "pretraining": names}
    with path.open("a", encoding="utf-8") as file:
        file.write(to_json(entry) + "\n")
    return len(own) + 1


def options(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, help="a TOML file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="these alone")
    parser.add_argument("--image-size", type=int, help="of all arms, if not the study's")
    parser.add_argument("--start", metavar="RUN", help="what arms without a start fine-tune")
    parser.add_argument("--captions", help="photographs to pretrain on, as data.train takes them")
    parser.add_argument("--root", help="folder of the photographs, as data.root")
    parser.add_argument("--teacher", help="features of their captions, as teacher.features")
    parser.add_argument("--image-teacher", help="features of the photographs, as a Parquet file")
    parser.add_argument("--without-emoji", action="store_true", help="do not pretrain on emoji")
    parser.add_argument("--emoji-image-teacher", help="features of the emoji, as a Parquet file")
    parser.add_argument("--transfer", nargs="+", default=["emoji"], help="emoji, or wds:FOLDER")
    parser.add_argument("--test", action="store_true", help="then measure what was chosen on test")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/studies"), help="one for each data")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    given = options(words)
    try:
        study_of(given, shlex.join(sys.argv[1:] if words is None else words))
    except ValueError as error:
        raise SystemExit(f"study.py: error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("study.py: interrupted; the same command goes on") from None


def study_of(given: argparse.Namespace, words: str) -> None:
    """What `main` was asked to do."""
    study = read_study(given.study)
    if given.arms is not None:
        study = some_arms(study, given.arms)
    study = starting_at(study, given.start)
    if given.image_size is not None:
        study = at_size(study, given.image_size)
    data = pretrainings(given)
    tasks = [
        Task(
            study=study,
            data=data_set,
            arm=arm,
            seed=seed,
            out=given.out,
            transfer=tuple(given.transfer),
        )
        for seed in given.seeds
        for data_set in data
        for arm in study.arms.values()
    ]
    for task in tasks:
        config_of(task)  # refuse mistakes before anything is trained
    given.out.mkdir(parents=True, exist_ok=True)
    command = f"python benchmarks/studies/study.py {words}"
    runs = carry_out_all(tasks, given.jobs, f"study: {study.name}")
    chosen, opened = winners(study, runs), 0
    write(given.out, study, runs, chosen, command=command, opened=opened)
    if given.test:
        opened = open_test(study, data, given.out)
        best = [replace(t, split="test") for t in tasks if t.arm.name in chosen.values()]
        tested = carry_out_all(best, given.jobs, f"study: {study.name}, test")
        write(given.out, study, tested, chosen, command=command, opened=opened)
    spent = sum({str(name_folder(entry.task)): entry.seconds for entry in runs}.values())
    print(f"Training took {duration(spent)} on one thread a run.", file=sys.stderr)


def write(
    out: Path, study: Study, runs: Sequence[Measured], chosen: Mapping[str, str], **more: Any
) -> None:
    """Print the tables, and keep them beside the runs."""
    text, content = report(study, runs, chosen, **more)
    print(text)
    name = f"{study.name}-{runs[0].task.split}"
    write_atomically(out / f"{name}.md", text)
    write_atomically(out / f"{name}.json", to_json(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
