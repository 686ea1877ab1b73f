"""`protoclip explore`: its options, and whether pages are served or written.

What the pages show, and how they are served, is in `explore/`.
"""

import errno
import socket
from contextlib import closing
from dataclasses import KW_ONLY, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from protoclip.cli.spec import BatchOption, ChosenOptions, open_device, quick_imports
from protoclip.config import Count, DataConfig
from protoclip.rules import (
    require_data_paths,
    require_empty,
    require_model,
    require_place,
    require_source,
)
from protoclip.terminal import say, visible

if TYPE_CHECKING:
    from protoclip.explore.explorer import Explorer
    from protoclip.explore.pairs import ExploredPairs

USUAL_PORT = 8000
NEEDED = ("bokeh", "jinja2", "starlette", "uvicorn")


@dataclass(frozen=True)
class Explore(ChosenOptions, BatchOption):
    """Look at what a model, or two, makes of pairs, in a browser.

    A map, prototypes, odd pairs, near-duplicates, and search by text and
    image. docs/explore.md says how to clean data with it.
    """

    models: list[str]  # One or two: runs, checkpoints, open_clip:NAME/TAG, hf:NAME.
    _: KW_ONLY
    data: str | None = None  # Pairs, as data.train; else the first run's own.
    class_column: str | None = None  # Column of a table that holds the class.
    map: Literal["auto", "pca", "umap"] = "auto"  # auto: umap where umap-learn is installed.
    groups: Count | None = None  # Prototypes of each modality; else a tenth of the pairs.
    port: Annotated[int, 0, 65535] | None = None  # Port; unset, the first free one from 8000 on.
    host: str = "127.0.0.1"  # Address to serve on.
    static: str | None = None  # Write read-only pages to this folder instead.
    atlas: str | None = None  # Write embedding-atlas's table to this file instead.
    workers: Annotated[int, 0, 4096] | None = None  # Threads that read images; unset, one a core.
    cache: bool = True  # Keep features and the map for the next start.

    def __call__(self) -> None:
        if not 1 <= len(self.models) <= 2:
            raise ValueError(f"{len(self.models)} models: give one or two")
        if self.atlas is not None and len(self.models) > 1:
            raise ValueError("--atlas: takes one model")
        if not self.host.strip():
            raise ValueError("--host: is empty, which would be all addresses; name one")
        for model in self.models:
            require_model("", model)
        if self.data is not None:
            require_source("--data", self.data)
        require_data_paths(DataConfig(only=self.only, without=self.without, root=self.root))
        if self.static is not None:
            require_place("--static", self.static, is_folder=True)
            require_empty("--static", Path(self.static))
        if self.atlas is not None:
            require_place("--atlas", self.atlas, is_folder=False, suffix=".parquet")
            if Path(self.atlas).exists():  # it may hold somebody's pairs
                raise ValueError(f"--atlas: {self.atlas}: exists; choose another name")
        if missing := [name for name in NEEDED if find_spec(name) is None]:
            raise ValueError(
                f"explore: needs {' and '.join(missing)}; pip install 'protoclip[explore]'"
            )
        # At once, since libraries, model and pairs take a while.
        opening = f"opening {' and '.join(self.models)}{f' on {self.data}' if self.data else ''}"
        if self.static is None and self.atlas is None:
            with closing(listen(self.host, self.port)) as listening:  # before slow imports
                say(opening)
                self.serve(self.explorers(), listening)
            return
        say(opening)
        explorers = self.explorers()
        from protoclip.explore.atlas import MAP_PAIRS
        from protoclip.explore.serve import write_static, write_table

        if self.static is not None:
            number = write_static(explorers, Path(self.static))
            say(f"{number} pages written to {self.static}")
        if self.atlas is not None:
            rows = write_table(explorers[0], Path(self.atlas))
            say(f"{rows:,} rows written to {self.atlas}; look at them with")
            image = " --image image" if rows <= 2 * MAP_PAIRS else ""
            print(f"embedding-atlas {visible(self.atlas)} --x x --y y --text text{image}")

    def explorers(self) -> "list[Explorer]":
        """Each model over the pairs."""
        with quick_imports():
            from protoclip.explore.explorer import open_explorer

        device, pairs, layout = open_device(), self.pairs(), self.layout()
        return [
            open_explorer(
                model,
                pairs,
                device=device,
                layout=layout,
                number=self.groups,
                trained_on=self.shows_data_of(model),
                batch_size=self.batch_size,
                workers=self.workers,
                cache=self.cache,
            )
            for model in self.models
        ]

    def shows_data_of(self, model: str) -> bool:
        """Whether the pairs are of the data that a model's run was trained on, or of a part."""
        from protoclip.explore.explorer import read_run_config

        def places(data: DataConfig) -> set[Path]:
            paths = [source.path for source in data.sources] or [data.train]
            return {Path(path).resolve() for path in paths}

        config = read_run_config(model)
        return config is not None and places(self.settings()) <= places(config.data)

    def layout(self) -> Literal["pca", "umap"]:
        """How the map is made. Says so where a better one could be."""
        has_umap = find_spec("umap") is not None
        if self.map == "umap" and not has_umap:
            raise ValueError("--map: umap needs umap-learn; pip install 'protoclip[explore]'")
        if self.map == "auto" and not has_umap:
            say("note: the map is by PCA; pip install umap-learn for one of neighbourhoods")
        return "umap" if self.map != "pca" and has_umap else "pca"

    def serve(self, explorers: "list[Explorer]", listening: socket.socket) -> None:
        import secrets

        from protoclip.explore.pages import Pages
        from protoclip.explore.serve import make_server

        pages, token = Pages(explorers), secrets.token_urlsafe(16)
        pages.prepare()
        print(f"open {address(listening, self.host, token)}", flush=True)
        say("Ctrl-C ends it")
        make_server(pages, host=self.host, token=token).run(sockets=[listening])

    def pairs(self) -> "ExploredPairs":
        """The pairs to look at. Prints what was noticed about them."""
        from protoclip.cli.data import open_source, print_notes
        from protoclip.explore.pairs import explore_pairs

        data = self.settings()
        try:
            samples, notes = open_source(data)
        except (ValueError, OSError) as error:
            if self.data is not None:
                raise
            raise ValueError(f"{error}; name the pairs with --data if they have moved") from None
        print_notes(notes)
        return explore_pairs(samples, class_column=self.class_column)

    def settings(self) -> DataConfig:
        """What the options say; of data that is not named, what the first run's settings say."""
        from protoclip.explore.explorer import read_run_config

        options = {entry.name: getattr(self, entry.name) for entry in fields(ChosenOptions)}
        given: dict[str, Any] = {k: v for k, v in options.items() if v not in (None, False)}
        if self.data is not None:
            return replace(DataConfig(train=self.data, class_column=self.class_column), **given)
        config = read_run_config(self.models[0]) if Path(self.models[0]).exists() else None
        if config is None:
            raise ValueError(
                f"{self.models[0]}: is no run that says which data it was trained on; name some "
                "with --data"
            )
        column = self.class_column or config.data.class_column
        # A run may have streamed shards that lie here, where they can be read in any order too.
        return replace(config.data, read="auto", class_column=column, **given)


def listen(host: str, port: int | None) -> socket.socket:
    """A socket that listens: on the port, or without one on the first from 8000 on that is free.

    Raises:
        ValueError: The port is taken or may not be used, or the host is none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    number = USUAL_PORT if port is None else port
    while True:
        try:
            listening = socket.create_server((host, number), family=family, backlog=256)
        except (OSError, UnicodeError) as error:
            code = getattr(error, "errno", None)
            if port is None and code == errno.EADDRINUSE:
                number += 1
                continue
            setting = "--port" if code in (errno.EADDRINUSE, errno.EACCES) else "--host"
            reason = (getattr(error, "strerror", None) or str(error)).partition(" (while")[0]
            raise ValueError(
                f"{setting}: cannot listen on {host} port {number} ({reason}); choose another"
            ) from None
        if port is None and number != USUAL_PORT:
            say(f"note: port {USUAL_PORT} is taken; pages will be on port {number}")
        return listening


def address(listening: socket.socket, host: str, token: str) -> str:
    """The address to open."""
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host
    name = f"[{name}]" if ":" in name else name
    return f"http://{name}:{listening.getsockname()[1]}/?token={token}"
