"""What `align` and `finetune` choose for settings that are not given, where `train` does otherwise.

Nothing is imported here, since the help of both commands shows these. `presets.py` applies them.
"""

from collections.abc import Mapping
from typing import Any

# What depends on nothing else.
ALIGN: Mapping[str, Any] = {
    "run.name": "aligned",
    "model.embed_dim": 512,
    "episodes.locked_image": 0,
    "loss.prototypical": 0.0,  # docs/LOG.md: no prototypes helped here
    "optim.learning_rate": 1e-3,
    "optim.weight_decay": 0.1,
    "optim.betas": (0.9, 0.98),
}
FINETUNE: Mapping[str, Any] = {
    "run.name": "finetuned",
    "model.frozen_batch_norm": True,
    "episodes.locked_image": 0,
    "optim.weight_decay": 0.1,
}
# What the help says of settings that follow from the data or from others.
ALIGN_HELP: Mapping[str, Any] = {
    "loss.teacher": 0.0,
    "episodes.count": "30 passes",
    "episodes.batch_size": "<= 1024",
    "episodes.replacement": False,
}
FINETUNE_HELP: Mapping[str, Any] = {
    "run.evaluate_every": 1,
    "episodes.count": "5 image passes",
    "episodes.batch_size": "<= 512",
    "episodes.replacement": False,
    "episodes.warm_up": 0,
    "optim.learning_rate": "1e-5 or 1e-3",
    "optim.layer_decay": 0.7,
    "teacher.whiten": 0,
    "loss.prototypical": 1.0,
    "loss.teacher": 1.0,
    "loss.strengths": "constant",
}
# All that a command may choose. A run that goes on keeps what it chose.
CHOSEN: Mapping[str, tuple[str, ...]] = {
    "train": (),
    "align": (
        *(*ALIGN, *ALIGN_HELP, "episodes.size", "episodes.warm_up", "optim.warm_up_steps"),
        *("optim.heads_weight_decay", "optim.heads_lr_scale"),
    ),
    "finetune": (
        *(*FINETUNE, *FINETUNE_HELP, "teacher.features", "episodes.size"),
        *("optim.warm_up_steps", "optim.heads_lr_scale"),
    ),
}
