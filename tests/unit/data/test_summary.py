"""How many processes decode, by the cores that a rank may use and by what there is to decode."""

import os

import pytest

from protoclip.config import Config, DataConfig
from protoclip.data import sources, summary
from protoclip.data.pairs import ImageTextPairs
from protoclip.data.tools import pack
from protoclip.distributed import collectives
from testing import tiny_pairs

SIDE = 100  # of the images, in pixels
PIXELS = 64 * SIDE * SIDE * 3  # bytes of all of them, decoded


@pytest.fixture
def pairs() -> ImageTextPairs:
    return ImageTextPairs(tiny_pairs(64, side=SIDE), name="tiny")


@pytest.mark.parametrize(
    ("settings", "cores", "number"),
    [
        ({}, 8, 0),
        ({"cache_gb": 1.01 * PIXELS / 1e9}, 8, 0),
        ({"cache_gb": 0.99 * PIXELS / 1e9}, 8, 8),
        ({"cache_gb": 0.99 * PIXELS / 1e9}, 1, 0),  # a process beside this one brings nothing
        ({"cache_gb": 0.0}, 8, 8),
        ({"workers": 3}, 8, 3),
        ({"workers": 0, "cache_gb": 0.0}, 8, 0),
    ],
)
def test_images_that_fit_in_memory_are_decoded_in_this_process(
    settings, cores, number, pairs, monkeypatch
):
    monkeypatch.setattr(summary, "count_cores", lambda: cores)
    data = DataConfig(**settings)
    found, note = summary.choose_workers(data, pairs, image_size=40)
    assert found == number
    assert (note is None) == ("workers" in settings)
    assert note is None or note.startswith(f"data.workers = {number}, ")
    idle = number > 0 and bool(settings.get("cache_gb")) and "workers" not in settings
    assert idle == (note is not None and note.endswith("so data.cache_gb has no effect"))


def test_a_stream_is_decoded_by_all_cores(pairs, tmp_path, monkeypatch):
    """Since its length is not known."""
    pack(pairs, tmp_path / "shards")
    data = DataConfig(train=str(tmp_path / "shards"), read="streaming")
    stream = sources.open_samples(Config(data=data))
    monkeypatch.setattr(summary, "count_cores", lambda: 8)
    assert summary.choose_workers(data, stream, image_size=40)[0] == 8
    looked = [sample.sample_id for sample in summary.read_some(stream, 5)]
    assert looked == [pairs.sample_id(row) for row in range(5)]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 12),
        ({"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "64"}, 3),  # torchrun; not by all ranks
        ({"LOCAL_WORLD_SIZE": "32"}, 1),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2),3", "SLURM_NODEID": "2"}, 4),
        # srun bound this rank to 12 of the host's 96 cores.
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_CPUS_ON_NODE": "96"}, 12),
    ],
)
def test_ranks_of_a_host_share_its_cores(environment, expected, monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(12), raising=False)
    monkeypatch.setattr(collectives, "read_quota", lambda: None)
    monkeypatch.setattr(collectives, "world_size", lambda: 19 if environment else 1)
    assert collectives.count_cores() == expected
    monkeypatch.setattr(collectives, "read_quota", lambda: 1)
    assert collectives.count_cores() == 1


def test_a_container_may_have_fewer_cores_than_its_host(tmp_path, monkeypatch):
    monkeypatch.setattr(collectives, "CGROUPS", tmp_path)
    assert collectives.read_quota() is None
    (tmp_path / "cpu.max").write_text("max 100000\n", encoding="utf-8")
    assert collectives.read_quota() is None
    (tmp_path / "cpu.max").write_text("250000 100000\n", encoding="utf-8")
    assert collectives.read_quota() == 2
