"""Without a network, what needs one says so in one line within seconds."""

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from audited import call

SECONDS = 5.0  # that may pass before the line
PAUSE = 60.0  # that a network without an answer lets a caller wait


def no_name(host: Any, *given: Any, **more: Any) -> Any:
    raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


def some_name(host: Any, port: Any, *given: Any, **more: Any) -> Any:
    """A public address, which is asked nothing."""
    address = ("93.184.215.14", int(port or 0))
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address)]


def refuse(self: socket.socket, address: Any) -> None:
    raise ConnectionRefusedError(111, "Connection refused")


def wait(self: socket.socket, address: Any) -> None:
    """As long as the caller allows."""
    limit = self.gettimeout()
    time.sleep(PAUSE if limit is None else limit)
    raise TimeoutError("timed out")


def blocked() -> float:
    """Seconds on a clock that stands still while this thread computes, or waits for a processor."""
    statistics = Path("/proc/thread-self/schedstat")
    computed, queued, _ = (
        map(int, statistics.read_text().split()) if statistics.exists() else (0, 0, 0)
    )
    return time.monotonic() - (computed + queued) / 1e9


# How names are looked up, how one connects, and the reason that is then given for a URL.
NETWORKS: dict[str, tuple[Callable[..., Any], Callable[..., Any], str]] = {
    "no names": (no_name, refuse, "[Errno -3] Temporary failure in name resolution"),
    "nobody answers": (some_name, wait, "no answer in time"),
}
SLOW = ("nobody answers",)
NO_HUB = "the hub does not answer"
# A command, and what its line says.
NEEDS: dict[str, str] = {
    "evaluate hf:nobody/model --data emoji": f"hf:nobody/model: {NO_HUB}",
    "evaluate open_clip:ViT-B-32/laion2b_s34b_b79k --data emoji": f"laion2b_s34b_b79k: {NO_HUB}",
    "evaluate open_clip:RN50/openai --data emoji": f"open_clip:RN50/openai: {NO_HUB}",
    "train --model.name RN50 --model.pretrained openai": f"model.name: RN50/openai: {NO_HUB}",
    "train --model.text.name nobody/model": f"model.text.name: nobody/model: {NO_HUB}",
    "data inspect hf:nobody/data": f"hf:nobody/data: {NO_HUB}",
    "data inspect https://example.com/pairs.parquet": "https://example.com/pairs.parquet: {reason}",
    "train --data.workers 0 --data.train https://example.com/{0..1}.tar": "/1.tar: {reason}",
    "evaluate {}/run --data https://example.com/pairs.csv": "example.com/pairs.csv: {reason}",
    "embed-teacher --teacher timm:resnet18 --data.train {}/pairs.parquet --out {out}/f": NO_HUB,
    "export {}/run {out}/e --formats open_clip --push_to_hub me/model --yes": "me/model: not",
}


@pytest.fixture
def cut(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """No network, of one kind; no earlier download; no proxy. Why a URL cannot be read."""
    look_up, connect, reason = NETWORKS[request.param]
    for name in ("getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, look_up)
    monkeypatch.setattr(socket.socket, "connect", connect)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(huggingface_hub.constants, name, str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "of nobody")
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return reason


# One command for each way to the network; on networks that take seconds to fail, only these.
WAYS = ("evaluate hf:", "evaluate open_clip:RN50", "train --model.text", "data inspect h", "timm:")


@pytest.mark.parametrize(
    ("cut", "command"),
    [
        pytest.param(network, command, marks=[pytest.mark.slow] * (network in SLOW))
        for command in NEEDS
        for network in NETWORKS
        if network not in SLOW or any(way in command for way in WAYS)
    ],
    indirect=["cut"],
)
def test_without_a_network_there_is_one_line_within_seconds(cut, command, trained, tmp_path):
    words = command.replace("{out}", str(tmp_path)).replace("{}", str(trained)).split()
    if words[0] == "train":
        words += ["--run.out", f"{tmp_path}/run"]
    began = blocked()
    ended = call(words, writes=[tmp_path], keeps=trained, seconds=2 * PAUSE)
    assert ended.code == 2
    assert NEEDS[command].replace("{reason}", cut) in ended.error
    assert blocked() - began < SECONDS
