"""Serves the explorer's pages: to this machine, and with a token.

Every answer is made from a row number, a page number or a text; nothing that a request names is
ever opened as a file. `docs/explore.md` has the rules.
"""

import asyncio
import ipaddress
import re
import secrets
import socket
from collections.abc import Awaitable, Callable
from typing import Any, cast
from urllib.parse import parse_qsl, quote, urlencode

import h11
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from protoclip.explore.atlas import MODALITIES, Modality
from protoclip.explore.explorer import UnreadableImage
from protoclip.explore.render import ALIKE, NoSuchPage, Pages, Site, assets, ids_as
from protoclip.explore.thumbnails import LARGE_SIDE, THUMBNAIL_SIDE
from protoclip.files import checksum
from protoclip.terminal import visible

MAX_BODY_BYTES = 20_000_000  # of an image that is searched for
MAX_PATH = 200
NAME_AND_PORT = re.compile(r"(\[.*\]|[^:]*)(?::\d*)?")  # of a Host header
MAX_CONNECTIONS = 500  # below the usual limit of open files, 1,024
# Seconds in which a request has to arrive, and after which nobody reads an answer any more.
REQUEST_SECONDS, READING_SECONDS = 60.0, 30.0
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
Made = tuple[str | bytes, str]  # a body, and its type


def application(pages: Pages, *, host: str, token: str) -> ASGIApp:
    """The application that answers requests for pages, behind `Guard`."""

    def site(request: Request) -> Site:
        number = request.path_params["site"]
        if not 1 <= number <= len(pages.explorers):
            raise HTTPException(404)
        return pages.site(number)

    def modality(request: Request) -> Modality:
        if (name := request.path_params["modality"]) not in MODALITIES:
            raise HTTPException(404)
        return cast(Modality, name)

    def page(request: Request) -> int:
        text = request.query_params.get("page", "1")
        number = int(text) if text.isascii() and text.isdecimal() and len(text) < 8 else 0
        if number < 1:
            raise HTTPException(400, "page: needs to be a whole number from 1")
        return number

    def prototype_of(request: Request) -> tuple[Site, Modality, int]:
        of, kind, number = site(request), modality(request), request.path_params["number"]
        if not 0 <= number < of.atlas.number:
            raise HTTPException(404)
        return of, kind, number

    def front(request: Request) -> Made:
        return pages.front(), "html"

    def index(request: Request) -> Made:
        return site(request).index(), "html"

    def map_(request: Request) -> Made:
        return site(request).map, "json"

    def map_state(request: Request) -> Made:
        return site(request).map_state(), "json"

    def prototype_list(request: Request) -> Made:
        by = request.query_params.get("by", "size")
        if by.removeprefix("-") not in ("number", "size", "tightness", "agreement"):
            raise HTTPException(404)
        return site(request).prototype_list(modality(request), by, page(request)), "html"

    def prototype(request: Request) -> Made:
        of, kind, number = prototype_of(request)
        return of.prototype(kind, number, page(request)), "html"

    def ids(request: Request) -> Made:
        of, kind, number = prototype_of(request)
        form = request.path_params["form"]
        if form not in ("csv", "json"):
            raise HTTPException(404)
        return ids_as(of.ids(kind, number), form), form

    def odd(request: Request) -> Made:
        if (by := request.path_params["by"]) not in ("distance", "loss"):
            raise HTTPException(404)
        return site(request).odd(by, page(request)), "html"

    def duplicates(request: Request) -> Made:
        text = request.query_params.get("least", "")
        least = float(text) if re.fullmatch(r"[01](\.\d+)?", text) else ALIKE
        return site(request).duplicates(least, page(request)), "html"

    def moved(request: Request) -> Made:
        if len(pages.explorers) < 2:
            raise HTTPException(404)
        return site(request).moved(modality(request), page(request)), "html"

    def pair(request: Request) -> Made:
        of, position = site(request), request.path_params["position"]
        if not 0 <= position < len(of.atlas):
            raise HTTPException(404)
        return of.pair(position), "html"

    def search(request: Request) -> Made:
        of, text = site(request), request.query_params.get("text", "")
        try:
            return of.answer(text, of.explorer.search_text(text)), "html"
        except ValueError as error:
            return of.message("Search", f"Nothing was searched for: {error}."), "html"

    async def search_image(request: Request) -> Response:
        of, body, size = site(request), bytearray(), 0
        try:
            # What is too much is read and dropped: a client that still sends reads no answer.
            async for chunk in request.stream():
                size += len(chunk)
                body += chunk if size <= MAX_BODY_BYTES else b""
        except ClientDisconnect:
            raise HTTPException(400) from None
        if size > MAX_BODY_BYTES:
            raise HTTPException(413, f"an image may have at most {MAX_BODY_BYTES:,} bytes")

        def answered() -> str:
            try:
                found = of.explorer.search_image(bytes(body))
            except UnreadableImage as error:
                return of.message("Search", f"This is no image that can be read: {error}")
            return of.answer(None, found)  # nobody kept the image

        return respond(await run_in_threadpool(answered), "html")

    def image(request: Request) -> Made:
        row, side = request.path_params["row"], THUMBNAIL_SIDE
        if request.url.path.rpartition("/")[2].startswith("large-"):
            side = LARGE_SIDE
        if not 0 <= row < len(pages.explorers[0].pairs):
            raise HTTPException(404)
        return pages.image(row, side), "webp"

    def asset(request: Request) -> Made:
        name = request.path_params["name"]
        if name not in assets():
            raise HTTPException(404)
        return assets()[name], name.rpartition(".")[2]

    def get(path: str, make: Callable[[Request], Made]) -> Route:
        def answer(request: Request) -> Response:
            return respond(*make(request))

        return Route(path, answer, methods=["GET"])

    routes = [
        get("/", front),
        get("/assets/{name}", asset),
        get("/images/large-{row:int}.webp", image),
        get("/images/{row:int}.webp", image),
        get("/{site:int}/index.html", index),
        get("/{site:int}/map.json", map_),
        get("/{site:int}/map-state.json", map_state),
        get("/{site:int}/prototypes-{modality}.html", prototype_list),
        get("/{site:int}/prototype-{modality}-{number:int}.html", prototype),
        get("/{site:int}/ids-{modality}-{number:int}.{form}", ids),
        get("/{site:int}/odd-{by}.html", odd),
        get("/{site:int}/duplicates.html", duplicates),
        get("/{site:int}/moved-{modality}.html", moved),
        get("/{site:int}/pair-{position:int}.html", pair),
        get("/{site:int}/search.html", search),
        Route("/{site:int}/search-image", search_image, methods=["POST"]),
    ]
    handlers: Any = dict.fromkeys((OSError, ValueError, MemoryError), unanswered)
    handlers[NoSuchPage] = lambda request, error: PlainTextResponse("Not Found", 404)
    inner = Starlette(routes=routes, exception_handlers=handlers)
    return Guard(inner, host=host, token=token)


def unanswered(request: Request, error: Exception) -> Response:
    """The answer where data or features cannot be read any more: one line, and no traceback."""
    return PlainTextResponse(f"This cannot be shown: {visible(str(error))}", 500)


def respond(body: str | bytes, kind: str) -> Response:
    """A body of that kind. Images and assets may be kept by the browser, until the cookie changes:
    the next server has another, and may show other data at the same address."""
    if isinstance(body, str):
        body = body.encode("utf-8", "replace")  # names of files may hold halves of characters
    if kind == "html":
        return Response(body, media_type="text/html; charset=utf-8")
    keeps = kind in ("webp", "css", "js")
    headers = {"cache-control": "private, max-age=600" if keeps else "no-store", "vary": "Cookie"}
    return Response(body, media_type=TYPES.get(kind, f"image/{kind}"), headers=headers)


def cookie_name(token: str) -> str:
    """A name of its own for each server, since browsers share cookies between ports."""
    return f"protoclip-{checksum(token.encode())[:8]}"


class Guard:
    """Lets through requests to this host that bring the token, in the URL or as a cookie.

    A foreign Host header, which a rebound name brings, is refused. So are requests that another
    site makes, unless they only open a page. Every answer forbids scripts, frames and requests of
    other origins.
    """

    def __init__(self, inner: ASGIApp, *, host: str, token: str) -> None:
        self.inner, self.token = inner, token
        self.cookie = cookie_name(token)
        loopback = {"localhost", "127.0.0.1", "::1"}
        self.hosts = {*loopback, host.lower()}
        if host.lower() not in loopback:
            self.hosts |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        self.any_address = host in ("0.0.0.0", "::")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # there are no websockets, and nothing to do at the start

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                ours = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", ()), *ours]}
            await send(message)

        refused = self.refused(scope)
        answer: Callable[[Scope, Receive, Send], Awaitable[Any]] = refused or self.inner
        await answer(scope, receive, send_with_headers)

    def refused(self, scope: Scope) -> Response | None:
        """The answer to a request that is not let through; or to one that brings the token."""
        headers, request = Headers(scope=scope), Request(scope)
        if len(scope["path"]) > MAX_PATH:
            return PlainTextResponse("Too long.", 414)
        if not self.names_this_server(headers.get("host", "")):
            return PlainTextResponse("This host name is not served here.", 421)
        fetched = headers.get("sec-fetch-site", "none"), headers.get("sec-fetch-mode", "navigate")
        foreign = fetched[0] not in ("none", "same-origin")
        if foreign and (fetched[1] != "navigate" or scope["method"] != "GET"):
            return PlainTextResponse("Another site may not ask this.", 403)
        origin = headers.get("origin")  # another port is another site
        if origin is not None and origin.partition("://")[2] != headers.get("host"):
            return PlainTextResponse("Another site may not ask this.", 403)
        given = request.query_params.get("token")
        if given is not None and self.is_token(given):
            answer = RedirectResponse(without_token(scope), 303)
            answer.set_cookie(self.cookie, self.token, httponly=True, samesite="lax")
            return answer
        if not self.is_token(request.cookies.get(self.cookie, "")):
            return PlainTextResponse("Open the address that protoclip explore printed.", 403)
        return None

    def names_this_server(self, host: str) -> bool:
        """Whether a Host header names this server."""
        parts = NAME_AND_PORT.fullmatch(host.lower().strip())
        name = parts[1].strip("[]") if parts else ""
        if name in self.hosts:
            return True
        if not self.any_address:
            return False
        try:
            ipaddress.ip_address(name)  # no name leads to an address
        except ValueError:
            return False
        return True

    def is_token(self, given: str) -> bool:
        return secrets.compare_digest(given.encode("utf-8", "replace"), self.token.encode())


def without_token(scope: Scope) -> str:
    """The address of a request, on this server, without its token."""
    # Two slashes, of either kind, would begin the name of another host.
    path = "/" + quote(scope["path"].lstrip("/"))
    query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    left = urlencode([(name, value) for name, value in query if name != "token"])
    return f"{path}?{left}" if left else path


class PatientProtocol(H11Protocol):
    """HTTP that hangs up on clients that never finish a request, or never read an answer."""

    request_timer: asyncio.TimerHandle | None = None
    reading_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.watch_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.watch_request()

    def watch_request(self) -> None:
        """Start the timer of a request that has not arrived whole; stop it for one that has."""
        arriving = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if arriving and self.request_timer is None:
            self.request_timer = self.loop.call_later(REQUEST_SECONDS, self.transport.abort)
        elif not arriving and self.request_timer is not None:
            self.request_timer.cancel()
            self.request_timer = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self.watch_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.reading_timer is not None:
            self.reading_timer.cancel()

    def watch_reading(self) -> None:
        """Hang up later, unless some of the answer is read until then."""
        left = self.transport.get_write_buffer_size()

        def look() -> None:
            if self.transport.get_write_buffer_size() < left:
                self.watch_reading()
            else:
                self.transport.abort()

        self.reading_timer = self.loop.call_later(READING_SECONDS, look)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self.request_timer, self.reading_timer):
            if timer is not None:
                timer.cancel()


def server(pages: Pages, *, host: str, token: str) -> uvicorn.Server:
    """What answers, once it is run with a socket, until the process is interrupted."""
    settings = uvicorn.Config(
        application(pages, host=host, token=token),
        log_level="error",
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        http=PatientProtocol,
        loop="asyncio",
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=1,
    )
    return uvicorn.Server(settings)
