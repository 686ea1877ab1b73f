"""A bucket of an S3 server on the loopback, as s3fs finds it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def running() -> Iterator[Any]:
    why = "needs an S3 server: pip install s3fs 'moto[s3]' flask-cors"
    for name in ("s3fs", "moto.s3", "flask_cors"):
        pytest.importorskip(name, reason=why)
    from s3_server import Server

    server = Server()
    yield server
    server.close()


@pytest.fixture
def store(running: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The server with an empty bucket, where s3fs looks for it; nothing of the user's is read."""
    for name, value in {
        "AWS_ENDPOINT_URL": running.address,
        "AWS_ACCESS_KEY_ID": "anybody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    forget()
    running.backend.create_bucket(running.name, "us-east-1")
    running.fail()
    running.requests.clear()
    yield running
    running.fail()
    running.backend.reset()
    forget()


@pytest.fixture(autouse=True)
def own_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))


def forget() -> None:
    """Let s3fs look for credentials anew."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()


@pytest.fixture
def hasty(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One try of each request, where the clients make 25 in half a minute."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    forget()


@pytest.fixture
def keys(store: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """The server asks for credentials; the function sets those that s3fs finds.

    `right=False` takes the secret of somebody else, and `found=False` none.
    """
    from moto.core import DEFAULT_ACCOUNT_ID, enable_iam_authentication
    from moto.iam.models import iam_backends

    users = iam_backends[DEFAULT_ACCOUNT_ID]["aws"]
    users.create_user("us-east-1", "me")
    key = users.create_access_key("me")
    may = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
    users.put_user_policy("me", "all", json.dumps({"Version": "2012-10-17", "Statement": [may]}))

    def use(*, right: bool = True, found: bool = True) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key.access_key_id)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key.secret_access_key if right else "other")
        if not found:
            monkeypatch.delenv("AWS_ACCESS_KEY_ID")
            monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        forget()

    with enable_iam_authentication():
        yield use
    users.reset()
