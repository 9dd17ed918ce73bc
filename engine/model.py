"""A model in memory: makes sessions, and says what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numoe.engine.budget import Reservation, peak_rss
from numoe.engine.description import Description
from numoe.engine.experts.local import LocalBank
from numoe.engine.experts.remote import RemoteBank
from numoe.engine.experts.store import ExpertStore
from numoe.engine.layers.decoder import Decoder
from numoe.engine.layers.ops import Ids
from numoe.engine.layers.weights import Weights
from numoe.engine.plan import Plan, longest_context
from numoe.engine.session import Passing, Session, restore
from numoe.engine.speculation import Drafter
from numoe.quant.compute import workers
from numoe.quant.errors import DoesNotFit

if TYPE_CHECKING:
    from numoe.engine.text.tokenizer import Tokenizer


_PLANS = 16
"""Of contexts, that are remembered: sessions of one are many, and each looks at its own."""


@dataclass(frozen=True)
class Memory:
    """What a model has of a budget, until it is collected."""

    planned: Plan
    wide_bytes: int
    """How much more than planned the weights take because there was room for their faster form."""
    weights: Reservation
    """With the routed experts, where all of them are in memory for good."""
    scratch: Reservation
    sessions: Reservation
    """What is set aside for the caches of sessions, which may take more where there is more."""
    experts: Reservation | None = None
    """What those on disk are read to. It yields to sessions, and grows again when they end."""


class Model:
    """A model in memory: makes sessions, and says what it is."""

    def __init__(
        self,
        description: Description,
        weights: Weights,
        experts: ExpertStore | None,
        memory: Memory,
        shared: RemoteBank | None = None,
    ):
        """shared: the bank where nodes of a cluster have experts too."""
        self.description = description
        self.spec = description.spec
        self.path = description.path
        self.experts = experts
        self.shared = shared
        self.weights = weights
        self.memory = memory
        self.drafter: Drafter | None = None
        """Guesses ahead in sessions whose `generate` is given no other."""
        self._planned = lru_cache(_PLANS)(description.plan)
        bank = shared or (LocalBank(experts) if experts else None)
        self.decoder = Decoder(self.spec, weights, bank, memory.planned.kv)
        workers.know(weights.matrices.values())
        if experts and experts.complete:
            workers.know(experts.matrices())

    @property
    def tokenizer(self) -> Tokenizer:
        return self.description.tokenizer

    def session(self, ctx: int | None = None, *, passes: Passing | None = None, kv: str | None = None) -> Session:
        """An empty session for up to `ctx` tokens (default: 8192 or the model's own limit, if lower).

        passes: a `Passes` that takes its tokens through the layers together with those of other sessions.
        kv: how rows of earlier tokens are held; None: as the model was loaded to.

        Its cache is part of the memory that the model was loaded with until the session is closed or collected. What
        was set aside for sessions when loading is taken first; more comes from what is left, and from routed experts
        that are on disk too, which then hold fewer in memory: this waits until a pass of another thread lets go of
        them. Experts that are all in memory stay there, for workers have them too.

        Raises:
            InputError: ctx is above the model's limit, or its cache does not fit into memory.
        """
        planned = self.plan(ctx, kv)
        try:
            memory = self.reserve(f"a context of {planned.context} tokens", planned.kv_bytes)
        except DoesNotFit as error:
            sessions = self.memory.sessions
            room = sessions.nbytes + sessions.budget.room - sessions.parts_bytes
            fits = longest_context(self.spec, room, planned.kv)
            raise DoesNotFit(f"{error}; `ctx` {fits} fits" if fits else str(error)) from None
        return Session(self, planned.context, memory, passes, planned.kv)

    def reserve(self, what: str, nbytes: int) -> Reservation:
        """Memory for something that is computed with this model, of that for its sessions.

        Raises:
            DoesNotFit: `what`, the subject of the sentence, takes more than there is.
        """
        sessions = self.memory.sessions
        enough = self.memory.planned.enough(sessions.parts_bytes + nbytes, sessions.budget.total)
        return sessions.reserve(what, nbytes, enough=enough)

    def restore(self, path: str | Path) -> Session:
        """The session that `Session.save` wrote.

        Raises:
            InputError: the file is not a session of this model.
        """
        return restore(self, Path(path))

    def plan(self, ctx: int | None = None, kv: str | None = None) -> Plan:
        """See `Description.plan`; kv: None: how the model was loaded to hold rows of earlier tokens."""
        return self._planned(ctx, kv=kv or self.memory.planned.kv.name)

    def trace_routes(self, trace: Callable[[int, int, Ids], None] | None) -> None:
        """Have trace(position of the first token, layer, chosen experts (T, K)) called from now on, or nothing."""
        self.decoder.shared.trace = trace

    def stats(self) -> dict[str, Any]:
        """Bytes in memory: of the weights, and the most this process has held since it started (RSS), with what its
        workers hold for themselves.

        "experts" are the counts of `ExpertStore.stats`, {} without routed experts; with those of `RemoteBank.stats`
        where nodes have some.
        """
        weights = sum(w.nbytes for w in self.weights.matrices.values())
        weights += sum(w.nbytes for w in self.weights.arrays.values())
        experts = self.experts.stats() if self.experts else {}
        weights += experts.get("resident_bytes", 0)
        if self.shared:
            experts |= self.shared.stats()
        return {"weight_bytes": weights, "peak_rss_bytes": peak_rss() + workers.private_bytes(), "experts": experts}

    @property
    def wide_bytes(self) -> int:
        """See `Memory`."""
        return self.memory.wide_bytes

    @property
    def identity(self) -> str:
        """See `Description.identity`."""
        return self.description.identity
