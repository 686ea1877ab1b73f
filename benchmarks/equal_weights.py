"""Do two checkouts train the same weights and print the same tables? Bit for bit, digit for digit.

    git worktree add ../before COMMIT
    python benchmarks/equal_weights.py ../before . [--only ARM ...] [-- OPTIONS]

Trains on one thread: the three arms of the demonstration for four tiny episodes, an aligned run,
one that fine-tunes a model, and one on a stream. Then it compares what `evaluate` and `compare`
print of them. OPTIONS are settings of the demonstration's arms that both checkouts know, such as
`--run.precision fp32`. The installed packages are those of this Python; what an older checkout
needs besides may be on PYTHONPATH.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import timm
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from protoclip.data.pairs import ImageTextPairs
from protoclip.data.tools import pack
from testing import tiny_pairs
from tiny_hugging_face import save_bert

DEMO = ("emoji_clip", "emoji_protoclip", "emoji_protoclip_teacher")
ARMS = (*DEMO, "aligned", "fine-tuned", "stream")
TINY = {
    "run.evaluate": "false",
    "data.workers": "0",
    "episodes.count": "4",
    "episodes.size": "256",
    "episodes.batch_size": "64",
    "prototypes.number": "32",
    "teacher.number": "32",
}
SMALL = {
    "run.device": "cpu",
    "run.precision": "fp32",
    "data.workers": "0",
    "episodes.count": "4",
    "episodes.size": "64",
    "episodes.batch_size": "16",
    "prototypes.number": "4",
}
TOWERS = {
    "model.embed_dim": "16",
    "model.image.size": "32",
    "model.text.context_length": "20",
    "model.heads.hidden_dim": "32",
    "model.heads.projection_dim": "8",
}


def write_inputs(folder: Path) -> None:
    """Pairs as a table and as shards, and two encoders with random weights."""
    torch.manual_seed(0)
    pairs = tiny_pairs(192)
    pq.write_table(pairs, folder / "pairs.parquet")
    pq.write_table(tiny_pairs(48, seed=1), folder / "validation.parquet")
    pack(ImageTextPairs(pairs, name="tiny"), folder / "shards", samples_per_shard=40)
    save_bert(folder / "bert")
    save_file(timm.create_model("test_resnet").state_dict(), folder / "image.safetensors")


def options_of(settings: dict[str, str]) -> list[str]:
    """Settings as options of the command line."""
    return [word for name, value in settings.items() for word in (f"--{name}", value)]


def run_protoclip(checkout: Path, *words: str) -> str:
    """What a checkout's command prints, on one thread, without notes and times."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    path = f"{checkout.resolve() / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    variables = {**os.environ, **threads, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "protoclip", *words]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{checkout}: {words[0]}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def train(checkout: Path, arm: str, inputs: Path, runs: Path, options: list[str]) -> Path:
    """Train an arm with a checkout's code; its folder."""
    out = runs / arm
    data = {"data.train": str(inputs / "pairs.parquet")}
    data["data.validation"] = str(inputs / "validation.parquet")
    image = {"model.image.weights": str(inputs / "image.safetensors")}
    words = ["--run.out", str(out)]
    if arm in DEMO:
        recipe = str(checkout / "recipes" / f"{arm}.toml")
        words = ["train", "--config", recipe, *options_of(TINY), *options, *words]
    elif arm == "aligned":
        encoders = {"model.image.name": "timm:test_resnet", "model.text.name": f"{inputs}/bert"}
        settings = {**data, **image, **TOWERS, **encoders, **SMALL, "loss.teacher": "1"}
        words = ["align", *options_of({**settings, "teacher.number": "4"}), *words]
    elif arm == "fine-tuned":
        start = str(train(checkout, "stream", inputs, runs / "start", []))
        words = ["finetune", start, *options_of({**data, **SMALL}), *words]
    else:
        towers = {"model.image.name": "test_resnet", "model.text.width": "32"}
        towers |= {"model.text.layers": "1", "model.text.heads": "2"}
        settings = {**TOWERS, **towers, **SMALL, "data.train": str(inputs / "shards")}
        settings["data.validation"] = data["data.validation"]
        words = ["train", *options_of(settings), *words]
    run_protoclip(checkout, *words)
    return out


def find_weights(out: Path) -> Path:
    """The weights of a run's last checkpoint."""
    return max(out.rglob("checkpoints/*/model.safetensors"))


def read_tables(checkout: Path, runs: list[Path], inputs: Path) -> dict[str, object]:
    """What `evaluate` and `compare` say of runs, by command."""
    names = [str(run) for run in runs]
    data = ["--data", str(inputs / "validation.parquet")]
    said = {"evaluate": run_protoclip(checkout, "evaluate", *names, *data, "--json", "--no-cache")}
    said |= {"compare": run_protoclip(checkout, "compare", *names, "--json")}
    return {command: leave_out_paths(json.loads(text)) for command, text in said.items()}


def leave_out_paths(value: object) -> object:
    """A JSON value without folders, dates and seconds, which differ from run to run."""
    if isinstance(value, dict):
        changing = ("seconds", "date", "time", "path", "command", "out", "environment")
        entries = {k: v for k, v in value.items() if not any(word in k for word in changing)}
        return {key: leave_out_paths(entry) for key, entry in entries.items()}
    if isinstance(value, list):
        return [leave_out_paths(entry) for entry in value]
    return Path(value).name if isinstance(value, str) and "/" in value else value


def compare(before: Path, now: Path) -> str:
    """Whether all tensors are equal; or what differs, and by how much of a tensor's largest."""
    old, new = load_file(before), load_file(now)
    if old.keys() != new.keys():
        return f"other tensors: {', '.join(sorted(old.keys() ^ new.keys()))}"
    unequal = [name for name in old if not torch.equal(old[name], new[name])]
    if not unequal:
        return f"{len(old)} tensors, equal bit for bit"
    difference, name = max(
        (float((old[name] - new[name]).abs().max() / old[name].abs().max()), name)
        for name in unequal
    )
    return f"{len(unequal)} of {len(old)} tensors differ, most {name}, by {difference:.1e}"


def main() -> None:
    words, options = sys.argv[1:], []
    if "--" in words:
        words, options = words[: words.index("--")], words[words.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", nargs=2, type=Path)
    parser.add_argument("--only", nargs="+", choices=ARMS, default=ARMS)
    given = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as name:
        inputs = Path(name)
        write_inputs(inputs)
        runs: dict[Path, list[Path]] = {checkout: [] for checkout in given.checkouts}
        for arm in given.only:
            for number, checkout in enumerate(given.checkouts):
                folder = inputs / f"checkout-{number}"
                runs[checkout].append(train(checkout, arm, inputs, folder, options))
            weights = [find_weights(runs[checkout][-1]) for checkout in given.checkouts]
            print(f"{arm}: {compare(*weights)}", flush=True)
        before, now = (
            read_tables(checkout, [run for run in folders if run.name not in DEMO], inputs)
            for checkout, folders in runs.items()
        )
        for command in before:
            same = before[command] == now[command]
            print(f"{command}: {'equal to the digit' if same else 'differs'}", flush=True)


if __name__ == "__main__":
    main()
