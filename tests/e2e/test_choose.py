"""`protoclip choose` on tiny data, between tiny encoders."""

import io
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import protoclip
from protoclip.cli import COMMANDS, main
from protoclip.cli.spec import parse
from protoclip.results import choose
from testing import tiny_config
from tiny_align import stop_in_episode

PAIRS = 120


def varied_pairs() -> pa.Table:
    """Images of noise around a colour, each with a caption of its own."""
    generator, images = np.random.default_rng(0), []
    for row in range(PAIRS):
        pixels = generator.integers(0, 128, (24, 24, 3)) + np.eye(3, dtype=np.int64)[row % 3] * 127
        buffer = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, format="PNG")
        images.append(buffer.getvalue())
    titles = [f"{('red', 'green', 'blue')[row % 3]} noise {row}" for row in range(PAIRS)]
    return pa.table({"image": images, "title": titles})


@pytest.fixture(scope="module")
def tiny_run(words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained on these pairs."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    config = tiny_config(words[2], out=str(folder))
    data = replace(config.data, caption_column="title", validation=0.0)
    protoclip.train(replace(config, data=data))
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command between an image encoder and a text encoder, on pairs that all differ."""
    pytest.importorskip("transformers")
    from tiny_hugging_face import save_bert

    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    for name in ("weights", "others"):
        save_file(timm.create_model("test_resnet").state_dict(), folder / f"{name}.safetensors")
    pq.write_table(varied_pairs(), folder / "pairs.parquet")
    image = f"timm:test_resnet/{folder}/weights.safetensors"
    text = f"hf:{save_bert(folder / 'bert')}"
    words = ["choose", "--data", f"{folder}/pairs.parquet", "--caption_column", "title"]
    return [*words, "--images", image, "--texts", text]


def read_state(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "choose.json").read_text()))


def test_rivals_are_measured_on_pairs_that_none_has_seen(
    words, tiny_run, tmp_path, capsys, monkeypatch
):
    """The best two pairs of encoders are aligned, the better one fine-tuned. A run that saw the
    pairs is shown, and not recommended. A second call finds all that the first one made."""
    given = [*words, "--out", str(tmp_path / "out"), "--models", str(tiny_run), "--json"]
    place = given.index("--texts")
    given.insert(place, given[place - 1].replace("weights.", "others."))
    # Random encoders of equal names, whose files tell them apart.
    main(given)
    first = json.loads(capsys.readouterr().out)
    rivals = {one["name"].partition(":")[0]: one for one in first}
    finetuned = next(name for name in rivals if name.startswith("finetuned-"))
    assert rivals.keys() == {str(tiny_run), "aligned-1", "aligned-2", finetuned}
    assert rivals[str(tiny_run)]["trained_on"]["images"] > 0
    assert first[0]["name"] != str(tiny_run)
    for place, one in enumerate(first):
        assert one["metrics"].keys() == {choose.AT_1, choose.AT_10}
        assert ("differences" in one) == (place > 0)
        assert one["megabytes"] > 0 < one["images_per_second"]
    measured = {n for one in read_state(tmp_path / "out")["rivals"].values() for n in one["ids"]}
    assert measured <= {*json.loads((tmp_path / "out/without.json").read_text())}
    assert 10 <= len(measured) <= choose.LARGEST * PAIRS
    for name in ("aligned-1", "aligned-2", finetuned):
        for command in rivals[name]["command"].split(" && protoclip "):
            kind, *rest = shlex.split(command)
            parsed = parse(COMMANDS[kind], rest)
            assert (parsed.data.train, parsed.data.caption_column) == (words[2], "title")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("was made before")

    monkeypatch.setattr(choose.run, "align", refuse)
    monkeypatch.setattr(choose.run, "finetune", refuse)
    monkeypatch.setattr(choose, "load_encoder", refuse)
    main(given)
    assert json.loads(capsys.readouterr().out) == first
    main(given[:-1])
    out = capsys.readouterr().out
    assert all(name in out for name in rivals)
    assert out.splitlines()[-1] == f"protoclip {first[0]['command']}"
    with pytest.raises(SystemExit):
        main([*given, "--only", str(tmp_path / "out/without.json")])
    assert f"--out: {tmp_path}/out: is of other pairs" in capsys.readouterr().err


def test_an_interruption_loses_the_rival_at_work(words, tiny_run, tmp_path, capsys, monkeypatch):
    """Which goes on from its checkpoint. Fine-tuning is left out where there is no time."""
    monkeypatch.setattr(choose, "find_published", lambda: [str(tiny_run)])
    given = [*words, "--out", str(tmp_path / "out"), "--minutes", "0"]
    with monkeypatch.context() as patch:
        stop_in_episode(patch, 3)
        with pytest.raises(SystemExit) as stopped:
            main(given)
    assert stopped.value.code == 143
    before = read_state(tmp_path / "out")
    assert len(before["rivals"]) == 1
    assert before["seconds"]["aligned-1"] > 0
    main(given)
    after, err = read_state(tmp_path / "out"), capsys.readouterr().err
    assert len(after["rivals"]) == 2
    assert after["seconds"]["aligned-1"] > before["seconds"]["aligned-1"]
    assert "going on from" in err
    assert "left out: fine-tuning" in err


def test_without_the_hub_published_models_are_left_out_in_one_line(tmp_path, capsys, monkeypatch):
    """One question tells; what was downloaded before is measured all the same."""
    monkeypatch.setattr(choose.constants, "HF_HUB_CACHE", str(tmp_path))
    questions = []
    monkeypatch.setattr(choose, "hub_answer", questions.append)
    assert choose.find_published() == []
    (line,) = capsys.readouterr().err.splitlines()
    assert all(model in line for model in choose.PUBLISHED)
    assert "the hub does not answer" in line
    first, *others = choose.PUBLISHED
    (tmp_path / "models--timm--vit_base_patch32_clip_224.openai").mkdir()
    assert choose.find_published() == [first]
    assert len(questions) == 2
    monkeypatch.setattr(choose, "hub_answer", lambda question: "there")
    assert choose.find_published() == [first, *others]
