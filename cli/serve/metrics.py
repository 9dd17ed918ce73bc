"""What is counted, in Prometheus' text format."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Metrics:
    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    """By path and status."""
    prompt_tokens: int = 0
    reused_tokens: int = 0
    completion_tokens: int = 0
    answering: int = 0
    """Answers that are made or waited for."""

    def text(self, loaded: str | None) -> str:
        """All of it. loaded: the model in memory."""
        lines = ["# TYPE numoe_requests_total counter"]
        for (path, status), count in sorted(self.requests.items()):
            lines.append(f'numoe_requests_total{{path="{path}",status="{status}"}} {count}')
        for name in ("prompt_tokens", "reused_tokens", "completion_tokens"):
            lines += [f"# TYPE numoe_{name}_total counter", f"numoe_{name}_total {getattr(self, name)}"]
        lines += ["# TYPE numoe_answers gauge", f"numoe_answers {self.answering}"]
        lines += ["# TYPE numoe_model_loaded gauge", f"numoe_model_loaded {int(loaded is not None)}", ""]
        return "\n".join(lines)
