"""An answer as it is shown: in pieces, as figures, as a JSON document; and Ctrl-C meanwhile."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from numoe.cli.output import Output, decimal

if TYPE_CHECKING:
    from numoe.engine import Generation
    from numoe.engine.chat.answer import Answer, Turn
    from numoe.engine.text.tokenizer import Tokenizer


NO_SWITCH = "The model's chat template has no switch for reasoning, so it reasons as it was trained to."
SHED = "other programs need the memory, so fewer experts stay in it"


def show(answer: Answer, output: Output | None) -> Turn:
    """Show an answer as it is made, and return it, trimmed. However this ends, the answer is ended.

    output: None shows nothing.
    """
    try:
        if output:
            output.reading(0, len(answer.generation.prompt))
        for kind, text in answer:
            if output and kind in ("text", "thinking"):
                (output.answer if kind == "text" else output.thinking)(text)
        if output:
            for call in calls(answer.turn):
                output.call(call)
            output.end_answer()
    finally:
        answer.close()
    return answer.turn.trimmed()


class Neighbours:
    """Tells once that other programs take the cores, and what helps: threads that wait for each other lose most."""

    def __init__(self) -> None:
        self._told = False

    def begin(self) -> None:
        """An answer begins."""
        from numoe.engine.measure.busy import Sample

        self._before = Sample.now()

    def end(self, output: Output) -> None:
        """It has ended."""
        from numoe.engine.measure.busy import Sample, taken_by_others
        from numoe.quant.compute import threads

        if self._told:
            return
        others = taken_by_others(self._before, Sample.now(), threads.in_use())
        if others:
            self._told = True
            fewer = max(1, threads.in_use() - round(others))
            output.note(
                f"Other programs kept {decimal(others)} cores busy meanwhile, and threads that wait for each other are "
                f"slower than fewer of them: end those programs, or take --threads {fewer}."
            )


def calls(turn: Turn) -> list[dict[str, Any]]:
    """The calls of tools in an answer, as JSON."""
    return [{"name": call.name, "arguments": call.values} for call in turn.calls]


def statistics(generation: Generation, experts: dict[str, Any]) -> str:
    """One line: how many tokens, how fast, how long the first one took, and what came from disk.

    experts: as in `Model.stats`.
    """
    made = len(generation.tokens)
    parts = [f"{made} token" + ("s" if made != 1 else "")]
    if made > 1 and generation.decode_seconds > 0:
        parts.append(f"{decimal((made - 1) / generation.decode_seconds)} tok/s")
    if made:
        parts.append(f"first after {generation.first_token_seconds:.2g} s")
    if experts.get("misses"):
        waited = f"{experts['wait_s']:.3g} s of waiting for the others"
        parts.append(f"{experts['hit_rate']:.0%} of experts found in memory and {waited}")
    if experts.get("shed"):
        parts.append(SHED)
    return ", ".join(parts)


def drafts(generation: Generation) -> dict[str, Any]:
    """What came of guessing ahead, as JSON: the share of guesses that came, and how many times as fast it was as passes
    of one token are; None where there is none to compare."""
    single, seconds = generation.single_seconds, generation.decode_seconds
    return {
        "passes": generation.passes,
        "proposed": generation.proposed,
        "accepted": generation.accepted,
        "acceptance": generation.accepted / generation.proposed if generation.proposed else None,
        "gain": (generation.passes + generation.accepted) * single / seconds
        if single and generation.proposed
        else None,
    }


def document(answer: Answer, prompt_tokens: int, reused_tokens: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What is known of an answer that has ended, as JSON.

    reused_tokens: those of the prompt that were not read for it. tokenizer: for the log-probabilities of its tokens;
    None leaves them out.
    """
    generation, turn = answer.generation, answer.turn.trimmed()
    return {
        "text": turn.text,
        "thinking": turn.thinking,
        "finish_reason": turn.finish_reason,
        "prompt_tokens": prompt_tokens,
        "reused_tokens": reused_tokens,
        "completion_tokens": len(generation.tokens),
        "timings": {
            "prompt_s": generation.prompt_seconds,
            "first_token_s": generation.first_token_seconds,
            "decode_s": generation.decode_seconds,
        },
        "seed": generation.seed,
        **({"tool_calls": calls(turn)} if turn.calls else {}),
    } | ({"logprobs": _logprobs(answer, tokenizer)} if tokenizer else {})


def _logprobs(answer: Answer, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        text = tokenizer.token_bytes(token_id).decode("utf-8", "replace")
        return {"id": token_id, "token": text, "logprob": logprob}

    return [
        entry(token.id, token.logprob) | {"top": [entry(i, value) for i, value in token.alternatives]}
        for token in answer.generation.tokens
    ]


class Interrupt:
    """While entered, Ctrl-C ends an answer between two tokens.

    Before the first token, and when pressed twice, it raises KeyboardInterrupt at once: a session that is
    interrupted while it reads stays where it was.
    """

    def __init__(self) -> None:
        self._pressed = False
        self._answering = False

    def cancelled(self) -> bool:
        """To be asked before every token."""
        self._answering = True
        return self._pressed

    def __enter__(self) -> Interrupt:
        self._previous: Any = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self._pressed or not self._answering:
            raise KeyboardInterrupt
        self._pressed = True


class Lines(Output):
    """An answer as JSON lines, one a piece."""

    def answer(self, text: str) -> None:
        self.line({"text": text})

    def thinking(self, text: str) -> None:
        self.line({"thinking": text})

    def call(self, call: dict[str, Any]) -> None:
        self.line({"tool_call": call})

    def end_answer(self) -> None:
        pass


class Aloud(Output):
    """Reasoning goes where the answer goes, between its tags."""

    _open = False

    def answer(self, text: str) -> None:
        if self._open and text:
            self._open = False
            text = f"\n</think>\n\n{text}"
        super().answer(text)

    def thinking(self, text: str) -> None:
        super().answer(text if self._open else f"<think>\n{text}")
        self._open = True
