"""Frozen text models read as many tokens as they have positions, whatever their tokenizers say."""

import sys
from pathlib import Path

import pytest
import torch

from protoclip.config import ModelConfig, TextTowerConfig
from protoclip.encode.encoder import open_encoder
from protoclip.models import loading
from protoclip.models.frozen import MAX_TOKENS

sys.path.append(str(Path(__file__).parents[2]))
from tiny_hugging_face import save_bert, save_mpnet, save_roberta


@pytest.mark.parametrize("save", [save_bert, save_mpnet, save_roberta])
def test_a_long_caption_is_cut_to_the_positions_of_the_model(save, tmp_path):
    """RoBERTa and MPNet have two more, which no token gets."""
    folder = save(tmp_path)
    teacher = open_encoder(
        f"hf:{folder}", modality="auto", pooling="mean", device=torch.device("cpu")
    )
    long, longer = teacher.encode(["a dog " * 11, "a dog " * MAX_TOKENS])  # 24 tokens of both
    torch.testing.assert_close(long, longer)
    assert teacher.encode(["a dog " * MAX_TOKENS]).isfinite().all()
    half = ModelConfig(text=TextTowerConfig(name=str(folder)))
    assert loading.context_length(half) == 24
