"""One run from beginning to end: what `protoclip train` and `protoclip evaluate` do."""

import platform
import re
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import tomli_w
import torch

import protoclip
from protoclip.config import PERMISSIONS, Config, check
from protoclip.data import sources
from protoclip.data.loader import SkipLog
from protoclip.data.pairs import Pairs, SampleStream
from protoclip.distributed import collectives
from protoclip.distributed.collectives import (
    all_gather_object,
    process_group,
    raise_on_all_ranks,
    rank,
    rank0_first,
    world_size,
)
from protoclip.files import read_json, to_json, write_atomically
from protoclip.models import loading
from protoclip.models.protoclip import ProtoCLIP
from protoclip.training import build, defaults
from protoclip.training.precision import Precision, resolve
from protoclip.training.run_folder import (
    Interrupted,
    claimed,
    is_empty,
    newest_whole,
    require_same,
    require_same_arithmetic,
    stop_on_signals,
)
from protoclip.training.session import Session
from protoclip.training.trainer import Trainer


def train(config: Config, *, resume: Literal["never", "auto"] = "never") -> dict[str, Any]:
    """Run a configuration from beginning to end, or on from where it was interrupted.

    SIGTERM, SIGINT and SIGUSR1 end it after the step under way, with a checkpoint to go on from.

    Args:
        config: What to train; see `config.py`.
        resume: `auto` goes on with a run that is in the folder already, from its newest checkpoint;
            `never` refuses a folder that exists.

    Returns:
        What `results.json` in the run folder holds: samples seen, wall clock, metrics. Of a run
        that a signal ended, where it stands and `stopped`, the signal's name.

    Raises:
        ValueError: A setting, a file or the run folder is not as it should be. Nothing was written.
        OSError: The last checkpoint could not be written, in several attempts over a minute. There
            is no `results.json`, and `resume="auto"` goes on from the checkpoint before.
    """
    notes = check(config)
    config, decided = defaults.resolved(config)
    notes += decided
    device = collectives.device(config.run.device)
    with process_group(device):
        return train_together(config, device=device, resume=resume == "auto", notes=notes)


def train_together(
    config: Config, *, device: torch.device, resume: bool, notes: list[str]
) -> dict[str, Any]:
    """`train` in one process of a group, or in the only one."""
    folder = Path(config.run.out or f"runs/{slug(config.run.name)}-{config.run.seed}")
    begun, finished = rank0_first(lambda: look_at(folder, config, resume=resume))
    if finished is not None:
        return finished
    precision = resolve(config.run.precision, device)
    samples = raise_on_all_ranks(lambda: sources.pairs(config))
    model, said = loading.training_model(config, device)
    notes += said
    session, trainer = raise_on_all_ranks(
        lambda: prepare(config, folder, model, samples, precision)
    )
    with ExitStack() as stack:

        def claim() -> Path | None:
            folder.mkdir(parents=True, exist_ok=resume)
            stack.enter_context(claimed(folder))
            whole = newest_whole(folder, notes) if begun else None
            if whole is not None:
                require_same_arithmetic(whole, session.arithmetic)
            write_atomically(folder / "config.toml", to_toml(config))
            for note in notes + session.notes:
                print(f"note: {note}", file=sys.stderr)
            return whole

        whole = rank0_first(claim)
        interrupted = raise_on_all_ranks(lambda: None if whole is None else Interrupted.read(whole))
        request = stack.enter_context(stop_on_signals())
        # What draws from the global generator, such as dropout, follows the seed too.
        stack.enter_context(
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
        )
        torch.manual_seed(config.run.seed + rank())
        state = session.run(trainer, request, interrupted)
    if request.by is not None and state.episode < config.episodes.count:
        return {
            "name": config.run.name,
            "folder": str(folder),
            "stopped": request.by,
            "steps": state.step,
            "metrics": {},
        }
    results = {
        "name": config.run.name,
        "folder": str(folder),
        "seed": config.run.seed,
        "samples_seen": state.samples_seen,
        "samples_skipped": sum(all_gather_object(session.skips.distinct)),
        "steps": state.step,
        "train_seconds": round(state.seconds, 2),
        "precision": precision,
        "environment": environment(device),
        "metrics": session.final_metrics(),
    }
    if session.best is not None and session.saver.folder(session.best[0]).is_dir():
        results["best_checkpoint"] = f"checkpoints/step-{session.best[0]:09}"
    if rank() == 0:
        write_atomically(folder / "results.json", to_json(results, indent=2) + "\n")
    return results


def prepare(
    config: Config,
    folder: Path,
    model: ProtoCLIP,
    samples: Pairs | SampleStream,
    precision: Precision,
) -> tuple[Session, Trainer]:
    """What else a run takes, before anything is written."""
    skips = SkipLog(
        folder / (f"skipped.{rank()}.jsonl" if rank() else "skipped.jsonl"),
        max_share=config.data.max_bad_share,
        at_least=config.episodes.size // world_size(),
    )
    device = next(model.parameters()).device
    session = Session(
        config,
        folder=folder,
        model=model,
        samples=samples,
        skips=skips,
        arithmetic={"run.device": device.type, "run.precision": precision},
    )
    session.notes += skips.notes + sources.notes(samples)
    trainer = build.trainer(
        config,
        model=model,
        samples=samples,
        precision=precision,
        log=session.log,
        save=session.save,
        evaluate=session.evaluate,
        on_step=session.on_step,
        on_read=skips.add,
        diverged=folder / (f"diverged.{rank()}.json" if rank() else "diverged.json"),
        note=session.notes.append,
    )
    if world_size() > 1:
        session.notes.append(
            f"{world_size()} processes, each with {config.episodes.batch_size // world_size()} "
            "pairs of every batch; learning rate, batch and episode are as set, for all together"
        )
    return session, trainer


def look_at(folder: Path, config: Config, *, resume: bool) -> tuple[bool, dict[str, Any] | None]:
    """Whether a run was begun in a folder, and its results if it was finished.

    That it may go on there, or a new one begin, is checked.

    Raises:
        ValueError: It may not.
    """
    begun = (folder / "config.toml").is_file()
    if folder.exists() and not (resume and (begun or is_empty(folder))):
        hint = "" if begun else " and holds no run"
        way = "choose another with --run.out" + (", or go on with --resume auto" if begun else "")
        raise ValueError(f"{folder}: run folder exists{hint}; {way}")
    if begun:
        require_same(folder, to_toml(config))
    results = folder / "results.json"
    return begun, read_json(results) if begun and results.is_file() else None


def slug(name: str) -> str:
    """A run's name as a folder name: `ProtoCLIP + teacher` is `protoclip-teacher`."""
    return "-".join(re.findall(r"[a-z0-9._]+", name.lower())) or "run"


def to_toml(config: Config) -> str:
    """The resolved configuration, without permissions; TOML has no null for unset values."""

    def present(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: present(item) for key, item in value.items() if item is not None}
        return [present(item) for item in value] if isinstance(value, list | tuple) else value

    tree = asdict(config)
    for permission in PERMISSIONS:
        del tree["data"][permission]
    return tomli_w.dumps(present(tree))


def environment(device: torch.device) -> dict[str, str]:
    """Hardware and versions, without which a number means little."""
    return {
        "protoclip": protoclip.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
    }
