"""Prototypical contrastive image-text models: pretrain, study, use.

The public API is what this file lists.
"""

__version__ = "0.1.0"

from protoclip.build import load
from protoclip.clustering import kmeans
from protoclip.losses import info_nce, objective, prototypical_loss
from protoclip.models.protoclip import Embeddings, ProtoCLIP
from protoclip.prototypes import Prototypes, PrototypeTarget, back_translate

__all__ = [
    "Embeddings",
    "ProtoCLIP",
    "PrototypeTarget",
    "Prototypes",
    "back_translate",
    "info_nce",
    "kmeans",
    "load",
    "objective",
    "prototypical_loss",
]
