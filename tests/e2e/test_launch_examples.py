"""The examples of `examples/launch`, as far as they can be tried without a cluster."""

import os
import re
import shlex
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from protoclip.cli.spec import parse
from protoclip.cli.train import Train

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "examples" / "launch"
SCALING = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
JOB = str(os.getpid())  # decides the port at which ranks meet
SLURM = {
    **{"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": JOB},
    **{"SLURM_CPUS_PER_TASK": "6", "SLURM_GPUS_ON_NODE": "4"},
    **{"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "[a-b]"},
}
BUCKET = "s3://my-bucket/cc3m/"  # a folder of *.tar files
# Starts two tasks as `srun` does, and ends with their largest code.
SRUN = """
import os, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
environment = {**os.environ, "JOB_SHELL": str(os.getppid())}
ranks = [
    subprocess.Popen(words, env={**environment, "SLURM_PROCID": rank, "SLURM_LOCALID": rank})
    for rank in "01"
]
sys.exit(max(rank.wait() for rank in ranks))
"""
# Stands for `protoclip`: the ranks meet, and rank 0 tells what srun and it were given.
MEET = """
import os, sys, torch
from protoclip.distributed import collectives
with collectives.process_group(torch.device("cpu")):
    ranks = collectives.all_gather_object(collectives.rank())
    if collectives.rank() == 0:
        print(ranks, os.environ["SRUN_CPUS_PER_TASK"], *sys.argv[1:])
"""
# Answers who the hosts are, and tells what else it is asked for.
SCONTROL = """
import sys
print("a\\nb" if sys.argv[1] == "show" else " ".join(["scontrol", *sys.argv[1:]]))
"""
# Stands for `torchrun`: tells what srun and it were given, and ends when `scancel` has asked it to.
TORCHRUN = """
import os, signal, sys, time
from pathlib import Path
if os.environ["SLURM_PROCID"] == "0":
    print(os.environ["SRUN_CPUS_PER_TASK"], *sys.argv[1:], flush=True)
    if os.environ["TIME"] == "over":
        os.kill(int(os.environ["JOB_SHELL"]), signal.SIGUSR1)
while os.environ["TIME"] == "over" and not Path("asked").exists():
    time.sleep(0.01)
sys.exit(1)
"""


def sbatch(
    folder: Path, protoclip: str, *words: str, script: str = "protoclip", **env: str
) -> "subprocess.CompletedProcess[str]":
    """Run a script's body, with stand-ins for what a cluster has; `protoclip` is what it starts."""
    programs = {"srun": SRUN, script: protoclip, "scontrol": SCONTROL}
    programs["scancel"] = 'import sys; open("asked", "w").write(" ".join(sys.argv[1:]))'
    (folder / "bin").mkdir()
    for name, text in programs.items():
        path = folder / "bin" / name
        path.write_text(f"#!{sys.executable}\n{text}", encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    paths = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(
        ["bash", str(LAUNCH / f"{script}.sbatch"), *words],
        env={**os.environ, **SLURM, **paths, **env},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_ranks_of_a_slurm_job_meet(tmp_path):
    ended = sbatch(tmp_path, MEET, "--run.seed", "3", RUN="runs/mine")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "[0, 1] 6 train --run.out runs/mine --resume auto --run.seed 3\n"
    parse(Train, shlex.split(ended.stdout)[4:])


@pytest.mark.parametrize(
    ("codes", "starts", "left", "again"),
    [
        ("138, 138", 9, "", True),
        ("138, 138", 0, "results.json", False),
        ("2, 2", 0, "", False),
        ("138, 143", 1, "", True),
    ],
)
def test_a_slurm_job_whose_time_is_over_goes_back_into_the_queue(
    codes, starts, left, again, tmp_path
):
    """Not one that is finished, nor one that ends by a mistake; by what this start has left, and
    where nothing tells, by the starts before."""
    (tmp_path / "run" / "checkpoints" / "step-000000004").mkdir(parents=True)
    end = f"""
import os, sys
from pathlib import Path
Path("run", {left!r}).mkdir(exist_ok=True)
sys.exit(({codes})[int(os.environ["SLURM_PROCID"])])
"""
    ended = sbatch(tmp_path, end, RUN="run", SLURM_RESTART_COUNT=str(starts))
    assert ended.returncode == max(map(int, codes.split(",")))
    assert ended.stdout == (f"scontrol requeue {JOB}\n" if again else "")


@pytest.mark.parametrize(("time", "left"), [("over", ""), ("over", "results.json"), ("left", "")])
def test_torchrun_on_the_hosts_of_a_slurm_job(time, left, tmp_path):
    """Back into the queue goes a job whose time is over, not one that is done or that fails."""
    (tmp_path / "run" / left).mkdir(parents=True)
    ended = sbatch(tmp_path, TORCHRUN, "--run.seed", "3", script="torchrun", RUN="run", TIME=time)
    assert ended.returncode == 1, ended.stderr
    told, *requeued = ended.stdout.splitlines()
    assert requeued == [f"scontrol requeue {JOB}"] * (time == "over" and not left)
    if time == "over":
        assert (tmp_path / "asked").read_text() == f"--signal=USR1 {JOB}"
    cores, *words = shlex.split(told)
    given = get_args_parser().parse_args(words)
    assert (cores, given.nnodes, given.nproc_per_node, given.rdzv_id) == ("6", "2", "4", JOB)
    assert given.rdzv_endpoint.startswith("a:")
    assert "SIGUSR1" in given.signals_to_handle.split(",")
    text = (LAUNCH / "torchrun.sbatch").read_text(encoding="utf-8")
    (seconds,) = re.findall("^#SBATCH --signal=B:USR1@(.*)", text, re.MULTILINE)
    assert given.shutdown_timeout == int(seconds)
    trained = trains(["torchrun", *words])
    assert (trained.resume, trained.run.out, trained.run.seed) == ("auto", "run", 3)


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
    known = {"name", "resources", "num_nodes", "workdir", "envs", "setup", "run"}
    assert task.keys() == known
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
    assert [each["kind"] for each in (runtime, job)] == ["TrainingRuntime", "TrainJob"]
    assert len({runtime["apiVersion"], job["apiVersion"]}) == 1
    reference = job["spec"]["runtimeRef"]
    assert (reference["kind"], reference["name"]) == (runtime["kind"], runtime["metadata"]["name"])
    assert runtime["apiVersion"].startswith(reference["apiGroup"] + "/")
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod: dict[str, Any] = node["template"]["spec"]["template"]["spec"]
    assert [container["name"] for container in pod["containers"]] == [node["name"]] == ["node"]
    trainer = job["spec"]["trainer"]
    command = trainer["command"] + trainer["args"]
    assert all(isinstance(word, str) for word in command)
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
