"""A model in memory: makes sessions, and says what it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numoe.engine.experts.local import LocalBank
from numoe.engine.experts.store import ExpertStore
from numoe.engine.layers.decoder import Decoder
from numoe.engine.layers.ops import Ids
from numoe.engine.layers.weights import Weights
from numoe.engine.plan import Plan, peak_rss, require_memory
from numoe.engine.session import Session, restore
from numoe.quant.compute import workers

if TYPE_CHECKING:
    from numoe.engine.text.tokenizer import Tokenizer

from numoe.engine.description import Description


class Model:
    """A model in memory: makes sessions, and says what it is."""

    def __init__(
        self,
        description: Description,
        weights: Weights,
        experts: ExpertStore | None = None,
        ram: int | None = None,
        kept_free: int = 0,
        wide_bytes: int = 0,
    ):
        """`ram` as in `load`; `kept_free`: bytes that were left for the caches of a session when `ram` is None.

        wide_bytes: how much more than planned the weights take because there was room for their faster form.
        """
        self.description = description
        self.spec = description.spec
        self.path = description.path
        self.experts = experts
        self.weights = weights
        self._ram = ram
        self._kept_free = kept_free
        self.wide_bytes = wide_bytes
        self.decoder = Decoder(self.spec, weights, LocalBank(experts) if experts else None)
        workers.know(weights.matrices.values())
        if experts and experts.complete:
            workers.know(experts.matrices())

    @property
    def tokenizer(self) -> Tokenizer:
        return self.description.tokenizer

    def session(self, ctx: int | None = None) -> Session:
        """An empty session for up to `ctx` tokens (default: 8192 or the model's own limit, if lower).

        Raises:
            InputError: ctx is above the model's limit, or its cache does not fit into memory.
        """

        planned = self.plan(ctx)
        budget, held = (self.experts.budget, self.experts.held_bytes) if self.experts else (0, 0)
        what = f"a context of {planned.context} tokens"
        if self._ram is not None:
            others = planned.resident_bytes + min(budget, planned.expert_bytes) + self.wide_bytes
            require_memory(what, others + planned.kv_bytes, self._ram)
        elif planned.kv_bytes > self._kept_free:
            require_memory(what, budget - held + planned.kv_bytes, None)
        return Session(self, planned.context)

    def restore(self, path: str | Path) -> Session:
        """The session that `Session.save` wrote.

        Raises:
            InputError: the file is not a session of this model.
        """
        return restore(self, Path(path))

    def plan(self, ctx: int | None = None) -> Plan:
        return self.description.plan(ctx)

    def trace_routes(self, trace: Callable[[int, int, Ids], None] | None) -> None:
        """Have trace(position of the first token, layer, chosen experts (T, K)) called from now on, or nothing."""
        self.decoder.shared.trace = trace

    def stats(self) -> dict[str, Any]:
        """Bytes in memory: of the weights, and the most this process has held since it started (RSS), with what its
        workers hold for themselves.

        "experts" are the counts of `ExpertStore.stats`, {} without routed experts.
        """
        weights = sum(w.nbytes for w in self.weights.matrices.values())
        weights += sum(w.nbytes for w in self.weights.arrays.values())
        experts = self.experts.stats() if self.experts else {}
        weights += experts.get("resident_bytes", 0)
        return {"weight_bytes": weights, "peak_rss_bytes": peak_rss() + workers.private_bytes(), "experts": experts}

    @property
    def identity(self) -> str:
        """See `Description.identity`."""
        return self.description.identity
