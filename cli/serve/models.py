"""The models that are served: one in memory at a time, loaded when it is asked for."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numoe.cli.reply import SHED
from numoe.cli.serve.fields import Refused
from numoe.cli.serve.post import Post
from numoe.cli.serve.question import sentence
from numoe.cli.settings import Options
from numoe.quant.errors import DoesNotFit, InputError, WrongUsage

if TYPE_CHECKING:
    from numoe.cli.serve.places import Places
    from numoe.engine import Description, Model


@dataclass
class Loaded:
    """A model in memory, and what of it answers."""

    name: str
    model: Model
    options: Options
    places: Places
    threads: ThreadPoolExecutor
    shed: bool = False
    """Whether it was told that experts were, see `ExpertStore.stats`."""


def served(models: Sequence[str]) -> dict[str, str]:
    """The names that clients call models by, and what each is here. No other name is ever looked up.

    models: folders, files and names of pulled models; none: tiny and all that are pulled.

    Raises:
        WrongUsage: one is not here, or two would have the same name.
    """
    from numoe.engine.home import TINY, locate
    from numoe.engine.home import models as pulled

    names: dict[str, str] = {}
    for model in models or [TINY, *(one.name for one in pulled() if one.complete)]:
        locate(model)
        path = Path(model).expanduser()
        name = path.absolute().name if path.exists() and model != TINY else model
        if name in names:
            raise WrongUsage(f"{names[name]} and {model} would both be called {name}; serve one of them")
        names[name] = model
    return names


def require_context(models: Sequence[str], options: Options) -> None:
    """Raises WrongUsage if one of these models cannot read as many tokens as a session is to have."""
    if options["ctx"] is not None:
        for model in models:
            try:
                _described(model, options["check"]).plan(options["ctx"])
            except WrongUsage as error:
                raise WrongUsage(f"{model}: {error}") from None


def require_given(model: str, options: Options) -> None:
    """Raises InputError if the model that is served cannot begin with the file of --prompt-cache, or that of --draft is
    not here."""
    from numoe.engine.prompt_cache import known

    if options["prompt_cache"] is not None:
        description = _described(model, options["check"])
        known(options["prompt_cache"], description, description.plan(options["ctx"], kv=options["kv"]))
    if options["draft"] not in (None, "none"):
        _described(options["draft"], options["check"])


class Hub:
    """Loads and unloads. All of it belongs to one event loop, but what takes long goes on in threads."""

    def __init__(
        self, names: dict[str, str], options: Options, seconds: float | None, told: Callable[[str], None]
    ) -> None:
        """seconds: after so many without a question a model is unloaded; None: never. told: of what is loaded."""
        self.names = names
        self.post = Post()
        self._options, self._seconds, self._told = options, seconds, told
        self._turn = asyncio.Lock()
        self._free = asyncio.Event()
        self._free.set()
        self._users = 0
        self._used = time.monotonic()
        self._described: dict[str, Description] = {}
        self.loaded: Loaded | None = None

    async def describe(self, name: str) -> Description:
        """What a model is, without its weights. Raises Refused where it is none of those that are served."""
        self._require(name)
        if name not in self._described:
            self._described[name] = await asyncio.to_thread(_described, self.names[name], self._options["check"])
        return self._described[name]

    def _require(self, name: str) -> None:
        if name not in self.names:
            known = ", ".join(self.names)
            raise Refused(
                404, f"the model {name!r:.80} is not served here; there are {known}", "model", "model_not_found"
            )

    @asynccontextmanager
    async def lease(self, name: str) -> AsyncIterator[Loaded]:
        """The model of a name, which stays in memory meanwhile. Who asks for another one waits, and all who come later.

        Raises:
            Refused: it is not served, or cannot be loaded.
        """
        self._require(name)
        async with self._turn:
            if self.loaded is None or self.loaded.name != name:
                await self._free.wait()
                await _to_its_end(self._switch(name))
            loaded = self.loaded
            assert loaded is not None
            self._users += 1
            self._free.clear()
        try:
            yield loaded
        finally:
            self._users -= 1
            self._used = time.monotonic()
            if not self._users:
                self._free.set()
                self._tell_shed(loaded)

    def _tell_shed(self, loaded: Loaded) -> None:
        experts = loaded.model.experts
        if experts and not loaded.shed and experts.stats()["shed"]:
            loaded.shed = True
            self._told(SHED)

    async def _switch(self, name: str) -> None:
        await self._unload()
        self.loaded = await self._load(name)

    async def _load(self, name: str) -> Loaded:
        self._told(f"loading {name}")
        try:
            description = await self.describe(name)
            return await asyncio.to_thread(_loaded, name, description, self._options, self._told, self.post)
        except DoesNotFit as error:
            raise Refused(503, sentence(error), "model") from None
        except WrongUsage as error:  # which asking again does not change
            raise Refused(400, sentence(error), "model") from None
        except InputError as error:
            raise Refused(500, sentence(error), "model") from None

    async def _unload(self) -> None:
        loaded, self.loaded = self.loaded, None
        if loaded is not None:
            self._described.pop(loaded.name, None)
            await asyncio.to_thread(_unloaded, loaded)
            del loaded
            gc.collect()

    def options_of(self, description: Description) -> Options:
        """How a model answers where a request says nothing else."""
        return _options_of(description, self._options)

    async def watch(self) -> None:
        """Unload what nobody asks for, for ever."""
        while self._seconds is not None:
            await asyncio.sleep(min(self._seconds, 60.0) / 4)
            await self.rest()

    async def rest(self) -> None:
        """Unload the model if nobody has asked for it for so long."""
        async with self._turn:
            idle = not self._users and time.monotonic() - self._used >= (self._seconds or 0)
            if idle and self.loaded is not None:
                self._told(f"unloading {self.loaded.name}, which nobody asks for")
                await self._unload()

    async def close(self) -> None:
        """Unload the model, whoever uses it: they have left."""
        await self._unload()


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Wait for what cannot be left half done, also when whoever waits is to stop."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        with suppress(Refused):
            await task
        raise


def _described(model: str, check: bool) -> Description:
    from numoe.engine import describe

    return describe(model, check=check)


def _options_of(description: Description, options: Options) -> Options:
    own = Options(options)
    own.chosen = options.chosen
    own.recommend(description.sampling)
    return own


def _loaded(name: str, description: Description, options: Options, tell: Callable[[str], None], post: Post) -> Loaded:
    from numoe.cli.batch import PARALLEL
    from numoe.cli.request import load_drafted
    from numoe.cli.serve.places import Places

    context, most = options["ctx"], options["parallel"] or PARALLEL
    room = description.plan(context).context
    model = load_drafted(description, room, options, tell)
    places = Places(model, context, most, options["save"], options["prompt_cache"], post.send)
    own = _options_of(description, options)
    return Loaded(name, model, own, places, ThreadPoolExecutor(most, f"numoe {name}"))


def _unloaded(loaded: Loaded) -> None:
    from numoe.engine.experts import heat

    loaded.threads.shutdown()
    loaded.places.close()
    heat.keep(loaded.model)
