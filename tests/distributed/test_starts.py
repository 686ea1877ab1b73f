"""Several ranks start from the same models as one process, and train the same weights."""

import json
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from interrupting import relative_difference, with_changes
from protoclip.config import (
    Config,
    HeadConfig,
    ImageTowerConfig,
    ModelConfig,
    ParallelConfig,
    TextTowerConfig,
)
from protoclip.models.loading import training_model
from protoclip.models.saved import find_checkpoint, read_tensors
from protoclip.testing import run_distributed, tiny_config
from protoclip.training.run import train
from tiny_hugging_face import NO_DROPOUT, save_dual_encoder, save_siglip

HEADS = HeadConfig(hidden_dim=32, projection_dim=8)


def pretrained_halves(folder: Path) -> ModelConfig:
    """A timm image tower and a BERT, both with random weights in files."""
    vocabulary = {name: n for n, name in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(folder / "bert")
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    # Each rank has its own random numbers, so dropout would differ from that of one process.
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**sizes, **dropout, num_attention_heads=2, vocab_size=5)
    transformers.BertModel(config).save_pretrained(folder / "bert")
    weights = str(folder / "weights.safetensors")
    save_file(timm.create_model("test_vit").state_dict(), weights)
    return ModelConfig(
        embed_dim=16,
        image=ImageTowerConfig(name="test_vit", weights=weights, size=32),
        text=TextTowerConfig(name=str(folder / "bert"), context_length=8),
        heads=HEADS,
    )


def open_clip_folder(folder: Path) -> ModelConfig:
    """A folder of open_clip, read at another image size than its own."""
    vision = {"image_size": 48, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 8, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    model = open_clip.create_model(f"local-dir:{folder}")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return ModelConfig(start=str(folder), image=ImageTowerConfig(size=32), heads=HEADS)


def siglip(folder: Path) -> ModelConfig:
    """Towers that stay models of `transformers`, with the sigmoid loss."""
    return ModelConfig(start=f"hf:{save_siglip(folder / 'siglip')}", heads=HEADS)


def dual_encoder(folder: Path) -> ModelConfig:
    start = save_dual_encoder(folder / "dual", **NO_DROPOUT)
    return ModelConfig(start=f"hf:{start}", heads=HEADS)


def weights_after(config: Config, ranks: int) -> dict[str, Tensor]:
    run_distributed(train, ranks, config)
    return read_tensors(find_checkpoint(str(config.run.out)) / "model.safetensors")


@pytest.mark.parametrize("start", [pretrained_halves, open_clip_folder, siglip, dual_encoder])
def test_ranks_train_what_one_process_trains(start, tmp_path):
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
    for strategy in ("ddp", "fsdp"):
        parallel = {"strategy": strategy}
        config = with_changes(
            base, {"run": {"out": f"{tmp_path}/{strategy}"}, "parallel": parallel}
        )
        two = weights_after(config, 2)
        assert two.keys() == one.keys()
        assert relative_difference(two, one, base) < 0.01


def gathered_layers(config: Config) -> list[str]:
    """The layers of a sharded model that are gathered one by one."""
    built, _ = training_model(config, torch.device("cpu"))
    return [name for name, part in built.named_modules() if name and isinstance(part, FSDPModule)]


def test_towers_of_transformers_are_gathered_layer_by_layer(tmp_path):
    parallel = ParallelConfig(strategy="fsdp")
    config = replace(tiny_config(out="unused"), model=dual_encoder(tmp_path), parallel=parallel)
    (found, _) = run_distributed(gathered_layers, 2, config)
    assert {name.split(".")[1] for name in found} == {"visual", "text"}
    assert len(found) == 2
