"""One run from beginning to end: what `protoclip train` and `protoclip evaluate` do."""

import json
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import tomli_w
import torch

import protoclip
from protoclip import build
from protoclip.config import Config, check
from protoclip.data.skips import SkipLog
from protoclip.data.transforms import EvaluationView
from protoclip.evals import datasets, suite
from protoclip.models.protoclip import ProtoCLIP
from protoclip.models.towers import Tokenizer
from protoclip.progress import Progress
from protoclip.train.checkpoint import save_checkpoint
from protoclip.train.metrics import MetricsSink
from protoclip.train.precision import resolve
from protoclip.train.stages import Stage
from protoclip.train.state import TrainState


def train(config: Config) -> dict[str, Any]:
    """Run a configuration from beginning to end.

    Args:
        config: What to train; see `config.py`.

    Returns:
        What `results.json` in the run folder holds: samples seen, wall clock, metrics.

    Raises:
        ValueError: A setting, a file or the run folder is not as it should be. Nothing was written.
    """
    notes = check(config)
    folder = Path(config.run.out or f"runs/{slug(config.run.name)}-{config.run.seed}")
    if folder.exists():
        raise ValueError(f"{folder}: run folder exists; choose another with --run.out")
    device = build.device(config.run.device)
    precision = resolve(config.run.precision, device)
    samples = build.pairs(config)
    notes += build.notes(samples)
    model = build.place(build.model(config.model, seed=config.run.seed), device)
    view, tokenizer = build.evaluation_view(model), build.tokenizer(config.model)
    steps = config.episodes.count * (config.episodes.size // config.episodes.batch_size)
    progress = Progress(f"train {config.run.name}", steps)
    skips = SkipLog(
        folder / "skipped.jsonl",
        max_share=config.data.max_bad_share,
        at_least=config.episodes.size,
    )

    # Held-out splits come with the bundled data alone; a run on other data is not judged by emoji.
    bundled = config.data.train == "emoji" and not config.data.sources
    evaluates = bundled and config.run.evaluate
    if not bundled and (config.run.evaluate or config.run.evaluate_every):
        notes.append("run.evaluate*: no effect, since data.train has no held-out splits")

    def due(state: TrainState, every: int) -> bool:
        return bool(every) and state.episode % every == 0

    def log(state: TrainState, metrics: Mapping[str, float]) -> None:
        sink.write(step=state.step, episode=state.episode, metrics=metrics)

    def save(state: TrainState) -> None:
        if due(state, config.run.save_every) or state.episode == config.episodes.count:
            save_checkpoint(
                folder / "checkpoints" / "last",
                model=model,
                description={"protoclip": protoclip.__version__, "model": asdict(config.model)},
                state=state,
            )

    def evaluate_along_the_way(state: TrainState) -> Mapping[str, float]:
        if not (bundled and due(state, config.run.evaluate_every)):
            return {}
        return evaluate(model, view, tokenizer, split="validation", show=False)

    def on_step(state: TrainState, stage: Stage) -> None:
        episode = f"episode {state.episode + 1}/{config.episodes.count}"
        skipped = f", {skips.distinct} samples skipped" if skips.distinct else ""
        progress.update(state.step, f"{episode}, {stage.name}{skipped}")

    trainer = build.trainer(
        config,
        model=model,
        samples=samples,
        precision=precision,
        log=log,
        save=save,
        evaluate=evaluate_along_the_way,
        on_step=on_step,
        on_read=skips.add,
        note=notes.append,
    )
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
    sink = MetricsSink(folder)
    progress.start()
    state = trainer.fit(TrainState())
    sink.close()

    results = {
        "name": config.run.name,
        "folder": str(folder),
        "seed": config.run.seed,
        "samples_seen": state.samples_seen,
        "samples_skipped": skips.distinct,
        "steps": state.step,
        "train_seconds": round(state.seconds, 2),
        "precision": precision,
        "environment": environment(device),
        "metrics": evaluate(model, view, tokenizer, split="test") if evaluates else {},
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def evaluate(
    model: ProtoCLIP,
    view: EvaluationView,
    tokenizer: Tokenizer,
    *,
    split: Literal["validation", "test"],
    show: bool = True,
) -> dict[str, float]:
    """All metrics on the bundled data's held-out concepts, with progress where asked."""
    shown: dict[str, Progress] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in shown:
            shown[stage] = Progress(f"evaluate: {stage}", total)
        shown[stage].update(done)

    return suite.evaluate(
        model,
        view,
        tokenizer,
        datasets.emoji(),
        split=split,
        device=next(model.parameters()).device,
        progress=progress if show else None,
    )


def slug(name: str) -> str:
    """A run's name as a folder name: `ProtoCLIP + teacher` is `protoclip-teacher`."""
    return "-".join(re.findall(r"[a-z0-9._]+", name.lower())) or "run"


def to_toml(config: Config) -> str:
    """The resolved configuration; unset values are left out, as TOML has no null."""

    def present(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: present(item) for key, item in value.items() if item is not None}
        return [present(item) for item in value] if isinstance(value, list | tuple) else value

    return tomli_w.dumps(present(asdict(config)))


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
