"""Messages: setting, file and way out; the path of a full disk."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from audited import call, full
from near_valid import IMAGES

import protoclip
from protoclip.config import Config

# Setting, a wrong value, and what is said: what is wrong, and what would be right.
WRONG: dict[str, tuple[Any, str]] = {
    "run.sede": (1, "no such setting; did you mean run.seed?"),
    "run.device": ("quantum", "run.device: "),
    "model.image": (3, "3 is no section; give its settings by name"),
    "episodes.count": (2.5, "2.5 is no whole number"),
}


@pytest.mark.parametrize("setting", WRONG)
def test_a_wrong_setting_is_named_alike_from_everywhere(setting, tmp_path, monkeypatch):
    """In Python, on the command line, and in a recipe, whose name comes first."""
    monkeypatch.chdir(tmp_path)
    value, message = WRONG[setting]
    section, name = setting.split(".")
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        protoclip.train(Config.from_dict({section: {name: value}}))
    said = str(raised.value)
    assert said.startswith(setting)
    on_the_line = call(["train", f"--{setting}", str(value)], keeps=tmp_path).error
    if setting != "model.image":  # a section is no option
        assert on_the_line == said
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(tomli_w.dumps({section: {name: value}}))
    in_a_recipe = call(["train", "--config", str(recipe)], keeps=tmp_path).error
    own = said if setting == "run.device" else f"{recipe}: {said}"  # known only to this machine
    assert in_a_recipe == own


# Full disks


@pytest.fixture(scope="module")
def home(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs and a run of them."""
    home = shutil.copytree(trained, tmp_path_factory.mktemp("messages") / "home")
    for number, image in enumerate(IMAGES):
        (home / f"{number}.png").write_bytes(image)
    rows = [f"{number % 8}.png,caption {number}" for number in range(500)]
    (home / "pairs.csv").write_text("\n".join(["image,caption", *rows]))
    call(["data", "index", f"{home}/pairs.parquet"])  # so that not an index is what finds no room
    return home


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("data inspect {}/pairs.csv --data.workers 1", "{out}/c/index"),
        ("explore {}/run --static {out}/pages --workers 0 --cache false", "{out}/pages"),
        ("explore {}/run --atlas {out}/t.parquet --workers 0 --cache false", "{out}/t.parquet"),
    ],
)
def test_a_full_disk_names_the_path(words, named, home, tmp_path, monkeypatch):
    """Of commands that `faulting` does not draw."""
    if "/c/" in named:
        monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "c"))
    filled = [w.replace("{}", str(home)).replace("{out}", str(tmp_path)) for w in words.split()]
    with full(4096):
        ended = call(filled, writes=[tmp_path], keeps=home)
    assert ended.code == 2
    assert named.replace("{out}", str(tmp_path)) in ended.error, ended.error
    assert "File too large" in ended.error, ended.error
