"""`numoe run`: one prompt, one answer."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from numoe.cli import options
from numoe.cli.output import Output
from numoe.cli.reply import Interrupt, Reply, statistics, stream
from numoe.quant.errors import InputError

if TYPE_CHECKING:
    from numoe.engine import Generation
    from numoe.engine.tokenizer import Tokenizer

Trace = Annotated[
    Path | None,
    typer.Option("--trace", metavar="FILE", help="Write which experts each token takes, for bench --replay."),
]


def run(
    model: options.Model,
    prompt_argument: options.PromptArgument = None,
    prompt: options.Prompt = None,
    system: options.System = None,
    raw: options.Raw = False,
    think: options.Think = False,
    max_tokens: options.MaxTokens = None,
    stop: options.Stop = None,
    temp: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    repeat_penalty: options.RepeatPenalty = 1.0,
    seed: options.Seed = None,
    ctx: options.Context = None,
    ram: options.Ram = None,
    threads: options.Threads = None,
    json: options.Json = False,
    logprobs: options.Logprobs = 0,
    trace: Trace = None,
    quiet: options.Quiet = False,
) -> None:
    """Answer one prompt."""
    if prompt is not None and prompt_argument is not None:
        raise typer.BadParameter("the prompt is given twice, as an argument and with -p; give it once")
    if raw and system is not None:
        raise typer.BadParameter("--raw skips the template that --system needs; put the instructions into the prompt")
    if logprobs and not json:
        raise typer.BadParameter("--logprobs are part of the JSON document; add --json")
    text = _whole_prompt(prompt if prompt is not None else prompt_argument)
    with ExitStack() as stack:
        output = stack.enter_context(Output(quiet))
        interrupt = stack.enter_context(Interrupt())
        from numoe.engine import load
        from numoe.engine.chat import encode
        from numoe.engine.replay import RouteTrace

        output.status(f"loading {model}")
        begun = time.perf_counter()
        loaded = load(model, ram=ram, threads=threads, ctx=ctx)
        session = loaded.session(ctx)
        load_seconds = time.perf_counter() - begun
        if trace is not None:
            loaded.trace_routes(stack.enter_context(RouteTrace(trace, loaded.spec.routed_experts)))
        whole: str | list[int] = text
        thinking = None
        if not raw:
            messages = [{"role": "system", "content": system}] if system else []
            messages.append({"role": "user", "content": text.strip()})
            chat_format, tokenizer = loaded.description.chat_format, loaded.tokenizer
            whole, thinking = encode(chat_format, tokenizer, messages, thinking=think)
        generation = session.generate(
            whole,
            max_tokens=max_tokens,
            stop=stop or (),
            logprobs=logprobs,
            cancelled=interrupt.cancelled,
            progress=output.reading,
            temperature=temp,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repeat_penalty,
            seed=seed,
        )
        reply = stream(generation, None if json else output, thinking)
        experts = loaded.stats()["experts"]
        if json:
            document = {"model": model, **_document(generation, reply, load_seconds, experts)}
            if logprobs:
                document["logprobs"] = _logprobs(generation, loaded.tokenizer)
            output.document(document)
        output.note(statistics(generation, experts))
    if generation.finish_reason == "cancelled":
        raise typer.Exit(130)


def _whole_prompt(given: str | None) -> str:
    """The prompt, and what is piped in after it.

    Raises:
        InputError: both are empty, or the piped text is not UTF-8.
    """
    parts = [given] if given else []
    if sys.stdin is not None and not sys.stdin.isatty():
        try:
            piped = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"the piped text is not UTF-8 (byte {error.start}); convert it first") from None
        parts += [piped] if piped else []
    text = "\n\n".join(parts)
    if not text.strip():
        raise InputError("the prompt is empty; give it with -p or pipe it in")
    return text


def _document(generation: Generation, reply: Reply, load_seconds: float, experts: dict[str, Any]) -> dict[str, Any]:
    return {
        "text": reply.text,
        "thinking": reply.thinking,
        "finish_reason": generation.finish_reason,
        "prompt_tokens": len(generation.prompt),
        "completion_tokens": len(generation.tokens),
        "timings": {
            "load_s": load_seconds,
            "prompt_s": generation.prompt_seconds,
            "first_token_s": generation.first_token_seconds,
            "decode_s": generation.decode_seconds,
        },
        "experts": experts,
        "seed": generation.seed,
    }


def _logprobs(generation: Generation, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        text = tokenizer.token_bytes(token_id).decode("utf-8", "replace")
        return {"id": token_id, "token": text, "logprob": logprob}

    return [
        entry(token.id, token.logprob) | {"top": [entry(i, value) for i, value in token.alternatives]}
        for token in generation.tokens
    ]
