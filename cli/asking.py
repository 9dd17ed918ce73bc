"""A model is asked what `numoe run` was given: one prompt, or a file of them."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numoe.cli.output import Output
from numoe.cli.reply import NO_SWITCH, SHED, Interrupt, Neighbours, calls, document, drafts, show, statistics
from numoe.cli.request import Request, load_drafted, tools_of
from numoe.cli.settings import Options, filled
from numoe.quant.errors import InputError

if TYPE_CHECKING:
    from numoe.cli.answers import Answers
    from numoe.engine import Description, Model, Session
    from numoe.engine.chat.answer import Answer
    from numoe.engine.chat.conversation import Conversation
    from numoe.engine.chat.files import Chat

CUT = 3
"""The exit code where an answer of a given form was cut off before its end."""
_PATIENCE = 30.0  # seconds to wait for another process that goes on with the same chat


@dataclass
class Asking:
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
        from numoe.cli.history import read_last
        from numoe.engine.chat.files import Chat

        kept = path.exists() or self.options["continue_"]
        chat = Chat.read(path) if path.exists() else read_last() if self.options["continue_"] else Chat(self.model)
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
