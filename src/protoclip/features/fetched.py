"""Features in a store or on the web: they are copied to the cache, whole or not at all.

Local copies are opened in `store.py`, and single files downloaded in `data/access.py`.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from protoclip.data.access import digest, download, fingerprint, is_url, reason_of
from protoclip.data.index import cache_folder
from protoclip.features import store
from protoclip.files import in_turn
from protoclip.terminal import say, without_secrets

T = TypeVar("T")


def local_copy(path: str | Path) -> Path:
    """A local path as it is; of a URL, a copy in the cache: of a teacher folder, or a user's file.

    What the store says of the files (sizes, checksums, times) names the copy, so that what has
    changed there is fetched anew. The processes of a host fetch in turn.

    Raises:
        ValueError: A file is missing, cannot be read, or changed meanwhile, or the folder is
            damaged; names the URL.
    """
    url = str(path)
    if not is_url(url):
        return Path(path)
    files = files_behind(url)
    prints = [fingerprint(each) for each in files.values()]
    copy = cache_folder() / "teachers" / digest({"files": prints})
    copy.parent.mkdir(parents=True, exist_ok=True)
    with in_turn(copy):
        if not copy.is_dir():
            scratch = copy.with_name(f".{copy.name}.fetched")
            shutil.rmtree(scratch, ignore_errors=True)  # of a fetch that was killed
            say(f"note: {without_secrets(url)} is copied to {copy}")
            try:
                fetch(files, scratch)
                if store.FACTS in files:
                    looked_at(url, scratch, store.open_folder)
                if prints != [fingerprint(each) for each in files.values()]:
                    raise ValueError(
                        f"{without_secrets(url)}: changed while it was fetched; give the same "
                        "command again"
                    )
                scratch.rename(copy)
            except BaseException:  # the next one may have another name
                shutil.rmtree(scratch, ignore_errors=True)
                raise
    return copy if store.FACTS in files else copy / next(iter(files))


def files_behind(url: str) -> dict[str, str]:
    """The URLs of a teacher folder, or of a user's file, by the names of their copies.

    Raises:
        ValueError: The facts of the folder are missing, cannot be read, or are damaged.
    """
    path = url.partition("?")[0].rstrip("/")
    name = path.rpartition("/")[2]
    if name.endswith(".parquet"):
        return {name: url}
    if name.endswith(".npy"):
        stem = path.removesuffix(".npy")
        return {name: url, f"{name.removesuffix('.npy')}.ids.txt": f"{stem}.ids.txt"}
    names = [store.FACTS, store.INDEX, store.CHECKSUMS, store.FEATURES]
    with TemporaryDirectory() as scratch:
        fetch({store.FACTS: f"{path}/{store.FACTS}"}, Path(scratch))
        facts = looked_at(path, Path(scratch), store.read_facts)
    if "checksums" not in facts:  # earlier versions wrote none
        names.remove(store.CHECKSUMS)
    return {name: f"{path}/{name}" for name in names}


def fetch(files: dict[str, str], folder: Path) -> None:
    """Copy files to a new folder."""
    for name, each in files.items():
        try:
            download(each, folder / name)
        except Exception as error:  # the clients of stores have exceptions of their own
            raise ValueError(f"{without_secrets(each)}: {reason_of(error)}") from None


def looked_at(url: str, folder: Path, read: Callable[[Path], T]) -> T:
    """What is read in the copy of a folder; a `ValueError` names the URL in its place."""
    try:
        return read(folder)
    except ValueError as error:
        raise ValueError(str(error).replace(str(folder), without_secrets(url))) from None
