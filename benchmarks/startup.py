"""How long does a command take to start? CPU seconds of `--help`, imports and `data inspect`.

    python benchmarks/startup.py [--repeats 5] [--out FILE]

Each measurement starts a fresh Python; CPU time includes its child processes.
"""

import argparse
import datetime
import os
import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from protoclip.cli import COMMANDS
from protoclip.progress import Progress

PROTOCLIP = ["-m", "protoclip"]
CASES: dict[str, list[str]] = {
    "python -c pass": ["-c", "pass"],
    "import protoclip": ["-c", "import protoclip"],
    "import protoclip; protoclip.Config()": ["-c", "import protoclip; protoclip.Config()"],
    "protoclip --help": [*PROTOCLIP, "--help"],
    **{f"protoclip {name} --help": [*PROTOCLIP, *name.split(), "--help"] for name in COMMANDS},
    "protoclip train --run.sede 1 (a typo)": [*PROTOCLIP, "train", "--run.sede", "1"],
    "protoclip data inspect emoji --samples 20": [
        *(*PROTOCLIP, "data", "inspect", "emoji", "--samples", "20", "--data.workers", "1")
    ],
    "import torch, torchvision": ["-c", "import torch, torchvision"],
}


def cpu_seconds(arguments: list[str]) -> float:
    """CPU seconds, user and system, of a Python process with these arguments."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
    return spent() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    arguments = parser.parse_args()
    progress = Progress("benchmark: startup", arguments.repeats * len(CASES))
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for repeat in range(arguments.repeats + 1):
        for number, (name, case) in enumerate(CASES.items(), start=1):
            spent = cpu_seconds(case)
            if repeat:  # the first round fills the disk cache and writes bytecode
                seconds[name].append(spent)
                progress.update((repeat - 1) * len(CASES) + number, name)
    lines = [
        "# Startup: CPU seconds until a command can begin",
        "",
        f"`python benchmarks/startup.py --repeats {arguments.repeats}`, "
        f"{datetime.date.today().isoformat()}; {platform.machine()} CPU, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}. Median [least, most] of {arguments.repeats}.",
        "",
        "| command | CPU seconds |",
        "|---|---|",
    ]
    for name, values in seconds.items():
        span = f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"
        lines.append(f"| `{name}` | {span} |")
    text = "\n".join([*lines, ""])
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
