"""`protoclip data inspect`: what it counts, and what it does not load."""

import subprocess
import sys
from pathlib import Path

import open_clip
import pytest

from protoclip.cli.data import Index, Inspect, Pack, idle, tokens_of, typed
from protoclip.cli.spec import parse
from protoclip.config import DataConfig, ModelConfig, SourceConfig, TextTowerConfig
from protoclip.models.loading import context_length

CAPTIONS = ["a dog", "", "x" * 500, "Ünïcode 猫 👩\u200d🚀 don't  &amp;\n<b> go"]


@pytest.mark.parametrize(
    "model", [ModelConfig(), ModelConfig(text=TextTowerConfig(context_length=32)), "RN50"]
)
def test_tokens_are_those_of_open_clip(model: ModelConfig | str) -> None:
    """For CLIP's tokenizer by itself and for that of a named model; with the model's length."""
    model = ModelConfig(name=model) if isinstance(model, str) else model
    count, length = tokens_of(model)
    tokenizer = open_clip.SimpleTokenizer(context_length=1000)
    assert count(CAPTIONS) == (tokenizer(CAPTIONS) != 0).sum(1).tolist()
    # A word of megabytes would take the tokenizer hours; no tower reads its end.
    assert count(["x" * 9_999 + " dog"]) == count(["x" * 500 + " dog"])
    # Without a model it follows from the captions.
    assert length == (None if model == ModelConfig() else context_length(model))


def test_settings_of_training_have_no_effect_on_data() -> None:
    """One note names them; those that say what is read draw none."""
    data = DataConfig(class_column="kind", cache_gb=0.0, augmentation="clip")
    assert idle(data) == [
        "data.augmentation, data.cache_gb: used by training alone, so no effect here"
    ]
    assert idle(DataConfig(class_column="kind")) == []
    assert idle(DataConfig(workers=2, captions=2), also=["workers"]) == [
        "data.captions: used by training alone, so no effect here",
        "data.workers: no effect here",
    ]


def test_a_recipes_settings_of_training_draw_no_note(tmp_path: Path) -> None:
    """They are there to train; what is typed is told."""
    recipe = tmp_path / "r.toml"
    recipe.write_text('[data]\naugmentation = "clip"\ncache_gb = 0\n')
    for kind, words in ((Inspect, ["emoji"]), (Pack, ["emoji", "out"]), (Index, ["emoji"])):
        for more, names in (([], []), (["--data.captions", "2"], ["data.captions"])):
            command = parse(kind, [*words, "--config", str(recipe), *more])
            assert [note.partition(":")[0] for note in idle(typed(command))] == names
            assert command.data.augmentation == "clip"


def test_inspect_says_nothing_of_a_recipes_augmentation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.toml").write_text('[data]\naugmentation = "clip"\nworkers = 0\n')
    parse(Inspect, ["emoji", "--samples", "5", "--config", str(tmp_path / "r.toml")])()
    said = capsys.readouterr()
    assert "augmentation" not in said.out + said.err


def test_inspect_warns_of_another_encoding_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything else; and takes the column by the name that messages have."""
    rows = [f"{row}.jpg,{'größer' if row % 3 else 'kleiner'}" for row in range(30)]
    (tmp_path / "a.csv").write_bytes("\n".join(["bild,caption", *rows]).encode("cp1252"))
    words = [str(tmp_path / "a.csv"), "--image_column", "bild", "--data.workers", "0"]
    parse(Inspect, [*words, "--samples", "5"])()
    said = capsys.readouterr()
    assert f"warning: {tmp_path}/a.csv: 20 of 30 lines (67%) are not" in said.err.splitlines()[0]
    assert "pairs                    10" in said.out
    parse(Inspect, [*words, "--data.max_bad_share", "0.7"])()
    assert "warning" not in capsys.readouterr().err


def test_the_source_replaces_a_recipes_mixture(capsys: pytest.CaptureFixture[str]) -> None:
    """Whose paths need not be there."""
    Index("emoji", data=DataConfig(sources=[SourceConfig(path="gone.tsv")]))()
    assert " pairs, nothing new to index; " in capsys.readouterr().out


def test_a_second_call_says_that_the_index_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    table = tmp_path / "pairs.tsv"
    table.write_text("image\tcaption\na.jpg\ta\n")
    said = []
    for _ in range(2):
        Index(str(table))()
        said.append(capsys.readouterr().out)
    assert said[0].startswith("1 pairs indexed, in ")
    assert said[1].startswith("1 pairs, nothing new to index; a look took ")


def test_inspect_loads_no_model() -> None:
    """It need not wait for open_clip and timm."""
    code = """
import sys
from protoclip.cli import main
main("data inspect emoji --samples 5 --data.workers 1".split())
slow = {"open_clip", "timm", "sklearn", "protoclip.models", "protoclip.training.run"}
print(slow & {*sys.modules})
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "tokens " in found.stdout
    assert found.stdout.splitlines()[-1] == "set()"
