"""What all tests share: one thread per process, small data to evaluate by, buckets and servers."""

import gc
import http.server
import io
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from markupsafe import Markup

from interrupting import few_emoji
from protoclip.cli.explore import Explore
from protoclip.evaluation import datasets
from testing import return_memory

EMOJI, LAYOUT = datasets.emoji, Explore.layout

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep indexes and cached images out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROTOCLIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def use_few_emoji() -> Iterator[None]:
    """Evaluate runs by every 25th of the bundled emoji, unless a test asks for `all_emoji`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "emoji", few_emoji)
        yield


@pytest.fixture
def all_emoji(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "emoji", EMOJI)


@pytest.fixture(autouse=True, scope="session")
def map_by_pca() -> Iterator[None]:
    """UMAP compiles itself for ten seconds in each process, so only tests of it ask for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Explore, "layout", lambda self: "pca" if self.map == "auto" else self.map)
        yield


@pytest.fixture(autouse=True, scope="session")
def fetch_no_packages() -> Iterator[None]:
    """Pages that are files do not search, which would export a model for each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NPM_CONFIG_REGISTRY", "/nowhere")
        yield


@pytest.fixture
def any_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Explore, "layout", LAYOUT)


@pytest.fixture(scope="module")
def without_charts() -> Iterator[None]:
    """Reports without what is inside their charts, which takes most of their time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("protoclip.results.page.draw_lines", lambda *_, **__: Markup("<svg></svg>"))
        yield


class Bucket(MemoryFileSystem):
    """An object store in memory, under the name of S3."""

    protocol = "s3"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("s3://"))


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setitem(_registry, "s3", Bucket)
    yield "s3://bucket"
    Bucket.store.clear()


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Serves files, whole or by range of bytes."""

    ranges = True

    def send_head(self):
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return None
        data = path.read_bytes()
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and self.ranges:
            start, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
            data = data[start : end + 1]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        return io.BytesIO(data)

    def log_message(self, *args) -> None:
        pass


class Whole(Ranges):
    ranges = False


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Starts a web server and returns its URL. A handler is "ranges", "whole" or a class."""
    with ExitStack() as stack:

        def start(handler: Any, folder: Path | None = None) -> str:
            handler = {"ranges": Ranges, "whole": Whole}.get(handler, handler)
            if folder is not None:
                handler = partial(handler, directory=str(folder))
            running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
            running.daemon_threads, running.block_on_close = True, False
            threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
            stack.callback(running.server_close)
            stack.callback(running.shutdown)
            return f"http://127.0.0.1:{running.server_port}"

        yield start


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def pytest_collection_finish() -> None:
    """What tests import stays: the cyclic collector need not look at it again and again."""
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    return_memory()
