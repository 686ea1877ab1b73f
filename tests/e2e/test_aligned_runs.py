"""Finished runs of `protoclip align` in other commands: exports, fine-tuning, reports."""

import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import cache
from pathlib import Path

import pytest
import torch

import protoclip
from protoclip import cli
from protoclip.models.start import find_start
from protoclip.training.run import align
from tiny_align import of_source, run_onnx_example, weights_of
from tiny_hugging_face import save_mpnet, save_text_model
from tiny_starts import save_open_clip


@pytest.fixture(scope="module")
def aligned(given, sources, tmp_path_factory) -> Callable[..., Path]:
    """Makes a run between two encoders. What it said is in a file beside it."""
    folder = tmp_path_factory.mktemp("aligned")
    clip = {"name": str(save_open_clip(folder / "clip"))}
    mpnet = {"name": str(save_mpnet(folder / "mpnet")), "context_length": 20}
    images = {"timm": given["model"]["image"], "clip": clip}
    qwen = {**mpnet, "name": str(save_text_model(folder / "qwen", "qwen3")), "pooling": "last"}
    texts = {"bert": given["model"]["text"], "mpnet": mpnet, "clip": clip, "qwen": qwen}

    @cache
    def run(image: str, text: str, loss: str = "info_nce") -> Path:
        out = folder / f"{image}-{text}-{loss}"
        plain = {"joined_layers": "plain"}  # which formats of other libraries can hold
        model = {"model": {"image": images[image] | plain, "text": texts[text] | plain}}
        more = {**model, "loss": {"instance": loss}}
        more["episodes"] = {"size": 16, "count": 2}
        with out.with_suffix(".txt").open("w") as said, redirect_stderr(said):
            align(of_source(given, sources["shared"], **more, run={"out": str(out)}))
        return out

    return run


@pytest.fixture(scope="module")
def ended(aligned) -> Path:
    """A finished run."""
    run: Path = aligned("timm", "bert")
    return run


@pytest.mark.parametrize(("text", "lora"), [("bert", 2), ("qwen", None), ("qwen", 2)])
def test_fine_tuning_goes_on_with_the_same_data(text, lora, aligned, sources, tmp_path, capsys):
    """Both encoders move, by LoRA, or whole with activations that are computed again; also a text
    tower of our own. Rows with one image are no other data."""
    run = aligned("timm", text)
    assert not find_start(str(run)).heads_are_new
    tuned = protoclip.finetune(
        {
            "model": {"start": str(run), **({"lora": lora} if lora else {})},
            "parallel": {"activation_checkpointing": lora is None},
            "data": {**sources["shared"], "workers": 0},
            "run": {"device": "cpu", "precision": "fp32", "out": str(tmp_path / "tuned")},
            "episodes": {"size": 16, "count": 1, "batch_size": 8},
        },
        alpha=1.0,
    )
    assert tuned["steps"] == 2
    said = capsys.readouterr().err
    assert "the data of" not in said
    assert "27 of 96 pairs are held out" in said
    before, after = weights_of(run), weights_of(tmp_path / "tuned")
    assert before.keys() == after.keys()
    moved = [name for name, value in after.items() if not value.equal(before[name])]
    for trunk in ("visual.trunk", "text.transformer"):
        assert any(trunk in name for name in moved)
    loaded = protoclip.load(tuned["folder"])[0].state_dict()
    assert all(value.equal(after[name]) for name, value in loaded.items())


@pytest.mark.parametrize(
    ("choices", "closed"),
    [
        ("timm bert", {"hf"}),
        ("timm mpnet", {"open_clip", "hf"}),
        ("timm qwen", {"open_clip", "hf"}),
        ("timm clip", set()),
        ("timm clip sigmoid", {"hf"}),
        ("clip bert", {"hf"}),
    ],
)
def test_formats_that_cannot_hold_a_run_are_left_out(choices, closed, aligned, tmp_path):
    run = aligned(*choices.split())
    facts = protoclip.export(run, tmp_path / "out", ("open_clip", "hf", "timm"))
    assert facts["left_out"].keys() == closed


@pytest.mark.slow
def test_a_run_between_timm_and_a_text_model_is_exported_as_onnx(aligned, tmp_path):
    """Qwen3, whose padding has its own token; tests/unit/export has a BERT. `auto` writes it, since
    open_clip and hf cannot hold the run. The card's code, without protoclip, gives its features."""
    run = aligned("timm", "qwen")
    facts = protoclip.export(run, tmp_path / "out")
    assert facts["formats"].keys() == {"onnx"}
    assert max(facts["differences"]["onnx"].values()) < 1e-5
    left = run_onnx_example(tmp_path / "out", run)
    assert "protoclip" not in left
    model, transform, tokenizer = protoclip.load(run)
    with torch.inference_mode():
        wanted = {
            "text_features": model.encode_text(tokenizer(left["captions"]), normalize=True),
            "image_features": model.encode_image(transform(left["image"])[None], normalize=True),
        }
    for name, features in wanted.items():
        torch.testing.assert_close(torch.from_numpy(left[name]), features, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "line",
    [
        "embed {run} --data {shards} --read streaming --out {out}.parquet",
        "embed-teacher --teacher {run} --data.train {pairs} --out {out}",
        "embed-teacher --teacher {run} --data.train {shards} --data.read streaming --out {out}",
    ],
)
def test_commands_take_an_aligned_run(line, given, sources, ended, tmp_path):
    """The others are in test_align_meets.py."""
    run = shutil.copytree(ended, tmp_path / "run")
    data = {"pairs": given["data"]["validation"], "shards": sources["shards"]["train"]}
    words = line.format(run=run, **data, out=tmp_path / "out").split()
    cli.main(words)
    assert list(tmp_path.glob("out*"))
