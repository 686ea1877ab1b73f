"""Python's cyclic collector rests while a command imports."""

import os
import subprocess
import sys

CODE = """
import gc
from protoclip.cli.spec import quick_imports
seen = []
gc.callbacks.append(lambda phase, facts: seen.append(phase))
with quick_imports():
    made = [[] for _ in range(100_000)]
print(len(seen), gc.isenabled(), gc.get_freeze_count() > 100_000)
"""


def test_nothing_is_collected_while_a_command_imports():
    found = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["0", "True", "True"]


def test_figures_are_files_whatever_the_environment_says():
    code = "from contextlib import suppress; from protoclip.__main__ import main\n"
    code += "with suppress(SystemExit): main()\nimport matplotlib"
    variables = {**os.environ, "MPLBACKEND": "garbage"}
    subprocess.run(
        [sys.executable, "-c", code, "--version"], env=variables, capture_output=True, check=True
    )
