"""What is left when something breaks while a command runs: a sample of faults."""

import sys

import pytest

from faulting import Fault, Scene, draw

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="limits and signals of Linux"),
]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("fault", draw(12, seed=2), ids=str)
def test_a_fault_loses_nothing_and_the_next_call_goes_on(fault: Fault, scene: Scene) -> None:
    """It ends in a success or in one line, all files are valid, and the next call makes the same
    as one that nothing disturbed. The sample has each command twice: killed, and on a full disk."""
    first, second, wrong = scene.suffer(fault)
    assert not wrong, f"{first.said}\n{second.said}"


@pytest.mark.parametrize("command", ["align", "embed"])
@pytest.mark.parametrize(("kind", "share"), [("full disk", 0.4), ("killed", 0.7)])
def test_align_and_embed_go_on_too(command: str, kind: str, share: float, scene: Scene) -> None:
    first, second, wrong = scene.suffer(Fault(seed=0, command=command, kind=kind, share=share))
    assert not wrong, f"{first.said}\n{second.said}"
