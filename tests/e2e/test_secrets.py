"""A run on URLs with a password and a token keeps neither, and goes on all the same."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from interrupting import config_for, train_until, with_changes
from protoclip.cli import main
from protoclip.training import run

SECRETS = (b"somebody", b"passw0rd", b"t0ken")


def leaks(folder: Path) -> list[str]:
    """The files below a folder that hold a secret, in name or content."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [
        str(path)
        for path in files
        if any(secret in str(path).encode() + path.read_bytes() for secret in SECRETS)
    ]


class Telling:
    """A logger that writes into the run folder what settings it is told."""

    def __init__(self, folder: Path, *, config: Mapping[str, Any], step: int) -> None:
        (folder / f"told-{step}.json").write_text(json.dumps(config))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics hold no settings."""

    def close(self) -> None:
        """Nothing is left open."""


@pytest.mark.slow
def test_nothing_that_a_run_writes_or_says_holds_a_secret(shards, serve, tmp_path, capsys):
    shutil.copytree(shards, tmp_path / "served")
    broken = tmp_path / "served" / "00001.tar"
    broken.write_bytes(broken.read_bytes()[:20_000])
    url = serve("ranges", tmp_path / "served").replace("://", "://somebody:passw0rd@")
    train = f"{url}/{{00000..00002}}.tar?t0ken=1"
    settings = {"data": {"max_bad_share": 0.9, "shuffle_buffer": 20}}
    config = config_for(train, tmp_path / "run", prototypes={"source": "queue"}, **settings)
    loggers = ("tensorboard", f"{__name__}:Telling")
    config = with_changes(config, {"run": {"loggers": loggers}})
    assert train_until(6, config)["stopped"] == "SIGTERM"
    assert b"00001" in (tmp_path / "run" / "skipped.jsonl").read_bytes()
    kept = (tmp_path / "run" / "config.toml").read_text()
    assert "://***@127.0.0.1" in kept
    assert ".tar?***" in kept
    assert "Telling" not in kept
    # Another token does no harm, nor does an earlier version's config.toml.
    kept = kept.replace("://***@", "://somebody:passw0rd@").replace("?***", "?t0ken=1")
    (tmp_path / "run" / "config.toml").write_text(kept)
    other = with_changes(config, {"data": {"train": train.replace("t0ken=1", "t0ken=2")}})
    assert run.train(other, resume="auto")["steps"] == 16
    for step in (0, 6):
        seen = json.loads((tmp_path / "run" / f"told-{step}.json").read_text())
        assert "://***@127.0.0.1" in seen["data"]["train"]
        assert seen["run"]["loggers"] == ["tensorboard"]
    main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--formats", "open_clip"])
    main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "report.html")])
    shutil.rmtree(tmp_path / "served")
    assert leaks(tmp_path) == []
    assert "?***" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(SystemExit):
        main(["analyze", str(tmp_path / "run")])
    said = capsys.readouterr()
    assert "name the whole URL again" in said.err
    assert not any(secret.decode() in said.out + said.err for secret in SECRETS)
