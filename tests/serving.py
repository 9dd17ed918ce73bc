"""A server of `tiny` for tests: in the process, or on a port of loopback."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from numoe.cli.serve import command as command  # whose settings become known by it
from numoe.cli.serve.app import App
from numoe.cli.serve.guard import Guard
from numoe.cli.serve.models import Hub, served
from numoe.cli.serve.server import listening, server
from numoe.cli.settings import TAKEN, Options
from numoe.quant.compute import threads

MODEL = "tiny"


def application(
    *models: str,
    key: str = "",
    origins: tuple[str, ...] = (),
    room: int = 40,
    prompts: list[str] | None = None,
    **given: Any,
) -> App:
    """The application with the settings that the command has, and their own values but for these."""
    options = Options(
        {name: one.value(None if one.default is ... else one.default) for name, one in TAKEN["serve"].items()}
        | {"save": False, "threads": 1}
        | given
    )
    options.chosen = given
    lines: list[str] = []
    hub = Hub(served(models or [MODEL]), options, options["idle_unload"], lines.append)
    told = None if prompts is None else prompts.append
    app = App(hub, Guard("127.0.0.1", key, origins), room, 60.0, lines.append, told)
    app.lines = lines  # type: ignore[attr-defined]
    return app


@contextmanager
def on_loopback(app: App, port: int = 0) -> Iterator[str]:
    """The address of a server of the application, on a thread of its own."""
    before = threads.in_use()
    with listening("127.0.0.1", port) as listener:
        port = listener.getsockname()[1]
        running = server(app)
        running.capture_signals = lambda: _nothing()  # type: ignore[method-assign]
        thread = threading.Thread(target=lambda: asyncio.run(running.serve(sockets=[listener])), name="server")
        thread.start()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            running.should_exit = True
            thread.join()
            threads.use(before)


@contextmanager
def _nothing() -> Iterator[None]:
    yield
