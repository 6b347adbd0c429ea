"""A server of S3's protocol on this machine, which can be told to fail."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any

import boto3
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUCKET = "bucket"
Environ = dict[str, Any]


class S3Server:
    """moto's server in a thread. ``fail`` sees each request (WSGI) and may answer with a status, such as ``503 Slow Down``."""

    def __init__(self) -> None:
        self.fail: Callable[[Environ], str | None] = lambda _: None
        self.refused = 0
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def _answer(self, environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        status = self.fail(environ)
        if status is None:
            return self._app(environ, start_response)
        self.refused += 1
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        code = status.split(" ", 1)[1].replace(" ", "")
        body = f"<Error><Code>{code}</Code><Message>as the test wants it</Message></Error>".encode()
        start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    def client(self) -> Any:
        """A boto3 client; it sees none of the failures."""
        return boto3.client("s3", endpoint_url=self.url, region_name="us-east-1")

    def stop(self) -> None:
        """Ends the thread."""
        self._server.shutdown()
        self._thread.join()


def point_to(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Environment of a process that uses the server: each request is tried once, so that the retries seen are the project's."""
    values = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    values |= {"S3_ENDPOINT_URL": server.url, "AWS_ENDPOINT_URL": server.url, "AWS_MAX_ATTEMPTS": "1"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)


def first(count: int, status: str = "503 Slow Down", method: str = "") -> Callable[[Environ], str | None]:
    """Fails the first ``count`` requests (of a method)."""
    left = [count]

    def fail(environ: Environ) -> str | None:
        if left[0] > 0 and environ["REQUEST_METHOD"].startswith(method):
            left[0] -= 1
            return status
        return None

    return fail
