"""How a run is judged: by the pairs that were held out, and by its guards.

Which data these are is decided in `evaluation/validation.py`; tasks and metrics are those of
`evaluation/suite.py`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from protoclip.evaluation.datasets import EvaluationData
from protoclip.evaluation.features import AlignedEncoder, Encoder
from protoclip.evaluation.suite import evaluate_run
from protoclip.features.halves import features_folder
from protoclip.models import loading
from protoclip.models.aligned import AlignedModel, FrozenHalves
from protoclip.models.precision import on_card
from protoclip.models.protoclip import ProtoCLIP
from protoclip.models.towers import Tokenizer
from protoclip.training.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Measures a model on what is held out of a run, and on each guard.

    Attributes:
        measured: The model: the whole one, or of two frozen halves what lies between them.
        more: Arguments of `evaluate_run` for every data set.
    """

    plan: Plan
    measured: ProtoCLIP
    more: dict[str, Any]

    def __call__(
        self, split: Literal["validation", "test"], *, quick: bool = False, **more: Any
    ) -> dict[str, float]:
        """Metrics on the split, of the data that have it.

        Held-out pairs but the emoji have no test split, and not all guards have a validation split.
        `quick` is for a comparison of models: zero-shot and retrieval, and of a mixture all sources
        together.
        """
        metrics: dict[str, float] = {}

        def measure(data: EvaluationData, otherwise: str, *, quick: bool) -> dict[str, float]:
            present = split if split in data.splits else otherwise
            settings = {**self.more, **more, "split": present, "quick": quick}
            return evaluate_run(self.measured, data=data, **settings)

        for data in self.plan.held_out[:1] if quick else self.plan.held_out:
            metrics |= measure(data, "validation", quick=quick)
        for data in self.plan.guards:
            metrics |= measure(data, "test", quick=True)
        return metrics


def judge_of(
    plan: Plan, model: ProtoCLIP, trained: ProtoCLIP, *, tokenizer: Tokenizer, workers: int
) -> Judge:
    """The judge of a run, which trains the whole `model`, or what lies between its halves."""
    transform = loading.evaluation_transform(model)
    more: dict[str, Any] = {"transform": transform, "tokenizer": tokenizer, "workers": workers}
    context = on_card(plan.config.run.precision, next(model.parameters()).device)
    more["encoder_of"] = partial(Encoder, autocast=context)
    if isinstance(trained, AlignedModel):
        frozen = Encoder(
            model=FrozenHalves(model.towers).eval(),
            transform=transform,
            tokenizer=tokenizer,
            workers=workers,
            cache=features_folder(plan.config) / "evaluation",
            show=True,
            autocast=context,
        )
        more["encoder_of"] = partial(AlignedEncoder, frozen=frozen)
    return Judge(plan=plan, measured=trained, more=more)
