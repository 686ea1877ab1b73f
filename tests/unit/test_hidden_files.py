"""Hidden files in a folder that a command takes: its own that are left over go, others stay."""

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from protoclip.config import Config, DataConfig
from protoclip.data import sources
from protoclip.data.tools import pack
from protoclip.encode import teachers
from protoclip.export.run import stage_folder
from protoclip.training.folder import claim_folder
from testing import tiny_pairs

USERS = (".model.2025-backup/w.bin", ".git/sub/.a.tmp", ".git/.b.99.tmp", ".mine.tmp", ".model.txt")


def packed(out: Path) -> None:
    pq.write_table(tiny_pairs(8), out.parent / "pairs.parquet")
    pack(
        sources.open_samples(Config(data=DataConfig(train=str(out.parent / "pairs.parquet")))), out
    )


def run(out: Path) -> None:
    with claim_folder(out):
        pass


def exported(out: Path) -> None:
    with stage_folder(out / "model"):
        pass


OURS = {
    "train": (run, ".model.99/model.json", "checkpoints/.step-1.9/x", "results/.a.parquet.9.tmp"),
    "embed-teacher": (
        lambda out: teachers.read_finished(out, {}),
        ".facts.json.99.tmp",
        "parts/.00000.npz.99.tmp",
    ),
    "data pack": (packed, ".00000.tar.99.tmp"),
    "export": (exported, ".model.protoclip/x"),
}


@pytest.mark.parametrize("command", OURS)
def test_only_what_the_command_made_is_removed(command: str, tmp_path: Path) -> None:
    take, *ours = OURS[command]
    assert isinstance(take, Callable)
    out = tmp_path / "out"
    for name in (*USERS, *ours, ".model.old.protoclip/x"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("")
    take(out)
    assert [name for name in USERS if not (out / name).exists()] == []
    assert [name for name in ours if (out / name).exists()] == []
    assert (out / ".model.old.protoclip/x").exists()
