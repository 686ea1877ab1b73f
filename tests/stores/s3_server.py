"""An S3 server on the loopback: moto's, with faults that tests ask for."""

import logging
import math
import socket
import struct
import threading
import time
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path
from typing import Any

from moto.core import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import get_canned_acl, s3_backends
from werkzeug.serving import make_server

MESSAGES = {
    "403": ("AccessDenied", "Access Denied"),
    "500": ("InternalError", "We encountered an internal error. Please try again."),
    "503": ("SlowDown", "Please reduce your request rate."),
}
LATE = 0.3  # seconds that a `slow` answer takes


class Server:
    """Serves `bucket`, which tests fill and look into; what `fail` asks for goes wrong.

    Attributes:
        url: Of the bucket.
        requests: Every request: method and path.
    """

    url, name = "s3://bucket", "bucket"

    def __init__(self) -> None:
        self.moto = DomainDispatcherApplication(create_backend_app)
        self.backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        self.requests: list[str] = []
        self.fail()
        self.listening = make_server("127.0.0.1", 0, self, threaded=True)
        self.listening.daemon_threads, self.listening.block_on_close = True, False
        self.address = f"http://127.0.0.1:{self.listening.server_port}"
        logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
        threading.Thread(target=self.listening.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.listening.shutdown()
        self.listening.server_close()

    def fail(self, *faults: str, on: str = "", times: float = math.inf, after: int = 0) -> None:
        """So many requests whose method and path hold `on` meet these faults in turn, after some
        that do not; called without one, all is well again.

        A fault is a status, `reset` (of the connection), `cut` (half of the answer), or `slow`.
        """
        self.faults, self.on, self.times, self.after = cycle(faults), on, times, after

    def put(self, name: str, data: bytes) -> str:
        """Make an object, by no request; returns its URL."""
        self.backend.put_object(self.name, name, data)
        return f"{self.url}/{name}"

    def upload(self, folder: Path, to: str) -> str:
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(f"{to}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"{self.url}/{to}"

    def publish(self) -> None:
        """Let everybody read all that the bucket holds."""
        self.backend.put_bucket_acl(self.name, get_canned_acl("public-read"))
        for name in self.objects():
            self.backend.put_object_acl(self.name, name, get_canned_acl("public-read"))

    def objects(self) -> dict[str, Any]:
        return dict(self.backend.buckets[self.name].keys.items())

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        asked = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
        self.requests.append(asked)
        fault = self._fault_of(asked)
        if fault == "reset":
            connection: socket.socket = environ["werkzeug.socket"]
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError  # which werkzeug passes over
        if fault in MESSAGES:
            code, message = MESSAGES[fault]
            start(f"{fault} {code}", [("Content-Type", "application/xml")])
            text = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
            return [] if asked.startswith("HEAD") else [text.encode()]
        if fault == "slow":
            time.sleep(LATE)
        answer: Iterable[bytes] = self.moto(environ, start)
        if fault == "cut":
            whole = b"".join(answer)
            return [whole[: len(whole) // 2]]
        return answer

    def _fault_of(self, asked: str) -> str:
        if self.on not in asked or self.times <= 0:
            return ""
        if self.after > 0:
            self.after -= 1
            return ""
        self.times -= 1
        return next(self.faults, "")
