"""`protoclip explore`: its options, and whether pages are served or written."""

import errno
import socket
from contextlib import closing
from dataclasses import KW_ONLY, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from protoclip import rules
from protoclip.cli import spec
from protoclip.cli.data import open_source, print_notes
from protoclip.config import Count, DataConfig
from protoclip.terminal import counted, say, visible

if TYPE_CHECKING:
    from protoclip.explore.explorer import Explorer

PORTS = range(8000, 8100)  # of which the first free one is taken


@dataclass(frozen=True)
class Explore(spec.ChosenOptions, spec.BatchOption, spec.Answers):
    """Look at pairs in a browser, as one or two models see them.

    A map, prototypes, odd pairs, near-duplicates, and search by text and
    image. docs/explore.md says how to clean data with it.
    """

    models: list[str]  # One or two: runs, checkpoints, open_clip:NAME/TAG, hf:NAME.
    _: KW_ONLY
    data: str | None = None  # Pairs, as for train; else the first run's own.
    class_column: str | None = None  # Column of a table that holds the class.
    map: Literal["auto", "pca", "umap"] = "auto"  # auto: umap if umap-learn is installed.
    groups: Count | None = None  # Prototypes per modality; else a tenth of the pairs.
    port: Annotated[int, 0, 65535] | None = None  # Port; unset, the first free one from 8000.
    host: str = "127.0.0.1"  # Address to serve on.
    static: str | None = None  # Write read-only pages to this folder instead.
    atlas: str | None = None  # Write embedding-atlas's table to this file instead.
    workers: Annotated[int, 0, 4096] | None = None  # Threads that read images; unset, one per core.
    cache: bool = True  # Keep features and the map for the next start.

    def __call__(self) -> None:
        self.check()
        # At once, since libraries, model and pairs take a while.
        opening = f"opening {' and '.join(self.models)}{f' on {self.data}' if self.data else ''}"
        if self.static is None and self.atlas is None:
            with closing(listen(self.host, self.port)) as listening:  # before slow imports
                say(opening)
                self.serve(self.explorers(), listening)
            return
        say(opening)
        explorers = self.explorers()
        from protoclip.explore.pages import FILE_PAIRS
        from protoclip.explore.serve import write_static, write_table
        from protoclip.export.search import make_search

        facts = dict[str, Any]()
        if self.static is not None:
            number = write_static(explorers, Path(self.static), make_search)
            facts |= {"static": self.static, "pages": number}
            say(f"written to {self.static}; open {self.static}/index.html; share the whole folder")
        if self.atlas is not None:
            rows = write_table(explorers[0], Path(self.atlas))
            say(f"{counted(rows, 'row')} written to {self.atlas}; look at them with")
            image = " --image image" if rows <= 2 * FILE_PAIRS else ""
            look = f"embedding-atlas {self.atlas} --x x --y y --text text{image}"
            facts |= {"atlas": self.atlas, "rows": rows, "look": look}
        self.answer(facts, lambda: self.atlas and print(visible(facts["look"])))

    def check(self) -> None:
        """Refuse what cannot be opened or written, before anything slow."""
        if not 1 <= len(self.models) <= 2:
            raise ValueError(f"{len(self.models)} models: give one or two")
        if self.atlas is not None and len(self.models) > 1:
            raise ValueError("--atlas: takes one model")
        if not self.host.strip():
            raise ValueError("--host: is empty, which would mean all addresses; name one")
        for model in self.models:
            rules.require_model("", model)
        if self.data is not None:
            rules.require_source("--data", self.data)
        rules.require_data_paths(DataConfig(only=self.only, without=self.without, root=self.root))
        if self.static is not None:
            rules.require_place("--static", self.static, is_folder=True)
            rules.require_new("--static", self.static)
        if self.atlas is not None:
            rules.require_place("--atlas", self.atlas, is_folder=False, suffix=".parquet")
            rules.require_new("--atlas", self.atlas)  # it may hold somebody's pairs
        spec.require_libraries("explore")

    def explorers(self) -> "list[Explorer]":
        """Each model over the pairs."""
        with spec.quick_imports():
            from protoclip.explore.explorer import open_explorer
            from protoclip.explore.pairs import explore_pairs
            from protoclip.models.checkpoint import read_run_config

        device, data = spec.open_device(), self.settings()
        try:
            samples, notes = open_source(data)
        except (ValueError, OSError) as error:
            if self.data is not None:
                raise
            raise ValueError(f"{error}; name the pairs with --data if they have moved") from None
        print_notes(notes)
        pairs = explore_pairs(samples, class_column=self.class_column)
        given: dict[str, Any] = {"device": device, "layout": self.layout(), "number": self.groups}
        given |= {name: getattr(self, name) for name in ("batch_size", "workers", "cache")}
        explorers = []
        for model in self.models:
            config = read_run_config(model)
            trained_on = config is not None and places_of(data) <= places_of(config.data)
            explorers.append(open_explorer(model, pairs, trained_on=trained_on, **given))
        return explorers

    def settings(self) -> DataConfig:
        """What the options say; of data that is not named, what the first run's settings say."""
        if self.data is not None:
            return DataConfig(train=self.data, **self.data_settings())
        from protoclip.models.checkpoint import read_run_config

        config = read_run_config(self.models[0]) if Path(self.models[0]).exists() else None
        if config is None:
            raise ValueError(
                f"{self.models[0]}: does not record its training data; name pairs with --data"
            )
        # A run may have streamed shards that lie here, where they can be read in any order too.
        return replace(config.data, read="auto", **self.data_settings())

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
        host = socket.gethostname() if self.host in ("0.0.0.0", "::") else self.host
        host = f"[{host}]" if ":" in host else host
        url = f"http://{host}:{listening.getsockname()[1]}/?token={token}"
        self.answer({"url": url}, lambda: print(f"open {url}", flush=True))
        say("Ctrl-C ends it")
        make_server(pages, host=self.host, token=token).run(sockets=[listening])


def places_of(data: DataConfig) -> set[Path]:
    """Where the sources are, which tells whether two settings read the same pairs."""
    paths = [source.path for source in data.sources] or [data.train]
    return {Path(path).resolve() for path in paths}


def listen(host: str, port: int | None) -> socket.socket:
    """A socket that listens: on the port, or without one on the first of `PORTS` that is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for number in PORTS if port is None else [port]:
        try:
            return socket.create_server((host, number), family=family, backlog=256)
        except OSError as error:
            reason = str(error.strerror).partition(" (while")[0]
            if error.errno != errno.EADDRINUSE:
                break
    raise ValueError(
        f"--port: cannot listen on {host} port {number} ({reason}); choose another, or a --host"
    )
