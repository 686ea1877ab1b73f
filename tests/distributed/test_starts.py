"""Several ranks start from the same models as one process, and train the same weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from interrupting import relative_difference, with_changes
from protoclip.config import Config, ModelConfig, ParallelConfig
from protoclip.models.checkpoint import find_checkpoint, read_tensors
from protoclip.models.loading import training_model
from protoclip.models.start import resolve_start
from protoclip.training.run import train
from testing import run_distributed, tiny_config
from tiny_hugging_face import NO_DROPOUT, save_bert, save_dual_encoder, save_siglip
from tiny_starts import HEADS, save_encoders


def pretrained_encoders(folder: Path) -> ModelConfig:
    """A timm image tower and a BERT, both with random weights in files."""
    model = save_encoders(folder, size=32)
    save_bert(folder / "bert", **NO_DROPOUT)
    return model


def siglip(folder: Path) -> ModelConfig:
    """Towers that stay models of `transformers`, with the sigmoid loss."""
    return ModelConfig(start=f"hf:{save_siglip(folder / 'siglip')}", heads=HEADS)


def weights_after(config: Config, ranks: int) -> dict[str, Tensor]:
    run_distributed(train, ranks, config)
    return read_tensors(find_checkpoint(str(config.run.out)) / "model.safetensors")


@pytest.mark.parametrize(
    ("start", "strategies"), [(pretrained_encoders, ("ddp", "fsdp")), (siglip, ("fsdp",))]
)
def test_ranks_train_what_one_process_trains(start, strategies, tmp_path):
    torch.manual_seed(0)
    base = replace(tiny_config(out="unused"), model=start(tmp_path))
    base = with_changes(
        base,
        {
            "run": {"evaluate": False},
            "episodes": {"size": 32, "count": 2, "batch_size": 16, "locked_image": 0},
            # The gradient of a bias before BatchNorm is rounding, of which AdamW makes whole steps.
            "optim": {"learning_rate": 1e-4, "heads_lr_scale": 0.01},
        },
    )
    one = weights_after(with_changes(base, {"run": {"out": f"{tmp_path}/one"}}), 1)
    for strategy in strategies:
        parallel = {"strategy": strategy}
        config = with_changes(
            base, {"run": {"out": f"{tmp_path}/{strategy}"}, "parallel": parallel}
        )
        two = weights_after(config, 2)
        assert two.keys() == one.keys()
        assert relative_difference(two, one, base) < 0.01


def sharded_layers(config: Config) -> list[str]:
    """The layers of a sharded model that are gathered one by one."""
    built, _ = training_model(config, torch.device("cpu"), resolve_start(config.model))
    return [name for name, part in built.named_modules() if name and isinstance(part, FSDPModule)]


def test_towers_of_transformers_are_gathered_layer_by_layer(tmp_path):
    model = ModelConfig(start=f"hf:{save_dual_encoder(tmp_path / 'dual')}", heads=HEADS)
    parallel = ParallelConfig(strategy="fsdp")
    config = replace(tiny_config(out="unused"), model=model, parallel=parallel)
    (found, _) = run_distributed(sharded_layers, 2, config)
    layers = sorted((name.split(".")[1], name.split(".")[-1]) for name in found)
    assert layers == [("text", "0"), ("visual", "0")]
