"""The command line: train, evaluate, compare, demo, embed-teacher, data."""

import json as json_format
import os
import sys
import time
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn

import jsonargparse
import torch
from jsonargparse import ArgumentParser, auto_cli

from protoclip.cli.demo import demo as run_demo
from protoclip.cli.prepare import embed as run_embedding
from protoclip.cli.prepare import index as run_indexing
from protoclip.cli.prepare import inspect as run_inspection
from protoclip.cli.prepare import pack as run_packing
from protoclip.config import (
    PERMISSIONS,
    Config,
    DataConfig,
    EpisodeConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrototypeConfig,
    RunConfig,
    TeacherConfig,
)
from protoclip.distributed import collectives
from protoclip.evaluation import compare as comparison
from protoclip.files import to_json
from protoclip.models import loading
from protoclip.training.guard import out_of_memory
from protoclip.training.run import train as run_training
from protoclip.training.session import evaluate as run_evaluation

# Seconds that other processes wait for the first one to tell what is wrong with the command.
FIRST_SPEAKS = 5.0


def train(
    *,
    run: RunConfig = RunConfig(),  # noqa: B008  frozen, so one shared default is safe
    data: DataConfig = DataConfig(),  # noqa: B008
    model: ModelConfig = ModelConfig(),  # noqa: B008
    episodes: EpisodeConfig = EpisodeConfig(),  # noqa: B008
    prototypes: PrototypeConfig = PrototypeConfig(),  # noqa: B008
    teacher: TeacherConfig = TeacherConfig(),  # noqa: B008
    teachers: list[TeacherConfig] | None = None,
    loss: LossConfig = LossConfig(),  # noqa: B008
    optim: OptimConfig = OptimConfig(),  # noqa: B008
    parallel: ParallelConfig = ParallelConfig(),  # noqa: B008
    resume: Literal["never", "auto"] = "never",
    json: bool = False,
) -> None:
    """Train a model and evaluate it.

    Args:
        teachers: Several external teachers, in place of `teacher`.
        resume: `auto` goes on with the run that is in the folder, or starts one.
        json: Print the results as JSON.
    """
    config = Config(
        run=run,
        data=data,
        model=model,
        episodes=episodes,
        prototypes=prototypes,
        teacher=teacher,
        teachers=teachers or [],
        loss=loss,
        optim=optim,
        parallel=parallel,
    )
    results = run_training(config, resume=resume)
    if collectives.launched()[0] > 0:
        return
    print_results(results, json=json)
    if "stopped" in results:
        print(
            f"{results['stopped']}: stopped after step {results['steps']}; the same command with "
            "--resume auto goes on",
            file=sys.stderr,
        )
    elif not json:
        print(f"written to {results['folder']}")


def evaluate(
    path: str, *, split: Literal["test", "validation"] = "test", json: bool = False
) -> None:
    """Evaluate a run or a checkpoint on the bundled data's held-out concepts.

    Args:
        path: A run folder or a checkpoint folder.
        split: Which held-out concepts; choices belong on `validation`.
        json: Print the metrics as JSON.
    """
    device, folder = collectives.device("auto"), Path(path)
    with collectives.process_group(device):
        model, transform, tokenizer = collectives.raise_on_all_ranks(lambda: loading.load(path))
        metrics = run_evaluation(
            loading.place(model, device),
            transform,
            tokenizer,
            split=split,
            # Kept for `compare`. Of a run that goes on the results would not be those of its end.
            samples_to=folder / "results" if (folder / "results.json").is_file() else None,
        )
    if collectives.launched()[0] == 0:
        print_results({"metrics": metrics}, json=json)


def compare(runs: list[str], *, json: bool = False) -> None:
    """Compare finished runs; those of one name and several seeds share a column.

    Differences to the first are paired, by seed or else by test sample, with 95% intervals.

    Args:
        runs: Run folders; the first one's name is what the others are set against.
        json: Print the comparison as JSON.
    """
    entries = comparison.compare([comparison.read_results(path) for path in runs])
    if json:
        print(to_json(entries, indent=2))
    else:
        comparison.show(entries)


def demo(*, out: str = "runs/demo", seed: int = 0) -> None:
    """Train CLIP, ProtoCLIP, and ProtoCLIP with a teacher on the bundled emoji, and compare them.

    Args:
        out: Folder for the three runs.
        seed: Seed of all three.
    """
    run_demo(out, seed=seed)


def embed_teacher(
    *,
    teacher: str,
    out: str,
    data: DataConfig = DataConfig(),  # noqa: B008
    modality: Literal["auto", "text", "image"] = "auto",
    pooling: Literal["mean", "cls", "pooler"] = "mean",
    width: int | None = None,
    batch_size: int = 256,
    device: str = "auto",
    num_samples: int | None = None,
    json: bool = False,
) -> None:
    """Make a frozen model's features of a data set, for `teacher.features`.

    After an interruption the same command goes on where it was.

    Args:
        teacher: `hf:NAME_OR_FOLDER`, `minilm`, `open_clip:MODEL/TAG`, `timm:MODEL`, a run folder,
            or features of one's own as `.npy` or Parquet.
        out: Folder of the features.
        data: The data set, as for training.
        modality: What the model reads; `auto` is pictures where it reads both.
        pooling: How a text model's tokens become one feature.
        width: Reduce to this width by PCA.
        batch_size: Captions or pictures at once.
        device: As `run.device`.
        num_samples: Samples of a stream to read.
        json: Print the facts as JSON.
    """
    facts = run_embedding(
        teacher,
        Path(out),
        data=data,
        modality=modality,
        pooling=pooling,
        width=width,
        batch_size=batch_size,
        device=device,
        num_samples=num_samples,
    )
    if collectives.launched()[0] == 0:
        print_facts(facts, json=json)


def inspect(
    source: str,
    *,
    data: DataConfig = DataConfig(),  # noqa: B008
    model: ModelConfig = ModelConfig(),  # noqa: B008
    samples: int = 5000,
    every: bool = False,
    seed: int = 0,
    montage: str | None = None,
    json: bool = False,
) -> None:
    """Say what a source holds: sizes, caption lengths, duplicates, unreadable files.

    Args:
        source: As `data.train`.
        data: How to read it; `workers` processes, or as many as there are cores.
        model: Whose tokenizer and context length captions are measured by.
        samples: Pairs to read, drawn at random.
        every: Read all pairs.
        seed: Of the draw.
        montage: Write a picture of random pairs with captions to this PNG file.
        json: Print the findings as JSON.
    """
    run_inspection(
        source,
        data=data,
        model=model,
        samples=None if every else samples,
        seed=seed,
        montage=Path(montage) if montage else None,
        json=json,
    )


def pack(
    source: str,
    out: str,
    *,
    data: DataConfig = DataConfig(),  # noqa: B008
    samples_per_shard: int = 10_000,
    resize: int | None = None,
) -> None:
    """Write a source as tar shards; after an interruption the same command goes on.

    Args:
        source: As `data.train`.
        out: Folder of the shards.
        data: How to read the source.
        samples_per_shard: Pairs in a shard.
        resize: Shrink pictures to this shorter side; unset copies them as they are.
    """
    run_packing(source, Path(out), data=data, samples_per_shard=samples_per_shard, resize=resize)


def index(source: str, *, data: DataConfig = DataConfig()) -> None:  # noqa: B008
    """Build a source's index ahead of time, so that training starts at once.

    Args:
        source: As `data.train`.
        data: How to read it.
    """
    run_indexing(source, data=data)


def print_facts(facts: dict[str, Any], *, json: bool) -> None:
    if json:
        print(to_json(facts, indent=2))
        return
    for name, value in facts.items():
        print(f"{name:<24} {value:.4f}" if isinstance(value, float) else f"{name:<24} {value}")


def print_results(results: dict[str, Any], *, json: bool) -> None:
    if json:
        print(to_json(results, indent=2))
        return
    for name, value in results["metrics"].items():
        print(f"{name:<45} {value:.4f}")


class OneLineParser(ArgumentParser):
    """Reports an error in one line instead of a usage text; lets no file grant a permission."""

    def parse_args(self, args: Any = None, *rest: Any, **options: Any) -> Any:
        found = super().parse_args(args, *rest, **options)
        for key, value in found.items():
            for permission in PERMISSIONS:
                if key.endswith(f"data.{permission}") and value and not said(args, permission):
                    self.error(
                        f"data.{permission}: a recipe cannot allow this; say "
                        f"--data.{permission} true on the command line if you trust it"
                    )
        return found

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        fail(" ".join(str(message).split()))


def said(arguments: list[str], permission: str) -> bool:
    """Whether the command line itself grants a permission."""
    option = f"--data.{permission}"
    values = [value for text, value in pairwise(arguments) if text == option]
    values += [text.partition("=")[2] for text in arguments if text.startswith(f"{option}=")]
    return "true" in map(str.lower, values)


def fail(message: str, *, code: int = 2) -> NoReturn:
    """End with one line; of several processes that met the same, the first one speaks."""
    rank, _, _ = collectives.launched()
    if rank and not collectives.is_distributed():
        time.sleep(FIRST_SPEAKS)  # the launcher ends this process when the first one ends
    print(f"protoclip: error: {f'rank {rank}: ' if rank else ''}{message}", file=sys.stderr)
    leave(code)


def leave(code: int) -> NoReturn:
    """Exit; at once where other processes may be gone, whom the usual way out would wait for."""
    if collectives.is_distributed():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def check_recipe(path: Path) -> None:
    """Name the file where there is none or it is no TOML; the parser alone would not."""
    if not path.is_file():
        fail(f"--config: {path}: no such file")
    try:
        tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        fail(f"--config: {path}: not TOML ({error})")


def main(arguments: list[str] | None = None) -> None:
    """Entry point; a user's mistake ends in one line and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for option, value in pairwise([*arguments, ""]):
        if option == "--config":
            check_recipe(Path(value))
        elif option.startswith("--config="):
            check_recipe(Path(option.removeprefix("--config=")))
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    # Soft targets and Adam's moments reach denormal numbers, which CPUs compute very slowly.
    torch.set_flush_denormal(True)
    arguments = ["--json=true" if argument == "--json" else argument for argument in arguments]
    if arguments[:1] == ["compare"]:
        # jsonargparse takes a list as one argument: `compare A B` becomes `compare ["A", "B"]`.
        runs = [argument for argument in arguments[1:] if not argument.startswith("-")]
        options = [argument for argument in arguments[1:] if argument.startswith("-")]
        arguments = ["compare", *options, *([json_format.dumps(runs)] if runs else [])]
    commands: dict[str, Any] = {
        "train": train,
        "evaluate": evaluate,
        "compare": compare,
        "demo": demo,
        "embed-teacher": embed_teacher,
        "data": {
            "_help": "Look at a source of pairs, pack it into shards, index it.",
            "inspect": inspect,
            "pack": pack,
            "index": index,
        },
    }
    try:
        auto_cli(
            commands,
            args=arguments,
            parser_class=OneLineParser,
            parser_mode="toml",
            prog="protoclip",
        )
    except collectives.RaisedOnAnotherRank:
        time.sleep(FIRST_SPEAKS)
        leave(2)
    except ValueError as error:
        # A worker process wraps its error in a traceback, whose last line is the message.
        fail(str(error).strip().split("\n")[-1].removeprefix("ValueError: "))
    except OSError as error:
        fail(str(error))
    except (RuntimeError, MemoryError) as error:
        if (message := out_of_memory(error)) is not None:
            fail(message, code=1)
        if not collectives.is_distributed():
            raise
        reason = str(error).strip().splitlines()[0]
        fail(f"another process of this run has ended or does not answer ({reason})", code=1)
    except KeyboardInterrupt:
        print("protoclip: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
