"""Do two checkouts train the same weights? Each arm of the demonstration, bit for bit.

    git worktree add ../before COMMIT
    python benchmarks/equal_weights.py ../before . [-- OPTIONS]

Trains four tiny episodes with the recipes of each checkout, on one thread. OPTIONS are settings
that both know, such as `--run.precision fp32`. The installed packages are those of this Python;
what an older checkout needs besides may be on PYTHONPATH.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

RECIPES = ("emoji_clip", "emoji_protoclip", "emoji_protoclip_teacher")
TINY = {
    "run.evaluate": "false",
    "data.workers": "0",
    "episodes.count": "4",
    "episodes.size": "256",
    "episodes.batch_size": "64",
    "prototypes.number": "32",
    "teacher.number": "32",
}


def final_weights(checkout: Path, recipe: str, out: Path, options: list[str]) -> Path:
    """Train with a checkout's code, and find the weights of its last checkpoint."""
    command = [sys.executable, "-m", "protoclip", "train", "--run.out", str(out)]
    command += ["--config", str(checkout / "recipes" / f"{recipe}.toml")]
    command += [word for name, value in TINY.items() for word in (f"--{name}", value)] + options
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    path = f"{checkout.resolve() / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    variables = {**os.environ, **threads, "PYTHONPATH": path}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{checkout}: {recipe}: {done.stderr.strip().splitlines()[-1]}")
    return max(out.rglob("checkpoints/*/model.safetensors"))


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
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    if end != 2:
        raise SystemExit("give two checkouts, then -- and settings if any")
    checkouts = [Path(word) for word in words[:end]]
    for recipe in RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            weights = [
                final_weights(checkout, recipe, Path(folder) / str(number), words[end + 1 :])
                for number, checkout in enumerate(checkouts)
            ]
            print(f"{recipe}: {compare(*weights)}", flush=True)


if __name__ == "__main__":
    main()
