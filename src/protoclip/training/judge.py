"""How a run is judged: by the pairs that were held out, and by its guards.

Which data these are is decided in `evaluation/validation.py`; tasks and metrics are those of
`evaluation/suite.py`.
"""

from dataclasses import dataclass
from typing import Any, Literal

from protoclip.evaluation.datasets import EvaluationData
from protoclip.evaluation.encoders import encoder_of
from protoclip.evaluation.features import Encoder
from protoclip.evaluation.suite import evaluate_run
from protoclip.features.halves import features_folder
from protoclip.models import loading
from protoclip.models.precision import on_card
from protoclip.models.protoclip import ProtoCLIP
from protoclip.models.towers import Tokenizer
from protoclip.training.plan import Plan

Split = Literal["validation", "test"]


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Measures a model on what is held out of a run, and on each guard.

    Attributes:
        encoder: Of the model as it is whenever it is judged.
    """

    plan: Plan
    encoder: Encoder

    def __call__(self, split: Split, *, quick: bool = False, **more: Any) -> dict[str, float]:
        """Metrics on the split, of the data that have it.

        Held-out pairs but the emoji have no test split, and not all guards have a validation split.
        `quick` is for a comparison of models: zero-shot and retrieval, and of a mixture all sources
        together.
        """
        metrics: dict[str, float] = {}

        def measure(data: EvaluationData, otherwise: Split, *, quick: bool) -> dict[str, float]:
            present: Split = split if split in data.splits else otherwise
            return evaluate_run(self.encoder, data=data, split=present, quick=quick, **more)

        for data in self.plan.held_out[:1] if quick else self.plan.held_out:
            metrics |= measure(data, "validation", quick=quick)
        for data in self.plan.guards:
            metrics |= measure(data, "test", quick=True)
        return metrics


def judge_of(
    plan: Plan, model: ProtoCLIP, *, tokenizer: Tokenizer, workers: int, aligns: bool
) -> Judge:
    """The judge of a run; of one that `aligns`, the halves encode what is measured but once."""
    most = Encoder.batch_size
    encoder = encoder_of(
        model,
        loading.evaluation_transform(model),
        tokenizer,
        batch_size=min(most, plan.config.episodes.micro_batch_size or most),
        workers=workers,
        cache=features_folder(plan.config) if aligns else None,  # towers that train change
        show=True,
        autocast=on_card(plan.config.run.precision, next(model.parameters()).device),
    )
    return Judge(plan=plan, encoder=encoder)
