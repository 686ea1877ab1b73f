"""From the configuration to objects; the only place, besides the command line, that reads it."""

from protoclip.build.data import episodes, notes, pairs
from protoclip.build.defaults import resolved
from protoclip.build.models import (
    context_length,
    device,
    evaluation_view,
    load,
    model,
    parallelise,
    place,
    token_counter,
    tokenizer,
    training_model,
)
from protoclip.build.training import trainer

__all__ = [
    "context_length",
    "device",
    "episodes",
    "evaluation_view",
    "load",
    "model",
    "notes",
    "pairs",
    "parallelise",
    "place",
    "resolved",
    "token_counter",
    "tokenizer",
    "trainer",
    "training_model",
]
