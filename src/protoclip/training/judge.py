"""How a run is judged on its way and at its end, and whether it stops early.

What judges it is decided in `evaluation/validation.py`; tasks and metrics are those of
`evaluation/suite.py`. Which checkpoint is kept as the best is decided in `checkpoint.py`.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from protoclip.config import Config
from protoclip.data.access import cache_folder
from protoclip.distributed import parallel
from protoclip.encode.rows import features_folder
from protoclip.evaluation.datasets import EvaluationData
from protoclip.evaluation.features import Encoder, build_encoder
from protoclip.evaluation.suite import evaluate_run
from protoclip.models import loading
from protoclip.models.opening import Tokenizer
from protoclip.models.protoclip import ProtoCLIP, autocast_on_card
from protoclip.training.plan import Plan

PATIENCE = 3  # evaluations without a better value that end a run

Split = Literal["validation", "test"]


class Judge:
    """Measures a model on the validation set of a run, and on each guard.

    The halves of a run that `aligns` encode what is measured but once.

    Attributes:
        encoder: Of the model as it is whenever it is judged.
    """

    def __init__(
        self, plan: Plan, model: ProtoCLIP, *, tokenizer: Tokenizer, workers: int, aligns: bool
    ) -> None:
        self.plan, self.model = plan, model
        most, config = Encoder.batch_size, plan.config
        self._make = partial(
            build_encoder,
            transform=loading.evaluation_transform(model),
            tokenizer=tokenizer,
            batch_size=min(most, config.episodes.micro_batch_size or most),
            workers=workers,
            show=True,
            autocast=autocast_on_card(config.run.precision, next(model.parameters()).device),
        )
        self._keeps = not aligns and computes_as_opened(config, model)
        self.encoder = self._make(
            model,
            aligned_by=config if self._keeps else None,  # or halves were projected in other ways
            cache=features_folder(config) if aligns else None,
        )

    def keeping_encoder(self) -> Encoder:
        """The encoder of the model with the weights that it has now.

        It keeps features, which another run or command that opens these weights will find.
        """
        if not self._keeps:
            return self.encoder
        made: Encoder = self._make(self.model, cache=cache_folder() / "features")
        _ = made.folders  # by the weights that the model has now
        return made

    def __call__(
        self, split: Split, *, quick: bool = False, encoder: Encoder | None = None, **more: Any
    ) -> dict[str, float]:
        """Metrics on the split, of the data that have it.

        Held-out pairs but the emoji have no test split, and not all guards have a validation split.
        `quick` is for a comparison of models: zero-shot and retrieval, and of a mixture all sources
        together. The `encoder` is unset or, for weights that will be judged again, as those that a
        run starts or ends with, `keeping_encoder`.
        """
        metrics: dict[str, float] = {}
        encoder = encoder or self.encoder

        def measure(data: EvaluationData, otherwise: Split, *, quick: bool) -> dict[str, float]:
            present: Split = split if split in data.splits else otherwise
            return evaluate_run(encoder, data=data, split=present, quick=quick, **more)

        for data in self.plan.held_out[:1] if quick else self.plan.held_out:
            metrics |= measure(data, "validation", quick=quick)
        for data in self.plan.guards:
            metrics |= measure(data, "test", quick=True)
        return metrics


def computes_as_opened(config: Config, model: ProtoCLIP) -> bool:
    """Whether a model in training gives the features that it gives when its run is opened.

    Sharded, compiled or with adapters it rounds elsewhere.
    """
    plain = config.model.lora is None and not config.parallel.compile
    return plain and not parallel.is_sharded(model)


@dataclass(kw_only=True)
class EarlyStop:
    """Decides after each evaluation whether the run ends there.

    Attributes:
        metric: Higher is better; a value that is not finite is no better than any other.
        best, best_step: The best value so far, and the step that it is of.
        step: The step of the last evaluation.
        waited: Evaluations since the best one.
    """

    metric: str
    best: float | None = None
    best_step: int = 0
    step: int = 0
    waited: int = 0

    def observe(self, step: int, value: float) -> None:
        """Count an evaluation after this step."""
        self.step = step
        if math.isfinite(value) and (self.best is None or value > self.best):
            self.best, self.best_step, self.waited = value, step, 0
        elif step > 0:  # the start has no evaluation before it
            self.waited += 1

    @property
    def is_due(self) -> bool:
        return self.waited >= PATIENCE

    @property
    def reason(self) -> str:
        best = "it was never finite"
        if self.best is not None:
            best = f"its best value is {self.best:.4f}, of step {self.best_step}"
        return (
            f"stopped early after step {self.step}: no better {self.metric} in {self.waited} "
            f"evaluations; {best}"
        )

    def state_dict(self) -> dict[str, Any]:
        return vars(self).copy()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.keys() != vars(self).keys():
            raise KeyError("early_stop")
        vars(self).update(state)
