"""Features meet: every pair of them that can be switched on together runs, and ends as it should.

`FEATURES` names what can be chosen, the plain choice first. Each row of `rows()` is one small run;
together the rows hold every pair of choices.

A run has to end with the weights of its plain twin: the same data, teacher, prototypes and stages,
in one process, without cache, workers or interruption. On one process they are equal bit for bit.
"""

import itertools
import json
import random
import shutil
from dataclasses import replace
from functools import cache, partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch._dynamo
from fsspec.registry import _registry
from PIL import Image
from torch import Tensor

import interrupting
import tiny_tower  # noqa: F401 (timm knows it then)
from interrupting import few_emoji, relative_difference, with_changes
from protoclip.config import Config, ModelConfig, SourceConfig
from protoclip.data import sources, tools
from protoclip.data.pairs import ImageTextPairs, Pairs
from protoclip.distributed import collectives
from protoclip.evaluation import datasets, probes
from protoclip.models.checkpoint import (
    MODEL,
    WEIGHTS,
    find_checkpoint,
    model_json,
    read_section,
    read_tensors,
    write_checkpoint,
)
from protoclip.training import plan
from protoclip.training.plan import make_plan
from protoclip.training.run import train
from testing import build_model, run_distributed, save_to_bytes, tiny_config

FEATURES = {
    "source": ("parquet", "folder", "shards", "stream", "emoji"),
    "mixture": ("no", "yes"),
    "cache": (0.0, 4.0),
    "augmentation": ("auto", "clip"),
    "workers": (0, 1),
    "teacher": ("no", "one", "two"),
    "loss": ("info_nce", "sigmoid"),
    "positives": ("pair", "shared"),
    "captions": ("one", 2, "all", "sentences"),
    "prototypes": ("extract", "queue"),
    "ranks": ("one", "ddp", "fsdp"),
    "towers": ("resnet", "vit"),
    "accumulation": ("no", "yes"),
    "resume": ("no", "yes", "elsewhere"),
    "evaluation": ("no", "yes"),
    "locked": ("no", "yes"),
    "start": ("no", "yes"),
    "keep": ("no", "yes"),
    "distil": ("no", "yes"),
    "lora": ("no", "yes"),
    "precision": ("fp32", "bf16"),
    "guard": ("no", "yes"),
    "checkpointing": ("no", "yes"),
    "compile": ("no", "yes"),
}
PLAIN = {feature: choices[0] for feature, choices in FEATURES.items()}
# What changes how a run comes about, and must not change where it ends.
NEUTRAL = (
    *("cache", "workers", "ranks", "resume", "evaluation"),
    *("guard", "checkpointing", "compile"),
)
# Towers are the same whatever these are. The others meet towers that are compiled, which takes
# several times as long; with these it is enough that the setting is on.
FAR_FROM_TOWERS = (
    *("source", "mixture", "cache", "augmentation", "workers"),
    *("positives", "prototypes", "guard"),
)
STEPS_AN_EPISODE, BATCH = 2, 16

WORDS = list("abcdefghijklmno")

Row = dict[str, Any]
Choice = tuple[str, Any]

# Worker processes keep no images in memory: this pair runs, in a row of its own, so that it does
# not stand for a cache in another.
SEPARATE = frozenset({("cache", 4.0), ("workers", 1)})
# What the settings refuse together.
REFUSED = [
    frozenset(pair)
    for pair in (
        (("keep", "yes"), ("start", "no")),
        *((("captions", several), ("positives", "pair")) for several in (2, "all")),
        # How many captions an image has is not known of a stream, nor which.
        (("captions", "all"), ("source", "stream")),
        (("lora", "yes"), ("ranks", "fsdp")),
        (("lora", "yes"), ("compile", "yes")),
        # BatchNorm would count twice.
        (("towers", "resnet"), ("checkpointing", "yes")),
    )
]
# What the settings allow, and no row needs: without a teacher there is nothing to distil, and
# BatchNorm sees a micro-batch, which makes another run.
POINTLESS = [
    frozenset({("distil", "yes"), ("teacher", "no")}),
    frozenset({("towers", "resnet"), ("accumulation", "yes")}),
]


def allowed(row: Row) -> bool:
    return not any(row.items() >= pair for pair in (SEPARATE, *REFUSED, *POINTLESS))


@cache
def wanted() -> list[frozenset[Choice]]:
    """Every pair of choices of two features that can be run and compared."""
    pairs = (
        frozenset({(one, first), (other, second)})
        for (one, firsts), (other, seconds) in itertools.combinations(FEATURES.items(), 2)
        for first in firsts
        for second in seconds
    )
    return [pair for pair in pairs if pair not in (*REFUSED, *POINTLESS)]


@cache
def rows() -> list[Row]:
    """Few runs that hold every pair: each starts from a pair that is missing and adds, feature by
    feature, a choice that brings the most of the others. Chance decides among equal ones, and this
    seed has the fewest rows of some thousand: 27, of which 9 are compiled."""
    chance = random.Random(107)
    found = [PLAIN | dict(SEPARATE)]
    missing = set(wanted()) - pairs_of(found[0])
    while missing:
        row = dict(chance.choice([pair for pair in wanted() if pair in missing]))
        features = list(FEATURES)
        chance.shuffle(features)
        for feature in sorted(features, key=lambda name: -len(FEATURES[name])):
            if feature in row:
                continue
            candidates = [row | {feature: choice} for choice in FEATURES[feature]]
            brings = {n: len(missing & pairs_of(r)) for n, r in enumerate(candidates) if allowed(r)}
            most = [n for n in brings if brings[n] == max(brings.values())]
            row = candidates[most[0] if feature == "ranks" else chance.choice(most)]
        missing -= pairs_of(row)
        found.append({feature: row[feature] for feature in FEATURES})
    return found


def pairs_of(row: Row) -> set[frozenset[Choice]]:
    return {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}


@cache
def compiled() -> list[str]:
    """The names of a few rows whose towers are compiled with each choice that is not far."""
    found = [row for row in rows() if row["compile"] == "yes"]
    missing = {
        pair
        for pair in wanted()
        if ("compile", "yes") in pair and not {feature for feature, _ in pair} & {*FAR_FROM_TOWERS}
    }
    names = []
    while missing:
        row = max(found, key=lambda candidate: len(missing & pairs_of(candidate)))
        missing -= pairs_of(row)
        names.append(name(row))
    return names


def name(row: Row) -> str:
    """The choices that are not the plain ones."""
    unusual = [f"{f}={c}" for f, c in row.items() if f == "source" or c != PLAIN[f]]
    return " ".join(unusual)


# Data: two sources of every kind, with the same names of samples and other images.


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("pairs")
    for number, source in enumerate("ab"):
        table = table_of(number)
        pq.write_table(table, top / f"{source}.parquet")
        (top / source).mkdir()
        lines = ["path,caption,sample_id,kind"]
        for row in table.to_pylist():
            image = top / source / f"{row['sample_id']}.png"
            image.write_bytes(row["image"])
            image.with_suffix(".json").write_text(json.dumps({"caption": row["caption"]}))
            names = f"{source}/{image.name},{row['caption'][0]}"  # the others have two captions
            lines.append(f"{names},{row['sample_id']},{row['kind']}")
        (top / f"{source}.csv").write_text("\n".join(lines) + "\n")
        tools.pack(ImageTextPairs(table, name=source), top / f"{source}-tar", samples_per_shard=8)
    guard = (top / "b.csv").read_text().splitlines()[:9]
    (top / "guard.csv").write_text("\n".join(guard) + "\n")
    return top


def table_of(seed: int) -> pa.Table:
    """Pictures and captions that all differ, so that rounding does not decide who is nearest. Each
    caption has two sentences."""
    generator = np.random.default_rng(seed)
    columns: dict[str, list[Any]] = {"image": [], "caption": [], "sample_id": [], "kind": []}
    for row in range(40):
        pixels = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((80, 80), Image.Resampling.BILINEAR)
        columns["image"].append(save_to_bytes(image))
        words = iter(generator.choice(WORDS, (4, 3)))
        columns["caption"].append(
            [f"{' '.join(next(words))}. {' '.join(next(words))}." for _ in range(2)]
        )
        columns["sample_id"].append(f"{row:04}")
        columns["kind"].append(f"kind {row % 9}")
    return pa.table(columns)


def source_paths(kind: str, data: Path) -> tuple[str, str]:
    if kind == "emoji":
        return "emoji", str(data / "a.parquet")
    ending = {"folder": "", "shards": "-tar", "stream": "-tar"}.get(kind, f".{kind}")
    return str(data / f"a{ending}"), str(data / f"b{ending}")


def validation(row: Row, data: Path) -> float | str | None:
    """What a run is evaluated by: a quarter of its pairs, or another source for those that have no
    end or are many. The emoji have splits of their own."""
    if row["source"] == "emoji" and row["mixture"] == "no":
        return None
    if row["evaluation"] == "no":
        return 0.0
    return str(data / "b.parquet") if row["source"] in ("stream", "emoji") else 0.25


def config_for(row: Row, data: Path, out: Path) -> Config:
    base = tiny_config(out=str(out))
    one, other = source_paths(row["source"], data)
    mixed = [SourceConfig(path=path, weight=weight) for path, weight in ((one, 2.0), (other, 1.0))]
    sections: dict[str, dict[str, Any]] = {
        "run": {
            "save_minutes": 0.0,
            "evaluate": False,
            "evaluate_every": 2 if "yes" in (row["evaluation"], row["guard"]) else 0,
            "guard": [str(data / "guard.csv")] if row["guard"] == "yes" else [],
            "precision": row["precision"],
            "sync": f"s3://{out}-bucket" if row["resume"] == "elsewhere" else None,
        },
        "data": {
            **({"sources": mixed} if row["mixture"] == "yes" else {"train": one}),
            "read": "streaming" if row["source"] == "stream" else "auto",
            "shuffle_buffer": 20,
            "validation": validation(row, data),
            "cache_gb": row["cache"],
            "augmentation": row["augmentation"],
            "workers": row["workers"],
            "captions": row["captions"],
        },
        "episodes": {
            "size": STEPS_AN_EPISODE * BATCH,
            "count": 3,
            "micro_batch_size": 4 if row["accumulation"] == "yes" else None,
            "locked_image": int(row["locked"] == "yes"),
        },
        "loss": {
            "instance": row["loss"],
            "positives": row["positives"],
            **({"keep": 1.0} if row["keep"] == "yes" else {}),
        },
        "prototypes": {"source": row["prototypes"], "number": 6},
        # A large epsilon keeps what rounding does to small gradients small.
        "optim": {"eps": 1e-2, "warm_up_steps": 0},
        "parallel": {
            "strategy": "fsdp" if row["ranks"] == "fsdp" else "ddp",
            "sync_batch_norm": True,
            "activation_checkpointing": row["checkpointing"] == "yes",
            "compile": row["compile"] == "yes",
        },
    }
    config = replace(with_changes(base, sections), model=model_for(row, base.model, data))
    if row["teacher"] != "no":
        teachers = [
            replace(base.teacher, name=name, features=str(path), number=6, whiten=4)
            for name, path in teacher_files(config, row, data).items()
        ]
        if row["distil"] == "yes":  # the default of teachers whose tower is known
            teachers = [
                replace(teacher, tower=tower)
                for teacher, tower in zip(teachers, ("image", "text"), strict=False)
            ]
        one = len(teachers) == 1
        config = replace(config, teacher=teachers[0]) if one else replace(config, teachers=teachers)
    return config


def model_for(row: Row, base: ModelConfig, data: Path) -> ModelConfig:
    if row["towers"] == "vit":
        base = replace(base, image=replace(base.image, name="one_block"))
    if row["start"] == "yes":
        start = data / f"start-{base.image.name}"
        if not start.exists():
            weights = dict(build_model(base, seed=1).state_dict())
            write_checkpoint(start, {WEIGHTS: weights}, {MODEL: model_json(base, None)})
        base = replace(base, start=str(start))
    return replace(base, lora=2 if row["lora"] == "yes" else None)


def teacher_files(config: Config, row: Row, data: Path) -> dict[str, Path]:
    files = {}
    for number, teacher in enumerate(("first", "second")[: 1 + (row["teacher"] == "two")]):
        files[teacher] = data / f"{teacher}-{row['source']}-{row['mixture']}.parquet"
        if not files[teacher].exists():
            write_teacher(config, files[teacher], seed=number)
    return files


def write_teacher(config: Config, path: Path, *, seed: int) -> None:
    """Features that follow from a sample's id, of all samples but every seventh. Two teachers know
    much the same of a sample, so they are aligned where they teach a tower each."""
    samples = sources.open_samples(config)
    if isinstance(samples, Pairs):
        ids = list(samples.sample_ids())
    else:
        ids = [sample.sample_id for sample in itertools.islice(samples.samples(0), 200)]
    listed = [sample_id for row, sample_id in enumerate(sorted(set(ids))) if row % 7]
    known = np.stack([np.random.default_rng([*key.encode()]).normal(size=4) for key in listed])
    draw = np.random.default_rng(seed)
    features = known @ draw.normal(size=(4, 8)) + 0.01 * draw.normal(size=(len(listed), 8))
    pq.write_table(
        pa.table({"sample_id": listed, "features": [f.tolist() for f in features]}), path
    )


# Runs, in the processes of a group or in this one.


def trained(
    config: Config,
    stop_after: int | None = None,
    first: Config | None = None,
    compiles: bool = True,
) -> Any:
    """Weights at a run's end and its last evaluation; all ranks return the same weights.

    With `stop_after` the run begins with the settings of `first`, is told to stop after that step,
    and goes on with its own; from a bucket, if it has one, in a folder that is gone.
    """
    # One process compiles its towers for all cases, each of several for the first, training.
    torch._dynamo.reset()
    cases = torch._dynamo.config.patch(recompile_limit=8 if collectives.world_size() == 1 else 1)
    with pytest.MonkeyPatch.context() as patch, cases:
        patch.setattr(datasets, "emoji", few_emoji)
        patch.setattr(probes, "TOLERANCE", 0.03)
        patch.setattr(plan, "FEWEST_TO_ALIGN", 20)
        patch.setitem(_registry, "s3", interrupting.SharedBucket)
        # Without the minutes of its compiler, and bit for bit; tests/compile has that one.
        eager = partialmethod(torch.nn.Module.compile, backend="eager")
        patch.setattr(torch.nn.Module, "compile", eager if compiles else lambda module, **_: None)
        if stop_after is not None:
            with patch.context() as stopping:
                interrupting.stop_after(stop_after, stopping)
                assert train(first)["steps"] == stop_after
            if config.run.sync is not None and collectives.rank() == 0:
                shutil.rmtree(str(config.run.out))
        train(config, resume="auto" if stop_after is not None else "never")
    folder = Path(str(config.run.out))
    return read_tensors(find_checkpoint(folder) / "model.safetensors"), evaluations(folder)


def evaluations(folder: Path) -> dict[str, float]:
    found = interrupting.read_metrics(folder, "eval/")
    return {k: v for k, v in found[-1].items() if k.startswith("eval/")} if found else {}


twins: dict[str, tuple[dict[str, Tensor], dict[str, float]]] = {}


def twin(row: Row, data: Path, out: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The end of the run that has none of the neutral choices but evaluation.

    With `compile` nothing is compiled, but captions keep their padding as there. Sums over rows of
    zeros more are rounded otherwise by some processors.
    """
    # A stream has as many lanes as the run has ranks when it begins.
    kept = {"evaluation", "compile", *({"ranks"} if row["source"] == "stream" else ())}
    plain = row | {feature: PLAIN[feature] for feature in NEUTRAL if feature not in kept}
    if name(plain) not in twins:
        ranks = 1 if plain["ranks"] == "one" else 2
        arguments = (config_for(plain, data, out), None, None, False)
        twins[name(plain)] = run_distributed(trained, ranks, *arguments)[0]
    return twins[name(plain)]


@pytest.mark.parametrize("row", rows(), ids=name)
def test_a_run_ends_as_its_plain_twin(row, data, tmp_path):
    """Bit for bit on one process; on two, to a twentieth of the way that the weights went.

    Rounding may move a sample that lies between two prototypes, which is worth a hundredth here; a
    wrong image, caption, gradient or position is worth half of the way and more. BatchNorm over
    ranks rounds otherwise than that of one process, which in bf16 is worth up to a third.
    """
    expected, scores = twin(row, data, tmp_path / "twin")
    config = config_for(row, data, tmp_path / "run")
    arguments: tuple[Any, ...] = (config, None, None, name(row) in compiled())
    if row["resume"] != "no":
        # Within the episode that has prototypes; what changes nothing is changed on the way.
        plain = config_for(row | {"cache": 0.0, "workers": 0}, data, tmp_path / "run")
        arguments = (config, STEPS_AN_EPISODE + 1, plain, arguments[-1])
    ends = run_distributed(trained, 1 if row["ranks"] == "one" else 2, *arguments)
    is_joint = row["teacher"] == "two" and row["distil"] == "yes" and row["source"] != "stream"
    assert bool(read_section(find_checkpoint(tmp_path / "run"), "joint")) == is_joint
    for weights, scored in ends:
        guarded = [key for key in scored if key.startswith("eval/guard")]
        assert bool(guarded) == (row["guard"] == "yes")
        metrics = {key: value for key, value in scored.items() if key not in guarded}
        if row["source"] == "emoji" and row["evaluation"] == "no":
            metrics = {}  # their own splits evaluate a run that has a guard
        assert weights.keys() == expected.keys()
        if row["ranks"] == "one":
            assert [k for k in weights if not torch.equal(weights[k], expected[k])] == []
            assert metrics == scores
        else:
            rounds = (row["towers"], row["precision"]) == ("resnet", "bf16")
            nearest = 0.35 if rounds else 0.05
            assert relative_difference(weights, expected, config) < nearest
            assert metrics.keys() == scores.keys()
            # Rounding turns recalls of ten pairs by a tenth.
            close = [key for key in scores if "eval/emoji" in key or "modality_gap" in key]
            for key in close:
                assert metrics[key] == pytest.approx(scores[key], abs=0.1)
    assert bool(scores) == (row["evaluation"] == "yes")


def test_chosen_samples_end_as_data_without_the_others(data, tmp_path):
    """Lists of sample ids, with a mixture, caches and an interruption: bit for bit."""
    row = PLAIN | {"source": "parquet", "mixture": "yes"}
    fewer, dropped, kept = tmp_path / "data", [], []
    fewer.mkdir()
    for source in "ab":
        table = pq.read_table(data / f"{source}.parquet")
        ids = [f"{source}.parquet/{sample_id}" for sample_id in table["sample_id"].to_pylist()]
        left_out = range(source == "b", len(ids), 5)
        stays = [place for place in range(len(ids)) if place not in left_out]
        pq.write_table(table.take(stays), fewer / f"{source}.parquet")
        dropped += [ids[place] for place in left_out]
        kept += [ids[place] for place in stays]
    (tmp_path / "kept.json").write_text(json.dumps(kept))
    (tmp_path / "dropped.csv").write_text("\n".join(["sample_id", *dropped]) + "\n")
    (expected, _), *_ = run_distributed(trained, 1, config_for(row, fewer, tmp_path / "twin"))
    for kind, chosen in ((0.0, {"only": "kept.json"}), (4.0, {"without": "dropped.csv"})):
        lists = {"data": {key: str(tmp_path / name) for key, name in chosen.items()}}
        out = tmp_path / str(kind)
        first, config = (
            with_changes(config_for(row | {"cache": value}, data, out), lists)
            for value in (0.0, kind)
        )
        ((weights, _),) = run_distributed(trained, 1, config, STEPS_AN_EPISODE + 1, first)
        assert [k for k in weights if not torch.equal(weights[k], expected[k])] == []


@pytest.mark.parametrize("pair", REFUSED, ids=lambda pair: name(PLAIN | dict(pair)))
def test_the_settings_refuse_what_is_left_out_as_refused(pair, data, tmp_path):
    """So that none is left out which the settings have come to allow."""
    names = (
        r"data\.captions|loss\.(keep|positives)|model\.lora|"
        r"parallel\.activation_checkpointing"
    )
    config = config_for(PLAIN | dict(pair), data, tmp_path / "run")
    with pytest.raises(ValueError, match=f"^({names}): "):
        make_plan(config)
