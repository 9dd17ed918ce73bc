"""The application: requests become answers that are made on threads, and what they tell becomes replies."""

from __future__ import annotations

import asyncio
import json
import os
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse, PlainTextResponse, Response

from numoe.cli.serve import anthropic_messages, openai_chat, openai_common, openai_completions, openai_responses
from numoe.cli.serve.fields import Refused, table
from numoe.cli.serve.guard import Guard, once, read_body
from numoe.cli.serve.metrics import Metrics
from numoe.cli.serve.models import Hub, Loaded
from numoe.cli.serve.post import Inbox
from numoe.cli.serve.question import Api, Asked, Begun, Made, Piece, Writer, check_document, event, refused_by
from numoe.cli.serve.work import Work
from numoe.quant.errors import InputError

APIS: Sequence[Api] = (openai_chat.API, openai_completions.API, openai_responses.API, anthropic_messages.API)
_BY_PATH = {api.path: api for api in (*APIS, anthropic_messages.COUNT)}
_LIST = "/v1/models"
_PING = 15.0  # seconds without a word, after which a comment says that the server is there
_SEND = 60.0  # seconds in which a client has to take what it is sent
_NAMED = {anthropic_messages.API.path, openai_responses.API.path}  # whose events have names


def tables() -> str:
    """What becomes of every field, for cli/serve/README.md."""
    return "\n\n".join(table(f"`{api.path}`", api.fields) for api in APIS)


@dataclass
class App:
    """An ASGI application. room: answers that may be made or waited for at once. seconds: the longest of one.

    log: told of every request, in a line without what it says; prompts: told of what it says.
    """

    hub: Hub
    guard: Guard
    room: int
    seconds: float
    log: Callable[[str], None]
    prompts: Callable[[str], None] | None = None
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))
    _works: set[Work] = field(default_factory=set)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)

    async def _live(self, receive: Any, send: Any) -> None:
        await receive()
        watching = asyncio.create_task(self.hub.watch())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        watching.cancel()
        for work in self._works:
            work.leave()
        await self.hub.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _http(self, scope: Any, receive: Any, send: Any) -> None:
        begun, path, method = time.monotonic(), scope["path"], scope["method"]
        headers: dict[str, str] = {}
        known = path if path in _BY_PATH or path in ("/health", "/metrics", _LIST) else "other"
        status = 499  # of who leaves before there is one

        async def tell(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *self.guard.cors(headers.get("origin"))]
            await send(message)

        try:
            headers = once(scope["headers"])
            await self._reply(path, method, headers, scope, receive, tell)
        except Refused as refused:
            await self._refuse(path, refused, scope, receive, tell)
        except Exception as error:
            if os.environ.get("NUMOE_DEBUG"):
                traceback.print_exc()
            self.log(f"this is a bug in numoe ({type(error).__name__}); NUMOE_DEBUG=1 shows where, please report")
            if status == 499:
                await self._refuse(path, Refused(500, "this is a bug in numoe"), scope, receive, tell)
        finally:
            self.metrics.requests[known, status] += 1
            self.log(f"{method if method in ('GET', 'POST', 'OPTIONS') else 'other'} {known} {status} "
                     f"{time.monotonic() - begun:.2f} s")  # fmt: skip

    async def _refuse(self, path: str, refused: Refused, scope: Any, receive: Any, send: Any) -> None:
        error = anthropic_messages.error_document if path.startswith("/v1/messages") else openai_common.error_document
        more = {"retry-after": "1"} if refused.status == 429 else {}
        # What is left of a request that was not read to its end is no request of its own.
        more |= {"connection": "close"} if refused.status in (401, 403, 408, 413, 415) else {}
        await JSONResponse(error(refused), refused.status, more)(scope, receive, send)

    async def _reply(
        self, path: str, method: str, headers: dict[str, str], scope: Any, receive: Any, send: Any
    ) -> None:
        if method == "OPTIONS" and "origin" in headers and self.guard.welcomes(headers["origin"]):
            await Response(status_code=204)(scope, receive, send)
            return
        self.guard.check(headers, path)
        if path in _BY_PATH:
            if method != "POST":
                raise Refused(405, f"{path} takes POST")
            await self._ask(_BY_PATH[path], await read_body(receive, headers), scope, receive, send)
            return
        if method not in ("GET", "HEAD"):
            raise Refused(
                404 if path not in ("/health", "/metrics", _LIST) else 405, "there is nothing of that kind here"
            )
        await self._looked(path)(scope, receive, send)

    def _looked(self, path: str) -> Response:
        if path == "/health":
            return JSONResponse({"status": "ok"})
        if path == "/metrics":
            loaded = self.hub.loaded.name if self.hub.loaded else None
            return PlainTextResponse(self.metrics.text(loaded), media_type="text/plain; version=0.0.4; charset=utf-8")
        documents = [self._model(name) for name in self.hub.names]
        if path == _LIST:
            ends = {"first_id": documents[0]["id"], "last_id": documents[-1]["id"], "has_more": False}
            return JSONResponse({"object": "list", "data": documents, **ends})
        if found := [one for one in documents if path == f"{_LIST}/{one['id']}"]:
            return JSONResponse(found[0])
        raise Refused(404, "there is nothing of that kind here")

    def _model(self, name: str) -> dict[str, Any]:
        """As OpenAI's and Anthropic's lists both have it."""
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.created))
        openai = {"id": name, "object": "model", "created": self.created, "owned_by": "numoe"}
        return openai | {"type": "model", "display_name": name, "created_at": when}

    async def _ask(self, api: Api, body: Any, scope: Any, receive: Any, send: Any) -> None:
        if self.prompts:
            self.prompts(json.dumps(body, ensure_ascii=False))
        check_document(body)
        try:
            asked = api.read(body)
        except InputError as error:
            raise refused_by(error) from None
        if api is anthropic_messages.COUNT:
            count = await self._counted(asked)
            await JSONResponse({"input_tokens": count})(scope, receive, send)
            return
        if self.metrics.answering + asked.count > self.room:
            raise Refused(429, "too many answers are made and waited for; ask again later", code="rate_limit_exceeded")
        self.metrics.answering += asked.count
        try:
            async with _connected(receive) as stack:
                loaded = await stack.enter_async_context(self.hub.lease(asked.model))
                await self._answer(api, asked, loaded, stack, scope, receive, send)
        finally:
            self.metrics.answering -= asked.count

    async def _counted(self, asked: Asked) -> int:
        description = await self.hub.describe(asked.model)

        def count() -> int:
            options = self.hub.options_of(description)
            return len(asked.requests(options)[0].encode(description)[0])

        try:
            return await asyncio.to_thread(count)
        except InputError as error:
            raise refused_by(error) from None

    async def _answer(
        self, api: Api, asked: Asked, loaded: Loaded, stack: AsyncExitStack, scope: Any, receive: Any, send: Any
    ) -> None:
        told = Inbox()
        await self._begin(asked, loaded, told, stack)
        writer = asked.writer(loaded.model.tokenizer)
        begun = await _all_begun(told, asked.count)
        if not asked.stream:
            made = [one async for one in self._made(told, asked.count)]
            await JSONResponse(writer.whole(made))(scope, receive, send)
            return
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        now = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(None) as patience:
                async for data in self._events(api, writer, begun, told, asked.count):
                    patience.reschedule(now() + _SEND)
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                    patience.reschedule(None)
        except TimeoutError:  # who does not read what was asked for has left
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _begin(self, asked: Asked, loaded: Loaded, told: Inbox, stack: AsyncExitStack) -> None:
        """Begin the answers, which end when the stack is left, and are over when that is."""
        try:
            requests = await asyncio.to_thread(asked.requests, loaded.options)
        except InputError as error:
            raise refused_by(error) from None
        post = self.hub.post
        for number, request in enumerate(requests):
            work = Work(request, post.teller(told.put, number), post.send, self.seconds)
            self._works.add(work)
            future = loaded.threads.submit(work.run, loaded.model, loaded.places)
            stack.push_async_callback(self._over, work, future)

    async def _over(self, work: Work, future: Future[None]) -> None:
        work.leave()
        if not future.cancel():
            await asyncio.wrap_future(future)
        self._works.discard(work)

    def _count(self, made: Made) -> Made:
        self.metrics.prompt_tokens += made.prompt_tokens
        self.metrics.reused_tokens += made.reused_tokens
        self.metrics.completion_tokens += len(made.tokens)
        return made

    async def _made(self, told: Inbox, count: int) -> AsyncIterator[Made]:
        """The answers in order, once all are made."""
        made: dict[int, Made] = {}
        while len(made) < count:
            for number, one in await told.take():
                if isinstance(one, Refused):
                    raise one
                if isinstance(one, Made):
                    made[number] = self._count(one)
        for number in range(count):
            yield made[number]

    async def _events(
        self, api: Api, writer: Writer, begun: Sequence[Begun], told: Inbox, count: int
    ) -> AsyncIterator[bytes]:
        """A stream of events, what is told at a time together."""
        named = api.path in _NAMED
        made: dict[int, Made] = {}
        written = writer.begin(begun)
        while True:
            if written:
                yield b"".join(event(name, said, named) for name, said in written)
            if len(made) == count:
                break
            written = []
            for number, one in (news := await told.take(_PING)):
                if isinstance(one, Refused):
                    written.append(("error", {"type": "error", **api.error(one)}))
                    yield b"".join(event(name, said, named) for name, said in written)
                    return
                if isinstance(one, Piece):
                    written += writer.piece(number, one)
                elif isinstance(one, Made):
                    made[number] = self._count(one)
                    written += writer.end(number, one)
            if not news:
                yield b": still at it\n\n"
        closing = writer.close([made[number] for number in range(count)])
        if ends := b"".join(event(name, said, named) for name, said in closing) + api.done():
            yield ends


async def _all_begun(told: Inbox, count: int) -> list[Begun]:
    """That every answer has begun; what is told meanwhile stays to be told. Raises Refused where one does not begin."""
    begun: dict[int, Begun] = {}
    later = []
    while len(begun) < count:
        for number, one in await told.take():
            if isinstance(one, Refused):
                raise one
            if isinstance(one, Begun):
                begun[number] = one
            else:
                later.append((number, one))
    told.again(later)
    return [begun[number] for number in range(count)]


@asynccontextmanager
async def _connected(receive: Any) -> AsyncIterator[AsyncExitStack]:
    """A stack that is left, with all that goes on within, as soon as the client has gone."""
    task = asyncio.current_task()
    assert task is not None
    gone = over = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        if not over:
            gone = True
            task.cancel()

    watching = asyncio.create_task(watch())
    try:
        async with AsyncExitStack() as stack:
            yield stack
            over = True
    except asyncio.CancelledError:
        if not gone:
            raise
        task.uncancel()
    finally:
        watching.cancel()
