"""The YAML files of `examples/launch`, read by the schemas that SkyPilot and Kubeflow ship.

These packages are large, so they are not of `dev`; `examples/launch/README.md` has the command.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

LAUNCH = Path(__file__).resolve().parents[2] / "examples" / "launch"


@pytest.fixture
def sky(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # SkyPilot writes there when it is imported
    return pytest.importorskip("sky", reason="SkyPilot is not installed")


def test_skypilot_reads_its_example(sky, tmp_path):
    text = (LAUNCH / "skypilot.yaml").read_text(encoding="utf-8")
    task = sky.Task.from_yaml(str(LAUNCH / "skypilot.yaml"))
    (resources,) = task.resources
    assert (resources.accelerators, resources.use_spot) == ({"A100": 8}, True)
    from sky.jobs import recovery_strategy  # noqa: F401
    from sky.utils.registry import JOBS_RECOVERY_STRATEGY_REGISTRY

    strategy = yaml.safe_load(text)["resources"]["job_recovery"]["strategy"]
    assert JOBS_RECOVERY_STRATEGY_REGISTRY.from_str(strategy)  # the schema does not look at it

    (tmp_path / "wrong.yaml").write_text(text.replace("use_spot", "spot"), encoding="utf-8")
    with pytest.raises(ValueError, match="did you mean 'use_spot'"):
        sky.Task.from_yaml(str(tmp_path / "wrong.yaml"))


def dropped(given: Any, read: Any, place: str = "") -> list[str]:
    """The fields of a document that are not in what a model has read of it.

    The models ignore a field that they do not know, where Kubernetes refuses it.
    """
    if isinstance(given, dict) and isinstance(read, dict):
        known = given.keys() & read.keys()
        lost = [f"{place}.{name}" for name in given.keys() - known]
        return lost + [each for k in known for each in dropped(given[k], read[k], f"{place}.{k}")]
    if isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        pairs = enumerate(zip(given, read, strict=True))
        return [each for i, (a, b) in pairs for each in dropped(a, b, f"{place}.{i}")]
    return [] if given == read else [f"{place}: {given!r} became {read!r}"]


@pytest.mark.parametrize("kind", ["TrainingRuntime", "TrainJob"])
def test_kubeflow_reads_its_example(kind):
    reason = "kubeflow-trainer-api is not installed"
    models = pytest.importorskip("kubeflow_trainer_api.models", reason=reason)
    text = (LAUNCH / "trainjob.yaml").read_text(encoding="utf-8")
    (document,) = [each for each in yaml.safe_load_all(text) if each["kind"] == kind]
    model = getattr(models, f"TrainerV1alpha1{kind}")
    assert dropped(document, model.from_dict(document).to_dict()) == []

    wrong = copy.deepcopy(document)
    wrong["spec"]["nodes"] = 1
    assert dropped(wrong, model.from_dict(wrong).to_dict()) == [".spec.nodes"]
