"""`numoe run`: one prompt, one answer; or a file of prompts, and an answer to each."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from numoe.cli import arguments
from numoe.cli.config import options_of
from numoe.cli.config_file import table
from numoe.cli.fetch import fetch_missing
from numoe.cli.output import Output
from numoe.cli.reply import NO_SWITCH, SHED, Interrupt, Neighbours, calls, document, drafts, show, statistics
from numoe.cli.request import Request, load_drafted, tools_of
from numoe.cli.settings import Options, filled, in_group, takes
from numoe.cli.text import typed, whole_prompt
from numoe.quant.errors import InputError, WrongUsage

if TYPE_CHECKING:
    from numoe.cli.answers import Answers
    from numoe.engine import Description, Model, Session
    from numoe.engine.chat.answer import Answer
    from numoe.engine.chat.conversation import Conversation
    from numoe.engine.chat.files import Chat

CUT = 3
"""The exit code where an answer of a given form was cut off before its end."""
_PATIENCE = 30.0  # seconds to wait for another process that goes on with the same chat


@takes(
    "model", "pull", "prompt", "prompt_file", "file", "prompt_cache", "template", "system", "raw", "continue_",
    "session", "tools", "tool_choice", "reasoning", "show_thinking", "form", "ending", "sampling", "room", "check",
    "json", "jsonl", "logprobs", "batch", "out", "parallel", "trace", "save", "log", "verbose", "quiet",
)  # fmt: skip
def run(
    model_argument: arguments.ModelOrDefault = None, prompt_argument: arguments.Prompt = None, *, options: Options
) -> None:
    """Answer one prompt, or a file of prompts.

    The prompt is what PROMPT, -p or --prompt-file gives; files and piped text come before it. With a prompt, standard
    input is read to its end unless it is a terminal; < /dev/null goes without. - as the prompt is standard input.
    Without any in a terminal, a chat begins.

    With a default model (`numoe config set model NAME`), -m or -c, MODEL may be left out. -c goes on with the last
    prompt and its answer, which are kept unless --no-save says otherwise.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 an answer of a given form was cut off before its end, 130 Ctrl-C,
    141 the reader of stdout left, 143 SIGTERM.

    Examples:
    numoe run tiny "What colour is a frog?"
    cat letter.txt | numoe run MODEL "Who wrote this?"
    numoe run MODEL --schema person.json -f letter.txt "Who wrote this?" | jq .name
    numoe run MODEL --batch questions.jsonl --out answers.jsonl
    numoe run OWNER/NAME --pull "What colour is a frog?"
    """
    if prompt_argument is None and model_argument is not None and _is_prompt(model_argument, options):
        model_argument, prompt_argument = None, model_argument
    given = (prompt_argument, options["prompt"], options["prompt_file"])
    _refuse_contradictions(options, prompted=any(text is not None for text in given))
    model = model_argument or arguments.meant(options["model"])
    if _opens_chat(options, given):
        from numoe.cli.chat.loop import converse

        converse(model, options_of("chat", options))
        return
    if model is None:
        model = _last_model(options)
    form = _Lines if options["jsonl"] else _Aloud if options["show_thinking"] else Output
    with ExitStack() as stack:
        output = stack.enter_context(form(options["quiet"]))
        text = "" if options["batch"] is not None else _prompt(given, options, output)
        output.status(f"loading {model}")
        from numoe.engine import describe

        if options["pull"]:
            fetch_missing(model, options, output)
        description = describe(model, check=options["check"])
        for told in description.tokenizer.notes:
            output.note(told)
        options.recommend(description.sampling)
        if options["verbose"]:
            output.note(_sampling(options, description.sampling))
        asked = _Asked(model, description, options, output, stack)
        code = asked.batch() if options["batch"] is not None else asked.prompt(text)
    if code:
        raise typer.Exit(code)


def _is_prompt(text: str, options: Options) -> bool:
    """Whether what stands alone is no MODEL: another one is named, and this is none."""
    from numoe.engine.home import lookup
    from numoe.engine.hub.hub_id import is_hub_id

    if "model" in options.stated or options["continue_"]:
        return True
    if is_hub_id(text) or lookup(text) is not None:
        return False
    if options["model"] is None and " " in text:
        raise WrongUsage(
            "numoe run needs MODEL before a prompt; name one, or set a default with `numoe config set model`"
        )
    return options["model"] is not None


def _opens_chat(options: Options, given: tuple[str | None, ...]) -> bool:
    """Whether nothing is asked, and somebody is there to talk with."""
    other = ("file", "template", "batch", "json", "jsonl", "raw", "trace", "continue_", "session", "tools")
    asked = any(text is not None for text in given) or any(options[name] for name in (*other, *in_group("form")))
    return not asked and typed() and sys.stdout.isatty() and sys.stderr.isatty()


def _last_model(options: Options) -> str:
    """The model that -c goes on with. Raises WrongUsage where it is not asked for: there is no MODEL then."""
    from numoe.cli.history import last_path
    from numoe.engine.chat.files import Chat

    if not options["continue_"]:
        raise WrongUsage("numoe run needs MODEL; name one, or set a default with `numoe config set model NAME`")
    return _read_last(Chat.read, last_path()).model


def _read_last(read: Callable[[Path], Chat], path: Path) -> Chat:
    if not path.exists():
        raise WrongUsage("there is nothing to go on with: no prompt of `numoe run` was kept; ask without -c first")
    return read(path)


def _prompt(given: tuple[str | None, str | None, str | None], options: Options, output: Output) -> str:
    """What is asked, put into its template."""
    name = options["template"]
    if name is None:
        return whole_prompt(*given, options["file"], output.note)
    templates = table("template")
    if name not in templates:
        raise WrongUsage(f'there is no template "{name}"; `numoe template` shows those that there are')
    place = "{input}"
    template = templates[name]
    text = whole_prompt(*given, options["file"], output.note, needed=place in template)
    return template.replace(place, text) if place in template else "\n\n".join(filter(None, (template, text)))


def _refuse_contradictions(options: Options, prompted: bool) -> None:
    """Raises WrongUsage where options exclude each other; `prompted`: the prompt is given by one of them."""
    batch = options["batch"] is not None
    if options["raw"] and (options["system"] is not None or options["session"] is not None or options["continue_"]):
        raise WrongUsage("--raw skips the template that --system, --session and -c need; write all into the prompt")
    if options["continue_"] and options["session"] is not None:
        raise WrongUsage("-c goes on with the last prompt and --session with a chat; give one of them")
    goes_on = options["session"] is not None or options["continue_"]
    if options["tools"] is not None and (options["raw"] or batch or goes_on):
        raise WrongUsage("--tools are for one prompt; leave out --raw, -c, --session and --batch")
    if options["tool_choice"] is not None and options["tools"] is None:
        raise WrongUsage("--tool-choice is of --tools; give those too")
    if options["json"] + options["jsonl"] + batch > 1:
        raise WrongUsage("--json, --jsonl and --batch each have a form of their own; choose one")
    if options["logprobs"] and not (options["json"] or options["jsonl"] or batch):
        raise WrongUsage("--logprobs are part of the JSON document; add --json")
    if sum(options[name] is not None for name in in_group("form")) > 1:
        raise WrongUsage("--schema, --choices and --regex are each the whole form; choose one")
    others = prompted or options["file"] or options["template"] is not None
    if batch and (others or options["session"] is not None or options["continue_"]):
        raise WrongUsage("--batch has the prompts in its file; leave out the others, --file, -t, -c and --session")
    if batch and (options["parallel"] or 1) > 1 and options["trace"] is not None:
        raise WrongUsage("--trace follows one sequence; leave out --parallel")
    if options["prompt_cache"] is not None and (batch or options["session"] is not None):
        raise WrongUsage("--prompt-cache is for one prompt; chats and batches read what they share once anyway")
    if options["out"] is not None and not batch:
        raise WrongUsage("--out is for the answers of --batch; send this one on with >")


def _sampling(options: Options, own: dict[str, Any]) -> str:
    """How the answer is sampled: temp 0.6 (the model's own), top_p 1.0, seed 3 (as given)."""
    settings = {name: one for name, one in in_group("sampling").items() if options[name] is not None}
    why = {
        name: " (as given)" if name in options.chosen else " (the model's own)" * (one.field in own)
        for name, one in settings.items()
    }
    return "sampling: " + ", ".join(f"{name} {options[name]}{why[name]}" for name in settings)


@dataclass
class _Asked:
    """What a model is asked. Whatever can be refused without its weights is refused before they are read."""

    model: str
    description: Description
    options: Options
    output: Output
    stack: ExitStack
    load_seconds: float = 0.0

    def batch(self) -> int:
        """Answer a file of prompts, and return the exit code."""
        from numoe.cli.answers import Answers, count
        from numoe.cli.batch import answer_batch, read_batch
        from numoe.engine.experts import heat

        options, output = self.options, self.output
        items = read_batch(options["batch"], options, self.description)
        with Answers(items, output, options["out"], options["batch"]) as answers:
            asked = len(answers.missing)
            if asked < len(items):
                output.note(f"{options['out']} has {len(items) - asked} of {len(items)} answers already.")
            if asked and not self._by_replicas(answers):
                model = self._load(options["ctx"])
                parallel = options["parallel"] or (None if options["trace"] is None else 1)
                answer_batch(model, options["ctx"], parallel, answers, self.model)
                heat.keep(model)
                if model.stats()["experts"].get("shed"):
                    output.note(SHED)
        failed, cut = count(items, answers.lines)
        output.note(f"{asked} answers, of which {failed} failed")
        return 1 if failed else CUT if cut else 0

    def _by_replicas(self, answers: Answers) -> bool:
        """Have every node of a cluster answer with a model of its own, where each has room for the whole of it."""
        options, output = self.options, self.output
        if options["ray"] is None or options["trace"] is not None:
            return False
        from numoe.cli.replicas import Replicas, fits_each
        from numoe.engine.experts.cluster import connect

        ray = connect(options["ray"])
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        if not fits_each(nodes, self.description, options):
            return False
        with Replicas(ray, nodes, output.note) as replicas:
            output.status(f"loading {self.model} on {len(nodes)} nodes")
            replicas.open(self.model, self.description, options, len(answers.missing))
            output.note(f"{replicas.count} nodes answer, each with the whole of {self.model}.")
            with closing(replicas.lines(answers.asked)) as lines:
                answers.add_all(lines, self.model)
        return True

    def prompt(self, text: str) -> int:
        """Answer one prompt, and return the exit code."""
        from numoe.cli.chat.kept import model_name
        from numoe.cli.history import log
        from numoe.engine.chat.files import Chat

        prompt = text if self.options["raw"] else [{"role": "user", "content": text.strip()}]
        use = tools_of(self.options["tools"], self.options["tool_choice"])
        request = Request.make(prompt, self.options, use=use)
        interrupt = self.stack.enter_context(Interrupt())
        hooks: dict[str, Any] = {"cancelled": interrupt.cancelled, "progress": self.output.reading}
        chat = self.options["continue_"] or self.options["session"] is not None
        session, answer = self._in_chat(text.strip(), request, hooks) if chat else self._alone(request, hooks)
        reason = self._show(session, answer)
        turn = replace(answer.turn.trimmed(), question=text.strip())
        if not chat and self.options["save"] and not self.options["raw"]:
            self._keep(Chat(model_name(self.model), request.settings, (turn,)))
        if self.options["log"]:
            log({"model": self.model, "prompt": text, "text": turn.text, "thinking": turn.thinking,
                 "finish_reason": turn.finish_reason, "completion_tokens": len(answer.generation.tokens),
                 "seed": answer.generation.seed,
                 **({"tool_calls": calls(turn)} if turn.calls else {})})  # fmt: skip
        if reason == "cancelled":
            return 130
        return CUT if request.cut(reason) else 0

    def _keep(self, chat: Chat) -> None:
        """Keep the prompt and its answer for -c. Where that cannot be written, --verbose tells; the answer is there."""
        from numoe.cli.history import last_path
        from numoe.engine.home import make

        try:
            make(last_path().parent)
            chat.write(last_path())
        except (InputError, OSError) as error:
            if self.options["verbose"]:
                self.output.note(str(error))

    def _load(self, room: int | None) -> Model:
        from numoe.engine.measure.replay import RouteTrace
        from numoe.quant.files import require_folder

        if self.options["trace"] is not None:
            require_folder(self.options["trace"])
        begun = time.perf_counter()
        context = self.description.plan(room).context
        made = load_drafted(self.description, context, self.options, self.output.note, self.output.loading(self.model))
        self.load_seconds = time.perf_counter() - begun
        if self.options["trace"] is not None:
            trace = RouteTrace(self.options["trace"], made.spec.routed_experts)
            made.trace_routes(self.stack.enter_context(trace))
            made.drafter = None  # whose wrong guesses take experts too
        self.output.clear_status()
        return made

    def _alone(self, request: Request, hooks: dict[str, Any]) -> tuple[Session, Answer]:
        from numoe.engine.prompt_cache import PromptCache

        context = self.options["ctx"]
        ids, opened = request.encode(self.description, self.description.plan(context).context)
        file = self.options["prompt_cache"]
        cache = None if file is None else PromptCache(file)
        model = self._load(context)
        if cache is None:
            return (session := model.session(context)), request.ask(session, ids, opened, **hooks)
        session = cache.open(model, context)
        unread = cache.begin(session, ids)
        self.stack.callback(cache.close)
        hooks["progress"] = cache.reading(hooks["progress"])
        return session, request.ask(session, unread, opened, **hooks)

    def _in_chat(self, text: str, request: Request, hooks: dict[str, Any]) -> tuple[Session, Answer]:
        from numoe.cli.history import last_path
        from numoe.engine.chat.files import alone, chat_path

        path = last_path() if self.options["continue_"] else chat_path(self.options["session"])
        self.output.status(f"waiting for the chat {path.stem}")
        self.stack.enter_context(alone(path, patience=_PATIENCE))
        self.output.clear_status()
        conversation = self._conversation(path, self._chat(path))
        answer = conversation.ask(text, grammar=request.grammar, logprobs=request.logprobs, **hooks)
        if answer.dropped:
            self.output.note(f"The context is full: the oldest {answer.dropped} turns are no longer told to the model.")
        return conversation.session, answer

    def _chat(self, path: Path) -> Chat:
        """The chat that is gone on with: one that was kept has its own settings where no option says otherwise."""
        from numoe.cli.chat.kept import model_name
        from numoe.engine.chat.files import Chat

        kept = path.exists() or self.options["continue_"]
        chat = _read_last(Chat.read, path) if kept else Chat(self.model)
        settings = filled(chat.settings, self.options.stated if kept else self.options)
        return replace(chat, model=model_name(self.model), settings=settings)

    def _conversation(self, path: Path, chat: Chat) -> Conversation:
        """The conversation of a chat's file, which is written when the stack is left, however that is."""
        from numoe.engine.chat.conversation import Conversation
        from numoe.engine.chat.files import cache_path

        conversation = Conversation(self._load(chat.settings.context), chat, cache_path(path) if chat.turns else None)

        @self.stack.callback
        def keep() -> None:
            if conversation.chat.turns and (self.options["save"] or self.options["session"] is not None):
                conversation.chat.write(path)
                conversation.save_cache(cache_path(path))

        return conversation

    def _show(self, session: Session, answer: Answer) -> str | None:
        """Show an answer and what is known of it, and return why it ended."""
        from numoe.engine.experts import heat
        from numoe.engine.measure.machine import record

        options, output, generation = self.options, self.output, answer.generation
        known = session.position
        neighbours = Neighbours()
        neighbours.begin()
        turn = show(answer, None if options["json"] else output)
        neighbours.end(output)
        if turn.thinking and not options["think"] and not self.description.chat_format.asks_for_reasoning:
            output.note(f"{NO_SWITCH} --think-budget 0 ends it at once.")
        experts = session.model.stats()["experts"]
        if options["json"] or options["jsonl"]:
            tokenizer = self.description.tokenizer if options["logprobs"] else None
            made = document(answer, known + len(generation.prompt), known, tokenizer)
            made["timings"]["load_s"] = self.load_seconds
            made["timings"]["drafts"] = drafts(generation)
            (output.document if options["json"] else output.line)({"model": self.model, **made, "experts": experts})
        said = [statistics(generation, experts)]
        if turn.finish_reason == "length":
            full = session.position == session.context
            said.append("the context is full (--ctx)" if full else "cut off at --max-tokens")
        elif turn.finish_reason == "repetition":
            said.append("stopped, for the answer repeats itself without end")
        output.note(", ".join(said))
        record(session.model, len(generation.tokens) - 1, generation.decode_seconds)
        heat.keep(session.model)
        return turn.finish_reason


class _Lines(Output):
    """An answer as JSON lines, one a piece."""

    def answer(self, text: str) -> None:
        self.line({"text": text})

    def thinking(self, text: str) -> None:
        self.line({"thinking": text})

    def call(self, call: dict[str, Any]) -> None:
        self.line({"tool_call": call})

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
