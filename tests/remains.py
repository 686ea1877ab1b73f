"""What is in a folder after a command: its files without times, what is not whole, what was left.

`faulting` has the commands and the faults.
"""

import io
import json
import re
import tarfile
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from safetensors import safe_open

from interrupting import MEASURED
from protoclip.data.tables import ArrowIndex, read_table
from protoclip.models.checkpoint import checkpoints, damage


def snapshot(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def without_times(path: Path) -> object:
    """The content of a file, but for how long something took, and on which day."""
    if path.suffix == ".json":
        return untimed(json.loads(path.read_bytes()))
    if path.suffix == ".jsonl":
        return [untimed(json.loads(line)) for line in path.read_bytes().splitlines()]
    return re.sub(rb"\d{4}-\d\d-\d\d", b"", path.read_bytes())


def untimed(tree: Any) -> Any:
    """A tree of JSON without durations, and without checksums and sizes of what holds them."""
    if isinstance(tree, list):
        return [untimed(each) for each in tree]
    if not isinstance(tree, dict):
        return tree
    timed = rf"{MEASURED}|checksum|metrics_bytes"
    return {k: untimed(v) for k, v in tree.items() if not re.search(timed, k)}


def packed_in(made: Mapping[str, object]) -> dict[str, tuple[bytes, ...]]:
    """Images and captions in shards, by sample id."""
    found: dict[str, dict[str, bytes]] = {}
    for name, content in made.items():
        if not name.endswith(".tar") or not isinstance(content, bytes):
            continue
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for member in tar:
                key, _, kind = f"{name}/{member.name}".partition(".tar/")[2].partition(".")
                found.setdefault(f"{name}/{key}", {})[kind] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return {
        json.loads(files.pop("json"))["sample_id"]: tuple(files[kind] for kind in sorted(files))
        for files in found.values()
    }


def is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def leftovers(folder: Path, *, killed: bool) -> list[str]:
    """Hidden files but locks, after a call that went well.

    What a process had begun that was killed, or could not remove it, stays where another process
    may be writing at the same time.
    """
    hidden = (path for path in folder.rglob(".*") if not path.name.endswith(".lock"))
    names = (path.relative_to(folder).as_posix() for path in hidden)
    shared = ("records/", "cache/features/", "run/results/", ".report.html")
    return [name for name in names if not (killed and name.startswith(shared))]


def invalid(folder: Path, *, torn: bool = True) -> list[tuple[str, str]]:
    """Files that are not whole, and what is wrong; hidden ones are on their way.

    The last line of a log may be torn until the next call continues after it.
    """
    wrong = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or is_hidden(path, folder) or path.suffix not in READERS:
            continue
        name = path.relative_to(folder).as_posix()
        try:
            READERS[path.suffix](path)
            if path.suffix == ".jsonl" and not torn and path.read_bytes()[-1:] not in (b"", b"\n"):
                raise ValueError("its last line is torn")
        except Exception as error:
            wrong.append((name, f"not valid: {name}: {error!r}"[:200]))
    for out in ("run", "stopped", "fresh"):
        for found in checkpoints(folder / out):
            if (what := damage(found)) is not None:
                name = (found / what.partition(" ")[0]).relative_to(folder).as_posix()
                wrong.append((name, f"not valid: {found.name}: {what}"))
    return wrong


def read_lines(path: Path) -> None:
    """JSON lines; the last may be torn, since the next call continues after it."""
    for line in path.read_bytes().split(b"\n")[:-1]:
        json.loads(line)


def read_tensors(path: Path) -> None:
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            file.get_tensor(name)


def read_arrays(path: Path) -> None:
    with np.load(path) as arrays:
        for name in arrays:
            assert arrays[name].nbytes


def read_tar(path: Path) -> None:
    with tarfile.open(path) as tar:
        assert tar.getmembers()


def read_index(path: Path) -> None:
    """Its facts are written after it, and are looked for before it is used."""
    if path.with_suffix(".json").exists():
        ArrowIndex(path).check()
    else:
        assert read_table(path).num_rows


def read_page(path: Path) -> None:
    assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")


READERS: dict[str, Callable[[Path], object]] = {
    ".json": lambda path: json.loads(path.read_bytes()),
    ".toml": lambda path: tomllib.loads(path.read_text(encoding="utf-8")),
    ".jsonl": read_lines,
    ".safetensors": read_tensors,
    ".npy": np.load,
    ".npz": read_arrays,
    ".parquet": pq.read_table,
    ".arrow": read_index,
    ".tar": read_tar,
    ".html": read_page,
}
