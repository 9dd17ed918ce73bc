"""The application on a socket: uvicorn, which gives clients no longer for their headers than they need."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from numoe.cli.serve.app import App
from numoe.cli.serve.guard import HEAD_SECONDS
from numoe.quant.errors import InputError

MOST_CONNECTIONS = 1024
_GRACE = 5  # seconds that answers have to end in when the server does


class _Protocol(H11Protocol):
    """Closes connections on which no request has come as a whole after a while."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._patience = self.loop.call_later(HEAD_SECONDS, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._calm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._patience is None and (self.cycle is None or self.cycle.response_complete):
            self._patience = self.loop.call_later(HEAD_SECONDS, self._late)
        super().data_received(data)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:  # the headers of a request have come
            self._calm()

    def _calm(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _late(self) -> None:
        self._patience = None
        self.transport.close()


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        InputError: it cannot.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(MOST_CONNECTIONS)
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        raise InputError(
            f"the address {host} port {port} cannot be listened on ({error}); give another `host` or `port`"
        ) from None
    return listener


def server(app: App) -> uvicorn.Server:
    """A server of the application, which is quiet but for what the application says."""
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    application: Any = app
    config = uvicorn.Config(
        application,
        http=_Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=_GRACE,
    )
    return uvicorn.Server(config)
