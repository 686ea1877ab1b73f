"""Prototypical contrastive image-text models: pretrain, study, use.

The public API is what this file lists. Names load their modules on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "2.0.0"

if TYPE_CHECKING:
    from protoclip.config import Config as Config
    from protoclip.encode.embed import embed as embed
    from protoclip.evaluation.suite import evaluate as evaluate
    from protoclip.export.run import export as export
    from protoclip.losses.info_nce import info_nce as info_nce
    from protoclip.losses.objective import objective as objective
    from protoclip.losses.prototypical import Target as Target
    from protoclip.losses.prototypical import prototypical_loss as prototypical_loss
    from protoclip.losses.sigmoid import sigmoid_loss as sigmoid_loss
    from protoclip.models.loading import load as load
    from protoclip.models.protoclip import Embeddings as Embeddings
    from protoclip.models.protoclip import ProtoCLIP as ProtoCLIP
    from protoclip.prototypes.kmeans import KMeans as KMeans
    from protoclip.prototypes.kmeans import kmeans as kmeans
    from protoclip.prototypes.targets import back_translate as back_translate
    from protoclip.training.run import align as align
    from protoclip.training.run import finetune as finetune
    from protoclip.training.run import train as train

_MODULES = {
    "config": ["Config"],
    "evaluation.suite": ["evaluate"],
    "export.run": ["export"],
    "encode.embed": ["embed"],
    "losses.info_nce": ["info_nce"],
    "losses.objective": ["objective"],
    "losses.prototypical": ["Target", "prototypical_loss"],
    "losses.sigmoid": ["sigmoid_loss"],
    "models.loading": ["load"],
    "models.protoclip": ["Embeddings", "ProtoCLIP"],
    "prototypes.kmeans": ["KMeans", "kmeans"],
    "prototypes.targets": ["back_translate"],
    "training.run": ["align", "finetune", "train"],
}
__all__ = [name for names in _MODULES.values() for name in names]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"protoclip.{module}"), name)
    raise AttributeError(f"module 'protoclip' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
