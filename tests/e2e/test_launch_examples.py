"""The examples of `examples/launch`, as far as they can be tried without a cluster."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from protoclip.cli.spec import parse
from protoclip.cli.train import Train

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "examples" / "launch"
SCALING = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
BUCKET = "s3://my-bucket/cc3m/"  # a folder of *.tar files


@pytest.mark.parametrize("script", ["protoclip", "torchrun"])
def test_the_head_of_a_slurm_script_says_what_to_type(script, monkeypatch):
    """In the folder of the clone; with a teacher too."""
    monkeypatch.chdir(ROOT)
    text = (LAUNCH / f"{script}.sbatch").read_text(encoding="utf-8")
    clip, proto = (shlex.split(line) for line in re.findall(r"^#   (RUN=.+)", text, re.MULTILINE))
    for words in (clip, proto):
        assert words[1:3] == ["sbatch", f"examples/launch/{script}.sbatch"]
        given = parse(Train, words[3:])
        assert given.data.train == "cc3m"  # which its recipe says how to get
    assert with_a_teacher(given, "cc3m-teacher")


def with_a_teacher(given: Train, features: str) -> bool:
    return bool(given.loss.teacher) and given.teacher.features == features


def trains(command: list[str], **variables: str) -> Train:
    """What `torchrun ... -m protoclip train ...` trains."""
    words = [re.sub(r"\$(\w+)", lambda name: variables[name[1]], word) for word in command]
    assert words[0] == "torchrun"
    place = words.index("protoclip")
    assert words[place - 1 : place + 2] == ["-m", "protoclip", "train"]
    return parse(Train, words[place + 2 :])


def test_a_spot_machine_goes_on_from_the_bucket(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (LAUNCH / "skypilot.yaml").read_text(encoding="utf-8")
    task = yaml.safe_load(text)
    assert task["resources"]["use_spot"] is True
    activate, line = task["run"].replace("\\\n", " ").splitlines()
    assert activate in task["setup"].splitlines()
    command, variables = shlex.split(line), {"SKYPILOT_NUM_GPUS_PER_NODE": "8", **task["envs"]}
    given = trains(command, **variables)
    assert (given.resume, given.run.sync) == ("auto", task["envs"]["SYNC"])
    assert given.data.train == task["envs"]["DATA"] == BUCKET
    (recipe,) = re.findall(r"--env RECIPE=([\w./]+)", text)
    more = shlex.split(re.findall(r"^#   (--teacher.+)", text, re.MULTILINE)[0])
    other = trains([*command, *more], **(variables | {"RECIPE": recipe}))
    assert with_a_teacher(other, f"{BUCKET[:-1]}-teacher")
    assert (other.data.validation, other.run.evaluate_every) == (0, 0)
    extras(re.findall(r"\[(.+?)\]", task["setup"])[0])


def test_a_pod_has_time_to_save(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (LAUNCH / "trainjob.yaml").read_text(encoding="utf-8")
    runtime, job = yaml.safe_load_all(text)
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod: dict[str, Any] = node["template"]["spec"]["template"]["spec"]
    trainer = job["spec"]["trainer"]
    command = trainer["command"] + trainer["args"]
    timeout = int(command[command.index("--shutdown-timeout") + 1])
    assert f"`--shutdown-timeout {timeout}`" in SCALING
    assert pod["terminationGracePeriodSeconds"] > timeout
    assert "`terminationGracePeriodSeconds`" in SCALING
    given = trains(command)
    assert (given.resume, given.run.sync) == ("auto", "s3://my-bucket/runs/clip-0")
    assert given.data.train == BUCKET
    more = re.findall(r"^ +# - (--\S+)$", text, re.MULTILINE)
    other = trains([*command, *more, "--config=recipes/cc3m_rn50.toml"])
    assert with_a_teacher(other, f"{BUCKET[:-1]}-teacher")
    assert (other.data.validation, other.run.evaluate_every) == (0, 0)


def extras(names: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {*names.split(",")} <= project["optional-dependencies"].keys()
