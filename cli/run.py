"""`numoe run`: one prompt, one answer; or a file of prompts, and an answer to each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from numoe.cli import options
from numoe.cli.output import Output
from numoe.cli.reply import Interrupt, show, statistics
from numoe.cli.request import SETTINGS, Request, document, read_schema
from numoe.cli.text import whole_prompt

if TYPE_CHECKING:
    from numoe.engine import Model
    from numoe.engine.chat.conversation import Conversation
    from numoe.engine.chat.files import Chat

CUT = 3
"""The exit code where an answer of a given form was cut off before its end."""
_PATIENCE = 30.0  # seconds to wait for another process that goes on with the same chat

PromptFile = Annotated[
    str | None, typer.Option("--prompt-file", metavar="FILE", help="Read the prompt from a file; - is standard input.")
]
Files = Annotated[
    list[str] | None,
    typer.Option("-f", "--file", metavar="FILE", help="Put a text file before the prompt. Can be repeated."),
]
Schema = Annotated[
    str | None, typer.Option("--schema", metavar="FILE|JSON", help="The answer is JSON that this JSON Schema accepts.")
]
Choices = Annotated[
    str | None, typer.Option("--choices", metavar="A,B,C", help="The answer is one of these texts, cut at the commas.")
]
Regex = Annotated[
    str | None, typer.Option("--regex", metavar="R", help="The answer matches this regular expression as a whole.")
]
ShowThinking = Annotated[
    bool, typer.Option("--show-thinking", help="Print the reasoning too, between <think> and </think>.")
]
JsonLines = Annotated[
    bool, typer.Option("--jsonl", help="Print one JSON line a piece as it comes; the last is the document of --json.")
]
Batch = Annotated[
    str | None,
    typer.Option(
        "--batch", metavar="FILE", help='Answer each line of a file: {"prompt": TEXT} or {"messages": [...]}.'
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE", help="With --batch: add the answers that this file lacks, one line each."),
]
Trace = Annotated[
    Path | None,
    typer.Option("--trace", metavar="FILE", help="Write which experts each token takes, for bench --replay."),
]


def run(
    context: typer.Context,
    model: options.Model,
    prompt_argument: options.PromptArgument = None,
    prompt: options.Prompt = None,
    prompt_file: PromptFile = None,
    file: Files = None,
    system: options.System = None,
    raw: options.Raw = False,
    session: options.Session = None,
    think: options.Think = False,
    think_budget: options.ThinkBudget = None,
    show_thinking: ShowThinking = False,
    schema: Schema = None,
    choices: Choices = None,
    regex: Regex = None,
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
    jsonl: JsonLines = False,
    logprobs: options.Logprobs = 0,
    batch: Batch = None,
    out: Out = None,
    trace: Trace = None,
    quiet: options.Quiet = False,
) -> None:
    """Answer one prompt, or a file of prompts.

    The prompt is what PROMPT, -p or --prompt-file gives; files and piped text come before it. With a prompt, standard
    input is read to its end unless it is a terminal; < /dev/null goes without. - as the prompt is standard input.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 an answer of a given form was cut off before its end, 130 Ctrl-C,
    141 the reader of stdout left, 143 SIGTERM.
    """
    given = [prompt_argument, prompt, prompt_file]
    if raw and (system is not None or session is not None):
        raise typer.BadParameter("--raw skips the template that --system and --session need; write all into the prompt")
    if json + jsonl + (batch is not None) > 1:
        raise typer.BadParameter("--json, --jsonl and --batch each have a form of their own; choose one")
    if logprobs and not (json or jsonl or batch):
        raise typer.BadParameter("--logprobs are part of the JSON document; add --json")
    if sum(form is not None for form in (schema, choices, regex)) > 1:
        raise typer.BadParameter("--schema, --choices and --regex are each the whole form; choose one")
    if batch is not None and (session is not None or file or any(text is not None for text in given)):
        raise typer.BadParameter("--batch has the prompts in its file; leave out the others, --file and --session")
    if out is not None and batch is None:
        raise typer.BadParameter("--out is for the answers of --batch; send this one on with >")
    values: dict[str, Any] = {
        "system": system,
        "raw": raw,
        "think": think,
        "think_budget": think_budget,
        "schema": None if schema is None else read_schema(schema),
        "choices": None if choices is None else [choice.strip() for choice in choices.split(",")],
        "regex": regex,
        "max_tokens": max_tokens,
        "stop": tuple(stop or ()),
        "temp": temp,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repeat_penalty": repeat_penalty,
        "seed": seed,
        "ctx": ctx,
        "logprobs": logprobs,
    }
    with ExitStack() as stack:
        output = stack.enter_context((_Lines if jsonl else _Aloud if show_thinking else Output)(quiet))
        text = whole_prompt(prompt_argument, prompt, prompt_file, file or (), output.note) if batch is None else ""
        output.status(f"loading {model}")
        from numoe.cli.batch import Answers, answer_batch, count, read_batch
        from numoe.engine import describe, load
        from numoe.engine.chat.files import alone, chat_path
        from numoe.engine.measure.machine import record
        from numoe.engine.measure.replay import RouteTrace
        from numoe.engine.session import require_room

        description = describe(model)
        for told in description.tokenizer.notes:
            output.note(told)
        load_seconds = 0.0

        def loaded(room: int | None) -> Model:
            nonlocal load_seconds
            begun = time.perf_counter()
            made = load(description, ram=ram, threads=threads, ctx=description.plan(room).context)
            load_seconds = time.perf_counter() - begun
            if trace is not None:
                made.trace_routes(stack.enter_context(RouteTrace(trace, made.spec.routed_experts)))
            output.clear_status()
            return made

        # What can be refused without the weights is refused before they are read.
        if batch is not None:
            items = read_batch(batch, values, description)
            with Answers(items, output, out, batch) as answers:
                asked = len(answers.missing)
                if asked < len(items):
                    output.note(f"{out} has {len(items) - asked} of {len(items)} answers already.")
                if asked:
                    answer_batch(loaded(ctx).session(ctx), items, answers, model, output)
            failed, cut = count(items, answers.lines)
            output.note(f"{asked} answers, of which {failed} failed")
            raise typer.Exit(1 if failed else CUT if cut else 0)
        request = Request.make(text if raw else [{"role": "user", "content": text.strip()}], values)
        interrupt = stack.enter_context(Interrupt())
        hooks: dict[str, Any] = {"cancelled": interrupt.cancelled, "progress": output.reading}
        if session is None:
            ids, opened = request.encode(description)
            require_room(len(ids), description.plan(ctx).context, description.spec.context)
            reader = loaded(ctx).session(ctx)
            answer = request.ask(reader, ids, opened, **hooks)
        else:
            path = chat_path(session)
            output.status(f"waiting for the chat {session}")
            stack.enter_context(alone(path, patience=_PATIENCE))
            output.clear_status()
            chat = _chat(path, model, context, values)
            conversation = _conversation(path, chat, loaded, stack)
            reader = conversation.session
            answer = conversation.ask(text.strip(), grammar=request.grammar, logprobs=logprobs, **hooks)
            if answer.dropped:
                output.note(f"The context is full: the oldest {answer.dropped} turns are no longer told to the model.")
        known = reader.position
        turn = show(answer, None if json else output)
        experts = reader.model.stats()["experts"]
        if json or jsonl:
            read, tokenizer = len(answer.generation.prompt), reader.model.tokenizer if logprobs else None
            made = document(answer, known + read, known, tokenizer)
            made["timings"]["load_s"] = load_seconds
            (output.document if json else output.line)({"model": model, **made, "experts": experts})
        output.note(statistics(answer.generation, experts))
        record(reader.model, len(answer.generation.tokens) - 1, answer.generation.decode_seconds)
    if turn.finish_reason == "cancelled":
        raise typer.Exit(130)
    if turn.finish_reason == "length" and request.grammar is not None:
        raise typer.Exit(CUT)


def _chat(path: Path, model: str, context: typer.Context, values: Mapping[str, Any]) -> Chat:
    """The chat that is gone on with: one that was kept has its own settings where no option says otherwise."""
    from numoe.cli.chat.commands import changed, model_name
    from numoe.engine.chat.files import Chat

    kept = path.exists()
    chat = Chat.read(path) if kept else Chat(model)
    settings = {name: values[name] for name in SETTINGS if not kept or options.given(context, name)}
    return replace(chat, model=model_name(model), settings=changed(chat.settings, settings))


def _conversation(path: Path, chat: Chat, loaded: Callable[[int | None], Model], stack: ExitStack) -> Conversation:
    """The conversation of a chat's file, which is written when the stack is left, however that is."""
    from numoe.engine.chat.conversation import Conversation
    from numoe.engine.chat.files import cache_path

    conversation = Conversation(loaded(chat.settings.context), chat, cache_path(path) if chat.turns else None)

    @stack.callback
    def keep() -> None:
        if conversation.chat.turns:
            conversation.chat.write(path)
            conversation.save_cache(cache_path(path))

    return conversation


class _Lines(Output):
    """An answer as JSON lines, one a piece."""

    def answer(self, text: str) -> None:
        self.line({"text": text})

    def thinking(self, text: str) -> None:
        self.line({"thinking": text})

    def end_answer(self) -> None:
        pass


class _Aloud(Output):
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
