"""`protoclip data inspect` and `data index`: the tokens counted, and the source."""

import subprocess
import sys

import open_clip
import pytest

from protoclip.cli.data import Index, tokens_of
from protoclip.config import DataConfig, ModelConfig, SourceConfig, TextTowerConfig
from protoclip.models.start import resolve_start

CAPTIONS = ["a dog", "", "x" * 500, "Ünïcode 猫 👩\u200d🚀 don't  &amp;\n<b> go"]


@pytest.mark.parametrize(
    "model", [ModelConfig(), ModelConfig(text=TextTowerConfig(context_length=32)), "RN50"]
)
def test_tokens_are_those_of_open_clip(model: ModelConfig | str) -> None:
    """For CLIP's tokenizer by itself and for that of a named model; with the model's length."""
    model = ModelConfig(name=model) if isinstance(model, str) else model
    count, length = tokens_of(model)
    tokenizer = open_clip.SimpleTokenizer(context_length=1000)
    lengths = (tokenizer(CAPTIONS) != 0).sum(1).tolist()
    assert count(CAPTIONS) == [(length, 0) for length in lengths]
    # A word of megabytes would take the tokenizer hours; no tower reads its end.
    assert count(["x" * 9_999 + " dog"]) == count(["x" * 500 + " dog"])
    # Without a model it follows from the captions.
    assert length == (None if model == ModelConfig() else resolve_start(model).context_length)


def test_to_look_at_data_imports_no_models() -> None:
    code = """
import sys
from protoclip.cli.data import tokens_of
from protoclip.config import ModelConfig
from protoclip.data import tools
tokens_of(ModelConfig())
print({"open_clip", "timm", "transformers"} & {*sys.modules})
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


def test_the_source_replaces_a_recipes_mixture(capsys: pytest.CaptureFixture[str]) -> None:
    """Whose paths need not be there."""
    Index("emoji", data=DataConfig(sources=[SourceConfig(path="gone.tsv")]))()
    assert " pairs indexed, in " in capsys.readouterr().out
