"""Nothing that a model brings along runs, whatever command opens it; what is wrong is a line."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import ViTConfig, ViTModel

import protoclip
from protoclip.cli import main
from tiny_hugging_face import save_bert, save_dual_encoder, save_siglip
from tiny_starts import CLIP, save_open_clip


class Hostile:
    """Unpickling it makes the file `ran`."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> Any:
        return (Path.touch, (self.ran,))


def save_pickle(file: Path) -> None:
    file.write_bytes(pickle.dumps({"state_dict": Hostile(file.with_name("ran"))}, protocol=2))


def add_code(folder: Path, *names: str) -> Path:
    """Let the JSON files of a folder ask for classes of a module beside, which makes `ran`."""
    ran = folder.parent / "ran"
    (folder / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass Evil: pass\n"
    )
    kinds = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoImageProcessor", "AutoProcessor")
    for name in names:
        file = folder / name
        settings = json.loads(file.read_text()) if file.exists() else {}
        settings["auto_map"] = dict.fromkeys(kinds, "evil.Evil")
        file.write_text(json.dumps(settings))
    return folder


def with_code_and_pickles(save: Callable[[Path], Path], folder: Path) -> str:
    """A good model, beside which lie code and pickled weights."""
    add_code(
        save(folder / "model"), "config.json", "tokenizer_config.json", "preprocessor_config.json"
    )
    save_pickle(folder / "model" / "pytorch_model.bin")
    return str(folder / "model")


@pytest.mark.parametrize("save", [save_siglip, save_dual_encoder])
def test_a_good_model_with_code_beside_it_opens_without_the_code(save, tmp_path):
    start = with_code_and_pickles(save, tmp_path)
    protoclip.load(start)
    protoclip.export(start, tmp_path / "out", ["hf"])
    with pytest.raises(SystemExit):
        main(["train", "--model.start", start, "--data.train", "none.tsv"])
    assert not list(tmp_path.rglob("ran"))
    assert not [*(tmp_path / "out").rglob("*.py"), *(tmp_path / "out").rglob("*.bin")]


def of_unknown_kind(folder: Path) -> str:
    model = save_siglip(folder / "model")
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "model_type": "evil"}))
    return str(add_code(model, "config.json"))


def with_text_tower(folder: Path) -> str:
    """Its text tower is elsewhere, of a kind that brings its own code."""
    bert = save_bert(folder / "bert")
    text = {"context_length": 12, "hf_model_name": str(bert), "hf_proj_type": "linear"}
    model = save_open_clip(folder / "model", {**CLIP, "text_cfg": text})
    (bert / "config.json").write_text(json.dumps({"model_type": "evil"}))
    add_code(bert, "config.json")
    return str(model)


def pickled_hugging_face(folder: Path) -> str:
    model = save_siglip(folder / "model")
    (model / "model.safetensors").unlink()
    save_pickle(model / "pytorch_model.bin")
    return str(model)


def pickled_open_clip(folder: Path) -> str:
    model = save_open_clip(folder / "model")
    (model / "open_clip_model.safetensors").unlink()
    save_pickle(model / "open_clip_pytorch_model.bin")
    return str(model)


def reference_code(folder: Path) -> str:
    save_pickle(folder / "epoch.pt")
    return f"reference:{folder / 'epoch.pt'},model=RN50"


def adapter(folder: Path) -> str:
    """A good model, beside which lies what peft writes, but pickled."""
    pytest.importorskip("peft")  # without it transformers looks for no adapters
    model = save_siglip(folder / "model")
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(model), "r": 2}
    (model / "adapter_config.json").write_text(json.dumps(settings))
    save_pickle(model / "adapter_model.bin")
    return str(model)


WRONG: dict[Callable[[Path], str], str] = {
    of_unknown_kind: "needs its own code, which never runs here; choose another model",
    with_text_tower: "needs its own code, which never runs here; choose another model",
    pickled_hugging_face: "pytorch_model.bin is pickled and could run code; convert it to safetens",
    pickled_open_clip: "open_clip_pytorch_model.bin is pickled and could run code; convert it to",
    reference_code: "holds more than tensors, which could run code and is not read; save its",
    adapter: "cannot be opened (",
}


def test_no_question_asks_whether_to_run_a_tokenizer(tmp_path, monkeypatch, capsys):
    """A model of a kind that has none, whose folder names a class beside it."""
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=32)
    model = tmp_path / "model"
    ViTModel(config, add_pooling_layer=False).save_pretrained(model)
    add_code(model)
    tokenizer = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(SystemExit):
        main(["embed-teacher", "--teacher", f"hf:{model}", "--out", str(tmp_path / "out")])
    assert not list(tmp_path.rglob("ran"))
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("command", ["export {} {}/out", "train --model.start {} --run.out {}/out"])
@pytest.mark.parametrize("make", WRONG)
def test_what_cannot_be_opened_is_one_line(make, command, tmp_path, capsys):
    """No code runs, and nothing is left."""
    reference = make(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(command.format(reference, tmp_path).split())
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("protoclip: error: ")
    assert WRONG[make] in said[-1]
    assert all(text.startswith("note: ") for text in said[:-1])
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert not list(tmp_path.rglob("ran"))


def test_the_pickle_is_hostile(tmp_path):
    """Read as a pickle, it runs; so the tests above can fail."""
    save_pickle(tmp_path / "a.bin")
    pickle.loads((tmp_path / "a.bin").read_bytes())
    assert (tmp_path / "ran").exists()
