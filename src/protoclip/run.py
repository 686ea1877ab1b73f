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
from protoclip.data.pairs import Pairs, SampleStream
from protoclip.data.skips import SkipLog
from protoclip.data.transforms import EvaluationView
from protoclip.evals import datasets, suite
from protoclip.models.protoclip import ProtoCLIP
from protoclip.models.towers import Tokenizer
from protoclip.progress import Progress
from protoclip.run_folder import (
    Interrupted,
    StopRequest,
    claimed,
    is_empty,
    newest_whole,
    require_same,
    stop_on_signals,
    write_whole,
)
from protoclip.train import snapshot
from protoclip.train.checkpoint import load_weights
from protoclip.train.metrics import MetricsSink
from protoclip.train.precision import resolve
from protoclip.train.saver import Saver
from protoclip.train.stages import Stage
from protoclip.train.state import TrainState
from protoclip.train.trainer import Grouping, Trainer


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
    """
    notes = check(config)
    folder = Path(config.run.out or f"runs/{slug(config.run.name)}-{config.run.seed}")
    begun = (folder / "config.toml").is_file()
    if folder.exists() and not (resume == "auto" and (begun or is_empty(folder))):
        hint = "" if begun else " and holds no run"
        way = "choose another with --run.out" + (", or go on with --resume auto" if begun else "")
        raise ValueError(f"{folder}: run folder exists{hint}; {way}")
    if begun:
        require_same(folder, to_toml(config))
        if (folder / "results.json").is_file():
            finished: dict[str, Any] = json.loads((folder / "results.json").read_text("utf-8"))
            return finished
    device = build.device(config.run.device)
    precision = resolve(config.run.precision, device)
    samples = build.pairs(config)
    notes += build.notes(samples)
    model = build.place(build.model(config.model, seed=config.run.seed), device)
    skips = SkipLog(
        folder / "skipped.jsonl",
        max_share=config.data.max_bad_share,
        at_least=config.episodes.size,
    )
    session = Session(config, folder=folder, model=model, samples=samples, skips=skips)
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
        note=notes.append,
    )
    folder.mkdir(parents=True, exist_ok=resume == "auto")
    with claimed(folder), stop_on_signals() as request:
        interrupted = newest_whole(folder, notes) if begun else None
        write_whole(folder / "config.toml", to_toml(config))
        for note in notes + session.notes:
            print(f"note: {note}", file=sys.stderr)
        # What draws from the global generator, such as dropout, follows the seed too.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(config.run.seed)
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
        "samples_skipped": skips.distinct,
        "steps": state.step,
        "train_seconds": round(state.seconds, 2),
        "precision": precision,
        "environment": environment(device),
        "metrics": session.final_metrics(),
    }
    write_whole(folder / "results.json", json.dumps(results, indent=2) + "\n")
    return results


class Session:
    """What happens beside the steps of one run: logging, saving, evaluating, progress."""

    def __init__(
        self,
        config: Config,
        *,
        folder: Path,
        model: ProtoCLIP,
        samples: Pairs | SampleStream,
        skips: SkipLog,
    ) -> None:
        self.config, self.folder, self.model, self.skips = config, folder, model, skips
        self.view, self.tokenizer = build.evaluation_view(model), build.tokenizer(config.model)
        # Held-out splits come with the bundled data alone; other data is not judged by emoji.
        self.bundled = config.data.train == "emoji" and not config.data.sources
        self.notes: list[str] = []
        if not self.bundled and (config.run.evaluate or config.run.evaluate_every):
            self.notes.append("run.evaluate*: no effect, since data.train has no held-out splits")
        steps = config.episodes.count * (config.episodes.size // config.episodes.batch_size)
        self.progress = Progress(f"train {config.run.name}", steps)
        self.saver = Saver(
            folder,
            model=model,
            description={"protoclip": protoclip.__version__, "model": asdict(config.model)},
            every_steps=config.run.save_steps,
            every_minutes=config.run.save_minutes,
            keep=config.run.keep_checkpoints,
        )

    def run(
        self, trainer: Trainer, request: StopRequest, interrupted: Interrupted | None
    ) -> TrainState:
        """Train from the beginning or the interruption to the end or the request to stop."""
        self.trainer, self.request = trainer, request
        state, grouping, size = TrainState(), None, 0
        if interrupted is not None:
            load_weights(self.model, interrupted.folder)
            state, grouping = snapshot.restore(trainer, interrupted.tensors, interrupted.facts)
            trainer.restore_position(interrupted.facts["position"])
            self.skips.read, self.skips.skipped = interrupted.facts["skips"]
            size = interrupted.facts["metrics_bytes"]
            print(f"going on from {interrupted.folder}, step {state.step}", file=sys.stderr)
        self.sink = MetricsSink(self.folder, size=size, step=state.step)
        self.progress.start()
        try:
            return trainer.fit(state, grouping)
        finally:
            self.saver.finish()
            self.sink.close()

    def log(self, state: TrainState, metrics: Mapping[str, float]) -> None:
        self.sink.write(step=state.step, episode=state.episode, metrics=metrics)

    def save(self, state: TrainState, grouping: Grouping | None) -> bool:
        """Save when it is time; whether the run is to stop."""
        stop = self.request.by is not None
        finished = state.episode == self.config.episodes.count
        due = self.saver.due(state.step, episode_end=state.batch == 0)
        if due or ((stop or finished) and self.saver.saved_step != state.step):
            tensors, facts = snapshot.take(self.trainer, state, grouping)
            facts |= {
                "position": self.trainer.position(state),
                "skips": [self.skips.read, self.skips.skipped],
                "metrics_bytes": self.sink.size,
            }
            self.saver.save(state.step, tensors, facts)
        return stop

    def evaluate(self, state: TrainState) -> Mapping[str, float]:
        every = self.config.run.evaluate_every
        if not (self.bundled and every and state.episode % every == 0):
            return {}
        return evaluate(self.model, self.view, self.tokenizer, split="validation", show=False)

    def on_step(self, state: TrainState, stage: Stage) -> None:
        number = min(state.episode + 1, self.config.episodes.count)
        skipped = f", {self.skips.distinct} samples skipped" if self.skips.distinct else ""
        detail = f"episode {number}/{self.config.episodes.count}, {stage.name}{skipped}"
        self.progress.update(state.step, detail)

    def final_metrics(self) -> dict[str, float]:
        if not (self.bundled and self.config.run.evaluate):
            return {}
        return evaluate(self.model, self.view, self.tokenizer, split="test")


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
