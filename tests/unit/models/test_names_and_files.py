"""What a name stands for, and what a model needs beside its weights, whatever else lies around."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import open_clip
import pyarrow.parquet as pq
import torch

import protoclip
from protoclip.config import EpisodeConfig, ImageTowerConfig, ModelConfig, TextTowerConfig
from protoclip.models.checkpoint import find_checkpoint
from protoclip.models.start import names_model, resolve_start
from protoclip.models.transformers import MINILM
from protoclip.training import run
from testing import tiny_config, tiny_model, tiny_pairs
from tiny_hugging_face import save_bert
from tiny_starts import HEADS, VIT


def one_step(folder: Path, model: ModelConfig) -> Path:
    """A run of one step in `folder`."""
    pq.write_table(tiny_pairs(16), folder.with_suffix(".parquet"))
    config = tiny_config(str(folder.with_suffix(".parquet")), out=str(folder))
    config = replace(
        config,
        model=model,
        data=replace(config.data, validation=0.0),
        run=replace(config.run, evaluate=False),
        episodes=EpisodeConfig(size=16, batch_size=16, count=1, warm_up=0, locked_image=0),
    )
    run.train(config)
    return folder


def test_a_folder_does_not_take_the_name_of_a_tower(tmp_path, monkeypatch):
    """Such as that of a run; with `./` before it, it is meant."""
    monkeypatch.chdir(tmp_path)
    model = ModelConfig(image=ImageTowerConfig(name="test_resnet"), text=tiny_model().text)
    one_step(Path("test_resnet"), replace(tiny_model(), image=model.image))
    assert resolve_start(model).is_small
    assert names_model("image", "./test_resnet")
    Path(MINILM).mkdir()
    assert not names_model("text", MINILM)
    resolve_start(ModelConfig(text=TextTowerConfig(name=MINILM)))


def test_a_named_model_keeps_the_files_of_its_text_tower(tmp_path, monkeypatch):
    """open_clip reads some from the hub, for which a folder stands here that then goes away."""
    bert = save_bert(tmp_path / "hub")
    names = {"hf_model_name": str(bert), "hf_tokenizer_name": str(bert)}
    text = {**names, "hf_pooler_type": "mean_pooler", "context_length": 20}
    described = {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": text}
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny-bert.json").write_text(json.dumps(described))
    known = open_clip.factory._MODEL_CONFIGS
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(known))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [tmp_path / "configs"])
    open_clip.factory._rescan_model_configs()
    one_step(tmp_path / "run", ModelConfig(name="tiny-bert", heads=HEADS))
    model, _, tokenizer = protoclip.load(tmp_path / "run")
    with torch.no_grad():
        before = model.encode_text(tokenizer(["a red square"]))
    shutil.rmtree(bert)
    model, _, tokenizer = protoclip.load(tmp_path / "run")
    with torch.no_grad():
        assert torch.equal(model.encode_text(tokenizer(["a red square"])), before)
    # Systems add hidden files to what is copied.
    (find_checkpoint(tmp_path / "run") / "text" / ".DS_Store").write_bytes(b"")
    protoclip.load(tmp_path / "run")
