"""The address that the explorer listens on. Standard library only, so that a port that is taken is
known before anything slow is imported.

What is served there is in `server.py`.
"""

import errno
import socket

USUAL_PORT = 8000
OF_PORT = (errno.EADDRINUSE, errno.EACCES)  # what is wrong with a port rather than with a host


class PortTaken(ValueError):
    """Another process listens on the port."""


def listen(host: str, port: int | None) -> socket.socket:
    """A socket that listens: on the port, or without one on the first from 8000 on that is free.

    Raises:
        PortTaken: The port is taken.
        ValueError: The port may not be used, or the host is none of this machine.
    """
    if port is not None:
        return listen_on(host, port)
    port = USUAL_PORT
    while True:
        try:
            return listen_on(host, port)
        except PortTaken:
            port += 1  # one beyond the last is refused otherwise


def listen_on(host: str, port: int) -> socket.socket:
    """A socket that listens on this port; raises as `listen` does."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = None
    try:
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(256)
    except (OSError, OverflowError, UnicodeError) as error:
        if listening is not None:
            listening.close()
        reason = getattr(error, "strerror", None) or str(error)
        code = getattr(error, "errno", None)
        setting = "--port" if isinstance(error, OverflowError) or code in OF_PORT else "--host"
        kind = PortTaken if code == errno.EADDRINUSE else ValueError
        raise kind(
            f"{setting}: cannot listen on {host} port {port} ({reason}); choose another"
        ) from None
    return listening


def url_of(listening: socket.socket, host: str, token: str) -> str:
    """The address to open."""
    shown = socket.gethostname() if host in ("0.0.0.0", "::") else host
    shown = f"[{shown}]" if ":" in shown else shown
    return f"http://{shown}:{listening.getsockname()[1]}/?token={token}"
