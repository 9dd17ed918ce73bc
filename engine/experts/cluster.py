"""Nodes that are actors of Ray: the one file that imports it."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from numoe.engine.experts.remote import Lost, RemoteBank
from numoe.engine.experts.share import Applied, Formulas, Settings, Share
from numoe.engine.experts.unit import Key
from numoe.engine.layers.ops import Floats, Ids
from numoe.quant.errors import InputError

SILENT = 5.0
"""Seconds without a sign of life after which a node that was asked is looked at, and so many again after which it is
lost: one whose cores are all busy answers within tenths of a second, and a call that takes long is none that stalls."""
STARTING = 120.0
"""Seconds until the first sign of life: in them Ray starts a process, which imports numoe, on a busy machine too."""
OPENING = 600.0
"""Seconds in which a node reads a model's headers and samples of its weights, from a shared folder if need be."""
REACHING = 10.0
"""Seconds in which a head accepts a connection: as long as names and lost packets take at most, on any network."""
_LOOKING = 5.0  # seconds between two looks at who has joined
_OBJECTS = 100 << 20  # bytes of Ray's own store on a cluster of this machine: a chunk's rows, and no weights


class RayNode:
    """A node of `RemoteBank`: an actor with a `Share`, on one of Ray's. It ends when nobody has it."""

    def __init__(self, ray: Any, node: dict[str, Any], settings: Settings, sharers: int):
        self._ray = ray
        self.id: str = node["NodeID"]
        self.name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {self.id[:6]})"
        affinity = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(self.id, soft=False)
        self._actor = actor(ray, Share, scheduling_strategy=affinity)
        self._opened = self._actor.open.remote(settings, sharers)
        self.room = 0
        self.pulls = ""

    def open(self) -> None:
        """Wait until it has the model, or knows where it gets it.

        Raises:
            InputError: it has another, or none, or no room.
            Lost: it is gone.
        """
        try:
            self.room, self.pulls = answered(self._ray, self._opened, self._sign, OPENING, STARTING)
        except self._ray.exceptions.RayTaskError as error:
            raise InputError(f"node {self.name}: {error.cause}") from None

    def define(self, formulas: Formulas) -> None:
        self._wait(self._actor.define.remote(formulas))

    def hold(self, keys: Sequence[Key]) -> None:
        self._actor.hold.remote(list(keys))

    def ask(self, layer: int, rows: Floats, places: Ids, experts: Ids) -> Callable[[], Applied]:
        return partial(self._wait, self._actor.apply.remote(layer, rows, places, experts))

    def confirm(self, keys: Sequence[Key]) -> None:
        self._actor.confirm.remote(list(keys))

    def prefetch(self, layer: int, experts: Ids) -> None:
        self._actor.prefetch.remote(layer, experts)

    def pid(self) -> int:
        """Of its process, on its machine."""
        return int(self._wait(self._actor.__ray_call__.remote(_pid)))

    def peak_bytes(self) -> int:
        """The most memory that it has held."""
        return int(self._wait(self._sign()))

    def _sign(self) -> Any:
        return self._actor.alive.remote()

    def _wait(self, asked: Any) -> Any:
        """Raises Lost."""
        try:
            return answered(self._ray, asked, self._sign)
        except self._ray.exceptions.RayTaskError as error:
            raise Lost(str(error.cause)) from None


def actor(ray: Any, plain: Any, **options: Any) -> Any:
    """An actor of a class with a method `alive`, for whose signs of life it has a thread that does nothing else.

    options: of Ray.
    """
    # An option of each call would do as well, but not through ray://.
    sign = ray.method(concurrency_group="life")(lambda self: plain.alive(self))
    made = type(plain.__name__, (plain,), {"alive": sign})
    return ray.remote(num_cpus=0, concurrency_groups={"life": 1}, **options)(made).remote()


def answered(
    ray: Any, asked: Any, sign: Callable[[], Any], seconds: float = math.inf, starting: float | None = None
) -> Any:
    """What an actor was asked for, however long that takes, up to some seconds, while it shows signs of life.

    sign: asks it for one. starting: seconds until the first, where it may not be there yet; None: as for all.

    Raises:
        Lost: it is gone, stalls or takes too long.
        RayTaskError: what it raises.
    """
    until, patience = time.monotonic() + seconds, starting or SILENT
    while True:
        try:
            return ray.get(asked, timeout=SILENT)
        except ray.exceptions.GetTimeoutError:
            if time.monotonic() > until:
                raise Lost(f"it takes more than {seconds:.0f} s") from None
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError as error:
            raise Lost(sentence(error)) from None
        try:
            ray.get(sign(), timeout=patience)
            patience = SILENT
        except ray.exceptions.GetTimeoutError:
            raise Lost(f"no sign of life for {SILENT + patience:.0f} s") from None
        except ray.exceptions.RayError as error:
            raise Lost(sentence(error)) from None


class Cluster:
    """Connected nodes for one model.

    Raises:
        InputError: Ray is not installed, cannot be reached, or a node has not this model.
    """

    def __init__(self, address: str, settings: Settings, tell: Callable[[str], None] | None):
        self._ray = connect(address)
        self._settings = settings
        self.tell = tell or (lambda sentence: None)
        self._own: str | None = None
        if not address.startswith("ray://"):
            self._own = self._ray.get_runtime_context().get_node_id()
        self._known: set[str] = set()
        self._stop = threading.Event()
        self.nodes = self.joined(first=True)

    def joined(self, first: bool = False) -> list[RayNode]:
        """The nodes that were not there before, with the model. Where there is none but this process's own, that one:
        else it would take memory twice."""
        there = [one for one in self._ray.nodes() if one["Alive"] and one["Resources"].get("CPU")]
        others = [one for one in there if one["NodeID"] != self._own]
        fresh = [one for one in others or (there if first else []) if one["NodeID"] not in self._known]
        self._known |= {one["NodeID"] for one in fresh}
        of_host = [one["NodeManagerAddress"] for one in there]
        made = [RayNode(self._ray, one, self._settings, 1 + of_host.count(one["NodeManagerAddress"])) for one in fresh]
        opened = []
        for node in made:
            try:
                node.open()
                opened.append(node)
                if node.pulls:
                    self.tell(f"node {node.name} has no copy of the model, and pulls its experts from {node.pulls}")
            except (InputError, Lost) as error:
                if first and isinstance(error, InputError):
                    raise
                self.tell(f"node {node.name} is left out: {error}")
        return opened

    def watch(self, bank: RemoteBank) -> None:
        """Have nodes that come from now on join a bank, as long as somebody has it."""
        self.nodes = []  # who are the bank's now, which lets go of those that are lost
        weakref.finalize(bank, self._stop.set).atexit = False
        threading.Thread(target=self._watch, args=(weakref.ref(bank),), name="numoe nodes", daemon=True).start()

    def _watch(self, bank: weakref.ref[RemoteBank]) -> None:
        while not self._stop.wait(_LOOKING):
            try:
                joined = self.joined()
            except Exception as error:  # Ray's head is gone: who is there is seen by calls
                if not self._ray.is_initialized():  # this program ends
                    return
                self.tell(f"nodes that join are not looked for any more: {sentence(error)}")
                return
            for node in joined:
                if (there := bank()) is None:
                    return
                try:
                    there.join(node)
                except Lost as lost:
                    self.tell(f"node {node.name} is left out: {lost}")
                del there


def _pid(share: Share) -> int:
    return os.getpid()


def connect(address: str) -> Any:
    """The module of Ray, connected with a cluster: "local" starts one on this machine, unless there is a connection.

    Raises:
        InputError: Ray is not installed, or there is no cluster at this address.
    """
    try:
        import ray
        import ray._private.utils
        import ray._private.worker
        import ray.util.scheduling_strategies
    except ImportError:
        raise InputError("`ray` needs Ray: pip install 'numoe[ray]'") from None
    if ray.is_initialized():
        return ray
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "numoe"}
    if address == "local":
        quiet |= {"include_dashboard": False, "object_store_memory": _OBJECTS}
    # What Ray has to say of nodes it prints to stdout, in the middle of an answer.
    ray._private.worker.print_to_stdstream = lambda *said, **how: None
    ray._private.utils.set_sigterm_handler = lambda handler: None  # Ray's own ends programs with another code
    on_end = signal.getsignal(signal.SIGTERM)
    try:
        _reach(address)
        ray.init(address, **quiet)
    except (OSError, RuntimeError, ValueError, AssertionError, ray.exceptions.RayError) as error:
        raise InputError(
            f"`ray` {address}: no cluster of Ray answers there ({sentence(error)}); the README tells how to start one "
            "and how its token is given"
        ) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_end)  # and its C++ has put one in place that prints a stack
    return ray


def _reach(address: str) -> None:
    """Raises OSError where nobody listens, for which Ray waits minutes."""
    host, _, port = address.removeprefix("ray://").partition("/")[0].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), REACHING).close()


def sentence(error: Exception) -> str:
    """The first one of what Ray says, which goes on for many lines."""
    if type(error).__name__ == "ActorUnavailableError":  # which says what a library of Ray's does
        return "it cannot be reached"
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__).partition(". ")[0].rstrip(".")
