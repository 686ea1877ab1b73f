"""`protoclip choose` on tiny data, between tiny encoders."""

import json
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import timm
import torch
from safetensors.torch import save_file

import protoclip
from protoclip.cli import COMMANDS, main
from protoclip.cli.spec import parse
from protoclip.encode.encoder import Encoder
from protoclip.evaluation.validation import open_data
from protoclip.models.checkpoint import read_config
from protoclip.results import choose
from testing import noisy_pairs, tiny_config
from tiny_align import stop_in_episode

PAIRS = 120


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
    pairs = noisy_pairs(PAIRS).rename_columns({"caption": "title"})
    pq.write_table(pairs, folder / "pairs.parquet")
    image = f"timm:test_resnet/{folder}/weights.safetensors"
    text = f"hf:{save_bert(folder / 'bert')}"
    words = ["choose", "--data", f"{folder}/pairs.parquet", "--caption_column", "title"]
    return [*words, "--images", image, "--texts", text]


def test_rivals_are_measured_on_pairs_that_none_has_seen(
    words, tiny_run, tmp_path, capsys, monkeypatch
):
    """The best two pairs of encoders are aligned, the better one fine-tuned. A run that saw the
    pairs is shown, and not recommended. A second call finds all that the first one made."""
    given = [*words, "--out", str(tmp_path / "out"), "--models", str(tiny_run), "--json"]
    place = given.index("--texts")
    given.insert(place, given[place - 1].replace("weights.", "others."))
    # Without the engine that many images would have, which takes seconds to make for each rival.
    monkeypatch.setattr(choose, "accelerate", lambda encoder, number: encoder)
    main(given)
    first = json.loads(capsys.readouterr().out)
    assert first[0]["model"] != str(tiny_run)
    kinds = [one["model"].partition(":")[0] for one in first if one["model"] != str(tiny_run)]
    assert sorted(kinds) == ["aligned", "aligned", "fine-tuned"]
    (number,) = {one["samples"] for one in first}
    assert 10 <= number <= choose.LARGEST * PAIRS
    for place, one in enumerate(first):
        assert one["metrics"].keys() == {choose.AT_1, choose.AT_10}
        assert ("differences" in one) == (place > 0)
        assert one["megabytes"] > 0 < one["images_per_second"]
        commands = [shlex.split(part) for part in one["command"].split(" && protoclip ")]
        parsed = [parse(COMMANDS[kind], rest) for kind, *rest in commands]
        if one["model"] == str(tiny_run):
            assert (one["trained_on"]["images"], one["minutes"]) == (number, 0)
            assert (parsed[0].data, parsed[0].caption_column) == (words[2], "title")
            continue
        assert one["minutes"] > 0
        data = read_config(Path(one["reference"])).data
        held_out = open_data(one["reference"]).splits["test"]
        assert (data.train, len(held_out.images)) == (words[2], number)
        assert {step.data.train for step in parsed} == {words[2]}
        assert {step.data.caption_column for step in parsed} == {"title"}
        assert {step.data.validation for step in parsed} == {data.validation}
    encoded: Counter[int] = Counter()
    kept = []  # so that no later encoder is counted under the id of one that is gone

    def encode(self, inputs, before=Encoder.encode):
        kept.append(self.prepare)
        encoded[id(self.prepare)] += len(inputs)
        return before(self, inputs)

    monkeypatch.setattr(Encoder, "encode", encode)
    stop_in_episode(monkeypatch, 1)  # which a finished run has not
    monkeypatch.setattr(choose, "time_images", lambda *given: 100.0)
    main(given[:-1])
    out = capsys.readouterr().out
    assert all(one["model"] in out for one in first)
    assert out.splitlines()[-1].startswith("protoclip align ")
    # No more than the examples that tell encoders apart.
    assert max(encoded.values()) <= 4


def test_without_published_models_the_only_one_is_not_called_the_best(words, tmp_path, capsys):
    main([*words, "--out", str(tmp_path / "out"), "--models", "none", "--minutes", "0"])
    said, command = capsys.readouterr().out.splitlines()[-2:]
    assert said.startswith(f"the only one measured: {tmp_path}/out/")
    assert command.startswith("protoclip align ")
    assert "--data.validation 0.2 " in command


def test_an_interruption_loses_the_rival_at_work(words, tiny_run, tmp_path, capsys, monkeypatch):
    """Which goes on from its checkpoint. Fine-tuning is left out where there is no time."""
    monkeypatch.setattr(choose, "find_published", lambda: [str(tiny_run)])
    given = [*words, "--out", str(tmp_path / "out"), "--minutes", "0"]
    with monkeypatch.context() as patch:
        stop_in_episode(patch, 3)
        with pytest.raises(SystemExit) as stopped:
            main(given)
    assert stopped.value.code == 143
    main(given)
    out, err = capsys.readouterr()
    assert "going on from" in err
    assert "left out: fine-tuning" in err
    assert "aligned: timm:test_resnet/weights.safetensors + hf:/bert" in out
    others = tmp_path / "others.json"
    others.write_text(json.dumps([f"pairs.parquet/{row}" for row in range(100)]))
    main([*given, "--only", str(others)])  # other pairs, so other rivals
    assert len([*(tmp_path / "out").glob("*/aligned-*")]) == 2


def test_what_the_hub_refuses_is_left_out(words, tmp_path, capsys, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("only for those with access")

    monkeypatch.setattr(choose, "load_encoder", refuse)
    monkeypatch.setattr(choose, "find_published", lambda: [*choose.PUBLISHED])
    with pytest.raises(SystemExit):  # where the aligned model is opened
        main([*words, "--out", str(tmp_path / "out")])
    assert capsys.readouterr().err.count("left out: only for those with access") == 3


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


def test_licences_are_those_that_are_published_with_weights():
    """As timm and a package's model card say; of a file nothing is known."""
    assert choose.find_licence("minilm") == "apache-2.0"
    assert choose.find_licence("timm:tf_efficientnet_lite0") == "apache-2.0"
    assert choose.find_licence("timm:tf_efficientnet_lite0//a.safetensors") == "unknown"
