"""Prototypical contrastive image-text models: pretrain, study, use.

The public API is what this file lists.
"""

__version__ = "0.2.0"

from protoclip.losses.info_nce import info_nce
from protoclip.losses.objective import objective
from protoclip.losses.prototypical import Target, prototypical_loss
from protoclip.models.loading import load
from protoclip.models.protoclip import Embeddings, ProtoCLIP
from protoclip.prototypes.kmeans import KMeans, kmeans
from protoclip.prototypes.targets import back_translate

__all__ = [
    "Embeddings",
    "KMeans",
    "ProtoCLIP",
    "Target",
    "back_translate",
    "info_nce",
    "kmeans",
    "load",
    "objective",
    "prototypical_loss",
]
