"""How the explorer's pages reach a browser: by a server that asks for a token, or as files.

Every answer is made from a row number, a page number or a text; nothing that a request names is
ever opened as a file. `docs/explore.md` has the rules.
"""

import re
import secrets
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from protoclip.explore.atlas import MODALITIES
from protoclip.explore.explorer import Explorer
from protoclip.explore.pack import pack_script
from protoclip.explore.pages import (
    ALIKE,
    FILE_PAIRS,
    LARGE_SIDE,
    PAGES,
    THUMBNAIL_SIDE,
    Page,
    Pages,
    Site,
    assets,
)
from protoclip.files import checksum, naming, replacing
from protoclip.progress import Progress
from protoclip.terminal import say, visible

MAX_BODY_BYTES = 20_000_000  # of a query image
MAX_PATH = 200
MAX_CONNECTIONS = 500  # below the usual limit of open files, 1,024
LOOPBACK = ("localhost", "127.0.0.1", "::1")
MEASURES = ("number", "size", "tightness", "agreement")  # by which prototypes are sorted
TYPES = {"css": "text/css", "js": "text/javascript", "csv": "text/csv", "json": "application/json"}
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
# Pixels and quality of images in files, if there are more: 10,000 have 9 to 13 MB.
FEW_FILES, SMALL = 5000, (120, 20)
PACK = "prototypes.js/"  # not a folder of thousands of pages: a script that holds them
SHOWN_IMAGE = re.compile(r'src="\.\./images/(\d+)\.webp"')


# Served


def make_server(pages: Pages, *, host: str, token: str) -> uvicorn.Server:
    """The server; run it with a socket, and it answers until the process is interrupted."""
    settings = uvicorn.Config(
        Guard(make_application(pages), host=host, token=token),
        log_level="error",
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        http="h11",
        loop="asyncio",
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=1,
    )
    return uvicorn.Server(settings)


def make_application(pages: Pages) -> Starlette:
    """Answers requests for the pages of `PAGES`, their images and their assets."""

    def front(request: Request) -> Response:
        return respond(pages.front(), "html")

    def asset(request: Request) -> Response:
        name = request.path_params["name"]
        require(name in assets())
        return respond(assets()[name], name.rpartition(".")[2])

    def image(request: Request) -> Response:
        row, size = request.path_params["row"], request.path_params.get("size", "")
        require(row < len(pages.pairs) and size in ("", "large"))
        side = LARGE_SIDE if size else THUMBNAIL_SIDE
        return respond(pages.thumbnail(row, side), "webp")

    def find_site(request: Request) -> Site:
        number = request.path_params["site"]
        require(1 <= number <= len(pages.sites))
        site: Site = pages.sites[number - 1]
        return site

    def route(page: Page) -> Route:
        def answer(request: Request) -> Response:
            site = find_site(request)
            values = {name: v for name, v in request.path_params.items() if name != "site"}
            require(all(value in site.values(name) for name, value in values.items()))
            require(len(pages.sites) > 1 or not page.compares)
            kind = values.get("form", "html")
            queries = request.query_params.items()
            values |= {name: READERS[name](text) for name, text in queries if name in page.query}
            return respond(page.make(site, **values), kind)

        path = re.sub("{(number|position)}", r"{\1:int}", page.path)
        return Route(f"/{{site:int}}/{path}", answer, methods=["GET"])

    async def search_image(request: Request) -> Response:
        site, body = find_site(request), bytearray()
        async for chunk in request.stream():  # all of it: a client that is sending reads no answer
            body += chunk[: MAX_BODY_BYTES + 1 - len(body)]
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"an image may have at most {MAX_BODY_BYTES:,} bytes")
        return respond(await run_in_threadpool(site.search_image, bytes(body)), "html")

    def no_answer(request: Request, error: Exception) -> Response:
        """One line, and no traceback, if data or features cannot be read any more."""
        return PlainTextResponse(f"This cannot be shown: {visible(str(error))}", 500)

    routes = [
        Route("/", front, methods=["GET"]),
        Route("/assets/{name}", asset, methods=["GET"]),
        Route("/images/{row:int}.webp", image, methods=["GET"]),
        Route("/images/{size}-{row:int}.webp", image, methods=["GET"]),
        *map(route, PAGES),
        Route("/{site:int}/search-image", search_image, methods=["POST"]),
    ]
    handlers: Any = dict.fromkeys((OSError, ValueError), no_answer)
    return Starlette(routes=routes, exception_handlers=handlers)


def require(is_found: bool) -> None:
    """Answer 404 unless the page exists."""
    if not is_found:
        raise HTTPException(404)


def read_page_number(text: str) -> int:
    require(re.fullmatch("[1-9][0-9]{0,6}", text) is not None)
    return int(text)


def read_measure(text: str) -> str:
    require(text.removeprefix("-") in MEASURES)
    return text


READERS: dict[str, Callable[[str], Any]] = {  # of values behind the `?` of an address
    "page": read_page_number,
    "by": read_measure,
    "least": lambda text: float(text) if re.fullmatch(r"[01](\.\d+)?", text) else ALIKE,
    "text": str,
}


def respond(body: str | bytes, kind: str) -> Response:
    """A response of that kind. The browser may cache images and assets until the cookie changes:
    the next server has another cookie, and may show other data at the same address."""
    if isinstance(body, str):
        body = body.encode("utf-8", "replace")  # names of files may hold lone surrogates
    if kind == "html":
        return Response(body, media_type="text/html; charset=utf-8")
    keeps = kind in ("webp", "css", "js")
    headers = {"cache-control": "private, max-age=600" if keeps else "no-store", "vary": "Cookie"}
    return Response(body, media_type=TYPES.get(kind, f"image/{kind}"), headers=headers)


def cookie_name(token: str) -> str:
    """A different name for each server, since browsers share cookies between ports."""
    return f"protoclip-{checksum(token.encode())[:8]}"


class Guard:
    """Lets through requests to this host with the token, in the URL or as a cookie.

    A foreign Host header, as in DNS rebinding, is refused. So are requests by another site, unless
    they only open a page. Every answer forbids scripts, frames and requests of other origins.
    """

    def __init__(self, inner: ASGIApp, *, host: str, token: str) -> None:
        self.inner, self.token = inner, token
        self.cookie = cookie_name(token)
        self.hosts = {*LOOPBACK, host.lower()}
        if host.lower() not in LOOPBACK:
            self.hosts |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        self.any_host = host in ("0.0.0.0", "::")  # then the token alone guards

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # there are no websockets, and nothing to do at the start

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                ours = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", ()), *ours]}
            await send(message)

        await (self.refuse(scope) or self.inner)(scope, receive, send_with_headers)

    def refuse(self, scope: Scope) -> Response | None:
        """The answer to a request that is refused, or that brings the token; else None."""
        headers, request = Headers(scope=scope), Request(scope)
        if len(scope["path"]) > MAX_PATH:
            return PlainTextResponse("Too long.", 414)
        name = re.sub(r":\d*$", "", headers.get("host", "").lower()).strip("[]")
        if name not in self.hosts and not self.any_host:
            return PlainTextResponse("This host name is not served here.", 421)
        is_foreign = headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        mode = headers.get("sec-fetch-mode", "navigate")
        origin = headers.get("origin")  # another port is another site
        if (is_foreign and (mode != "navigate" or scope["method"] != "GET")) or (
            origin is not None and origin.partition("://")[2] != headers.get("host")
        ):
            return PlainTextResponse("Another site may not ask this.", 403)
        if self.is_token(request.query_params.get("token", "")):
            answer = RedirectResponse("/", 303)  # the page of the address that has the token
            answer.set_cookie(self.cookie, self.token, httponly=True, samesite="lax")
            return answer
        if not self.is_token(request.cookies.get(self.cookie, "")):
            return PlainTextResponse("Open the address that protoclip explore printed.", 403)
        return None

    def is_token(self, text: str) -> bool:
        return secrets.compare_digest(text.encode("utf-8", "replace"), self.token.encode())


# Written


def write_static(
    explorers: list[Explorer], folder: Path, make_search: Callable[..., bytes] | None = None
) -> int:
    """Write read-only pages to a new or empty folder, which appears whole; returns their number.

    They are those of `PAGES` that can be files; the others need the model. They answer texts if
    `make_search` makes a script of a model's name, features and captions. Raises `OSError`, which
    names the folder, if it holds something or cannot be written.
    """
    pages, number = Pages(explorers, live=False), 0
    if make_search is not None:
        try:
            pages.searches = [make_search(*site.searched) for site in pages.sites]
        except (ValueError, OSError) as error:
            say(f"note: the pages cannot search: {error}")
    rows = {row for site in pages.sites for row in site.atlas.rows[site.drawn].tolist()}
    real = folder.resolve()  # a link is left as it is
    with naming(folder):
        real.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=real.parent, prefix=f".{real.name}.") as scratch:
            whole = Path(scratch, "pages")
            packed = dict[str, dict[str, bytes]]()
            for name, content in make_files(pages):
                if isinstance(content, str):
                    rows.update(map(int, SHOWN_IMAGE.findall(content)))
                    content = content.encode("utf-8", "replace")
                number += name.endswith(".html")
                site, is_packed, inside = name.partition(PACK)
                if is_packed:
                    packed.setdefault(site, {})[inside] = content
                    continue
                (whole / name).parent.mkdir(parents=True, exist_ok=True)
                (whole / name).write_bytes(content)
            for site, files in packed.items():
                (whole / site / PACK).write_bytes(pack_script({}, files))
            progress = Progress("images", len(rows))
            size = SMALL if len(rows) > FEW_FILES else (THUMBNAIL_SIDE,)
            (whole / "images").mkdir()
            for done, row in enumerate(sorted(rows), 1):
                image = pages.thumbnail(row, *size)
                (whole / "images" / f"{row}.webp").write_bytes(image)
                progress.update(done)
            whole.rename(real)
    return number


def make_files(pages: Pages) -> Iterator[tuple[str, str | bytes]]:
    """The files by name, without images."""
    yield "index.html", pages.front()
    for name, asset in assets().items():
        yield f"assets/{name}", asset
    for site in pages.sites:
        if pages.searches:
            yield f"{site.number}/model.js", pages.searches[site.number - 1]
        for page in PAGES:
            if page.is_file and (len(pages.sites) > 1 or not page.compares):
                place = f"{site.number}/{PACK if '{number}' in page.path else ''}"
                for name, text in page.make_files(site):
                    yield place + name, text


def write_table(explorer: Explorer, path: Path) -> int:
    """Write the table that embedding-atlas takes; returns its number of rows.

    A row is a point of the map: the image or the text of a pair, with `x`, `y`, `text`, `image`
    (small, as WebP; only of at most 10,000 pairs), `sample_id` and its values in the atlas.
    """
    atlas, pairs = explorer.atlas, explorer.pairs
    rows = atlas.rows.tolist()
    ids = [*map(pairs.sample_id, rows)]
    # A table holds no lone surrogates.
    captions = [pairs.caption(row).encode("utf-8", "replace").decode() for row in rows]
    images: dict[str, Any] = {}
    if len(atlas) <= FILE_PAIRS:
        small = ({"bytes": pairs.thumbnail(row, THUMBNAIL_SIDE), "path": None} for row in rows)
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        images["image"] = pa.array(small, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    points = [
        pa.table(
            {
                "id": [f"{modality}:{sample_id}" for sample_id in ids],
                "modality": [modality] * len(rows),
                "x": atlas.map_position[modality][:, 0],
                "y": atlas.map_position[modality][:, 1],
                "text": captions,
                "sample_id": ids,
                "image_row": rows,
                "source": [*map(pairs.source_name, rows)],
                "class": [*map(pairs.read_class, rows)],
                "prototype": atlas.prototype[modality],
                "distance": atlas.distance.astype(np.float32),
                "loss": atlas.loss.astype(np.float32),
                **images,
            }
        )
        for modality in MODALITIES
    ]
    with replacing(path) as scratch:
        pq.write_table(pa.concat_tables(points), scratch)
    return 2 * len(atlas)
