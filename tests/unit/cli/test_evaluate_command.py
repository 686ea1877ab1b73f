"""`protoclip evaluate` with models and data that are made up."""

import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from protoclip import rules
from protoclip.cli import main
from protoclip.config import DataConfig
from protoclip.data.transforms import PillowTransform
from protoclip.evaluation import suite, validation
from protoclip.models import loading

sys.path.append(str(Path(__file__).parents[1] / "evaluation"))
from solid import Knowing, solid_data, tokenizer, transform


@pytest.fixture
def made_up(monkeypatch):
    """A model that knows all, and any data set; returns what was opened."""
    opened = []

    def open_data(reference, **settings):
        opened.append((reference, settings))
        return solid_data(reference)

    for check in ("require_model", "require_data_set"):
        monkeypatch.setattr(rules, check, lambda *_: None)
    monkeypatch.setattr("protoclip.models.start.find_start", lambda name: None)
    monkeypatch.setattr(loading, "load", lambda name: (Knowing(), transform, tokenizer))
    monkeypatch.setattr(loading, "to_device", lambda model, device: model.to(device))
    monkeypatch.setattr(validation, "open_data", open_data)
    return opened


def test_the_table_is_the_default(made_up, tmp_path, monkeypatch, capsys):
    """And features are kept in the cache folder."""
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path))
    words = "evaluate --templates simple knowing --data a --workers 0"
    main(words.split())
    shown = capsys.readouterr().out
    assert "mean_per_class_recall" in shown
    assert "which runs call image_to_text" in " ".join(shown.split())
    assert re.search(r"100\.0 \[\d\d\.\d, 100\.0\]", shown)
    assert not {"linear_probe", "knn", "clustering"} & {*shown.split()}
    assert len({path.parent for path in (tmp_path / "features").rglob("*.features")}) == 2


@pytest.mark.parametrize(
    ("models", "data"),
    [
        ("own", "own"),
        ("own/checkpoints/step-1", "own"),
        ("emoji-0 emoji-1", "emoji"),
        ("own emoji-0", None),
    ],
)
def test_without_data_a_run_is_evaluated_by_its_own(
    models, data, made_up, tmp_path, monkeypatch, capsys
):
    """Others are refused: of what use they are, nobody said."""
    monkeypatch.chdir(tmp_path)
    for name, train in (("own", "pairs.tsv"), ("emoji-0", "emoji"), ("emoji-1", "emoji")):
        Path(f"{name}/checkpoints/step-1").mkdir(parents=True)
        Path(f"{name}/config.toml").write_text(f'[data]\ntrain = "{train}"\n')
    shutil.copytree("emoji-0", "emoji-other")
    Path("emoji-other/config.toml").write_text('[data]\nvalidation = "pairs.tsv"\n')
    monkeypatch.setattr(loading, "pin_newest", lambda name: name)
    words = ["evaluate", *models.split(), "--tasks", "knn", "--no-cache"]
    if data is None:
        with pytest.raises(SystemExit):
            main(words)
        line = "protoclip: error: --data: is missing; name what to evaluate on, such as a table of"
        assert capsys.readouterr().err.startswith(line)
    else:
        main(words)
    assert [reference for reference, _ in made_up] == [data] * (data is not None)


def test_settings_reach_the_data_and_the_encoder(made_up, monkeypatch, capsys):
    """Those of data under the names in messages, which are those of `train`."""
    exact, used = PillowTransform(size=8, mean=(0.5,) * 3, std=(0.5,) * 3), []
    monkeypatch.setattr(loading, "load", lambda name: (Knowing(), exact, tokenizer))
    monkeypatch.setattr(
        suite, "compute_results", lambda encoder, *_, **__: used.append(encoder) or []
    )
    words = "--data a --data.allow_links true --data.image_column x --caption_column y --root /"
    words += " --device cpu --fast-resize --precision bf16 --json"
    main(["evaluate", "knowing", *words.split()])
    (_, settings), (encoder,) = made_up[0], used
    columns = {"image_column": "x", "caption_column": "y"}
    config = DataConfig(**columns, root="/", allow_links=True)
    assert settings == {"split": "test", "config": config}
    assert encoder.transform == replace(exact, fast=True)
    with encoder.autocast():
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
    capsys.readouterr()


def test_a_run_folder_stays_as_it_is(made_up, tmp_path, monkeypatch, capsys):
    """Its rows are of its own data, which `compare` pairs; these are others of the same name."""
    own = tmp_path / "results" / "a-test.parquet"
    own.parent.mkdir()
    for file in (own, tmp_path / "results.json"):
        file.write_text("{}")
    main(["evaluate", str(tmp_path), "--data", "a", "--no-cache"])
    shown = capsys.readouterr().out
    assert re.search(r"^│ a +│ zeroshot_classification +│", shown, re.MULTILINE)
    assert [file.read_text() for file in tmp_path.rglob("*") if file.is_file()] == ["{}", "{}"]


@pytest.mark.parametrize(
    ("train", "data", "same"),
    [
        ("pairs.tsv", "./pairs.tsv,class_column=kind", True),
        ("pairs.tsv", "other.tsv", False),
        ("hf:me/x", "hf:me/x", False),
        ("hf:me/x,split=test,config=a", "hf:me/x,config=a", True),
    ],
)
def test_a_run_on_its_own_training_pairs_is_warned_of(
    train, data, same, tmp_path, made_up, monkeypatch, capsys
):
    """Also its checkpoint; not a run on other pairs."""
    monkeypatch.chdir(tmp_path)
    checkpoint = Path("run/checkpoints/step-1")
    checkpoint.mkdir(parents=True)
    for name in ("model.json", "model.safetensors"):
        (checkpoint / name).touch()
    Path("run/config.toml").write_text(f'[data]\ntrain = "{train}"\nsources = []\n')
    for model in ("run", str(checkpoint)):
        main(["evaluate", model, "--data", data, "--tasks", "knn", "--no-cache"])
        said = f"warning: {data}: {model} was trained on "
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(said)]
        assert len(lines) == same


def test_a_later_model_is_refused_before_the_first_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load", lambda name: pytest.fail(f"{name} was loaded"))
    Path("pairs.tsv").touch()
    with pytest.raises(SystemExit):
        main(["evaluate", "open_clip:RN50", "pairs.tsv", "--tasks", "knn"])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("protoclip: error: pairs.tsv: no checkpoint here")
