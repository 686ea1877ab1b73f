"""How a run is judged: by the pairs that were held out, and by its guards.

Which data these are is decided in `evaluation/validation.py`; tasks and metrics are those of
`evaluation/suite.py`.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from protoclip.config import Config
from protoclip.data.index import cache_folder
from protoclip.distributed import parallel
from protoclip.encode.halves import features_folder
from protoclip.evaluation.datasets import EvaluationData
from protoclip.evaluation.encoders import encoder_of
from protoclip.evaluation.features import Encoder
from protoclip.evaluation.suite import evaluate_run
from protoclip.models import loading
from protoclip.models.precision import on_card
from protoclip.models.protoclip import TEACHER_HEADS, ProtoCLIP
from protoclip.models.tokenizers import Tokenizer
from protoclip.training.plan import Plan

Split = Literal["validation", "test"]


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Measures a model on what is held out of a run, and on each guard.

    Attributes:
        encoder: Of the model as it is whenever it is judged.
        keeping: Makes the encoder of the model with the weights that it has then. It keeps
            features, where whoever opens a model of these weights finds them.
    """

    plan: Plan
    encoder: Encoder
    keeping: Callable[[], Encoder]

    def __call__(
        self, split: Split, *, quick: bool = False, encoder: Encoder | None = None, **more: Any
    ) -> dict[str, float]:
        """Metrics on the split, of the data that have it.

        Held-out pairs but the emoji have no test split, and not all guards have a validation split.
        `quick` is for a comparison of models: zero-shot and retrieval, and of a mixture all sources
        together. The `encoder` is unset or, for weights that will be judged again, as those that a
        run starts or ends with, that of `keeping`.
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


def judge_of(
    plan: Plan, model: ProtoCLIP, *, tokenizer: Tokenizer, workers: int, aligns: bool
) -> Judge:
    """The judge of a run; of one that `aligns`, the halves encode what is measured but once."""
    most, config = Encoder.batch_size, plan.config
    make = partial(
        encoder_of,
        transform=loading.evaluation_transform(model),
        tokenizer=tokenizer,
        batch_size=min(most, config.episodes.micro_batch_size or most),
        workers=workers,
        show=True,
        autocast=on_card(config.run.precision, next(model.parameters()).device),
    )
    keeps = not aligns and computes_as_opened(config, model)
    encoder = make(
        model,
        aligned_by=config if keeps else None,  # or halves were projected otherwise than if kept
        cache=features_folder(config) if aligns else None,
    )

    def keeping() -> Encoder:
        if not keeps:
            return encoder
        made = make(without_teacher_heads(model), cache=cache_folder() / "features")
        _ = made.folders  # by the weights that the model has now
        return made

    return Judge(plan=plan, encoder=encoder, keeping=keeping)


def computes_as_opened(config: Config, model: ProtoCLIP) -> bool:
    """Whether a model in training gives the features that it gives when its run is opened.

    Sharded, compiled or with adapters it rounds elsewhere.
    """
    plain = config.model.lora is None and not config.parallel.compile
    return plain and not parallel.is_sharded(model)


def without_teacher_heads(model: ProtoCLIP) -> ProtoCLIP:
    """The same towers and heads, as a checkpoint holds them."""
    same = copy(model)
    same._modules = {n: part for n, part in model._modules.items() if f"{n}." != TEACHER_HEADS}
    return same
