"""`numoe chat`: a conversation at the prompt, or of piped lines."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from numoe.cli import options
from numoe.cli.output import Output, print_error
from numoe.cli.reply import Interrupt, statistics, stream
from numoe.quant.errors import InputError

if TYPE_CHECKING:
    from numoe.engine import Session
    from numoe.engine.session import Snapshot

HELP = """\
/system TEXT  set the instructions (without TEXT: none)
/clear        forget the conversation
/bye          leave, as Ctrl-D does
Ctrl-C stops an answer."""


def chat(
    model: options.ModelOrTiny = "tiny",
    system: options.System = None,
    think: options.Think = False,
    max_tokens: options.MaxTokens = None,
    stop: options.Stop = None,
    temp: options.Temperature = 0.6,
    top_p: options.TopP = 0.95,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    repeat_penalty: options.RepeatPenalty = 1.0,
    seed: options.Seed = None,
    ctx: options.Context = None,
    ram: options.Ram = None,
    threads: options.Threads = None,
    quiet: options.Quiet = False,
) -> None:
    """Talk with a model. Piped input is one turn a line."""
    from numoe.engine import load

    with Output(quiet) as output:
        output.status(f"loading {model}")
        loaded = load(model, ram=ram, threads=threads, ctx=ctx)
        session = loaded.session(ctx)
        sampling: dict[str, Any] = {"temperature": temp, "top_p": top_p, "top_k": top_k, "min_p": min_p}
        sampling |= {"repetition_penalty": repeat_penalty, "seed": seed}
        conversation = Conversation(session, output, system, think, max_tokens, stop or (), sampling)
        output.clear_status()
        typed = sys.stdin.isatty() and sys.stderr.isatty()
        if typed:
            output.note(f"{loaded.path.name}, context {session.context} tokens. /help lists the commands.")
            if model == "tiny":
                size = loaded.plan().parameters / 1e6
                output.note(f"A demonstration of {size:.1f} M parameters. For more: hf download Qwen/Qwen3-30B-A3B")
        for line in _typed_lines(output) if typed else _piped_lines():
            try:
                if not conversation.command(line):
                    conversation.turn(line)
            except EOFError:
                return
            except (InputError, KeyboardInterrupt) as error:
                if not typed:
                    raise
                output.settle()
                if isinstance(error, InputError):
                    print_error(str(error))


def _typed_lines(output: Output) -> Iterator[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import create_output

    prompt: PromptSession[str] = PromptSession(output=create_output(stdout=sys.stderr))
    while True:
        try:
            line = prompt.prompt("> ")
        except KeyboardInterrupt:
            if not prompt.default_buffer.text:
                output.note("Ctrl-D or /bye leaves.")
            continue
        except EOFError:
            return
        if line.strip():
            yield line.strip()


def _piped_lines() -> Iterator[str]:
    try:
        for line in sys.stdin.buffer:
            if text := line.decode("utf-8").strip():
                yield text
    except UnicodeDecodeError:
        raise InputError("the piped text is not UTF-8; convert it first") from None


class Conversation:
    """The turns so far, and a session that has read them.

    Raises InputError for a model without a chat template.
    """

    def __init__(
        self,
        session: Session,
        output: Output,
        system: str | None,
        think: bool,
        max_tokens: int | None,
        stop: Sequence[str],
        sampling: dict[str, Any],
    ) -> None:
        self._session = session
        self._format = session.model.description.chat_format
        self._output = output
        self._system = system
        self._think = think
        self._limits: dict[str, Any] = {"max_tokens": max_tokens, "stop": stop, **sampling}
        self._turns: list[dict[str, str]] = []
        self._asked: Snapshot | None = None  # before the last answer

    def command(self, line: str) -> bool:
        """Do what a line with a slash says; False if the line is no command. /bye raises EOFError."""
        name, _, text = line.partition(" ")
        match name:
            case "/help":
                self._output.note(HELP)
            case "/bye":
                raise EOFError
            case "/clear":
                self._turns.clear()
                self._output.note("The conversation is forgotten.")
            case "/system":
                self._system = text.strip() or None
                self._output.note("The instructions are set." if self._system else "There are no instructions now.")
            case _ if name[:1] == "/" and name[1:].isalpha():
                raise InputError(f"there is no command {name}; /help lists them")
            case _:
                return False
        return True

    def turn(self, text: str) -> None:
        """Ask, and show the answer.

        Raises:
            InputError: the conversation does not fit into the context. The question is forgotten.
            KeyboardInterrupt: before the answer began. The question is forgotten.
        """
        turns = [*self._turns, {"role": "user", "content": text}]
        instructions = [{"role": "system", "content": self._system}] if self._system else []
        from numoe.engine.chat import encode

        session = self._session
        with Interrupt() as interrupt:
            tokenizer, messages = session.model.tokenizer, [*instructions, *turns]
            ids, thinking = encode(self._format, tokenizer, messages, thinking=self._think)
            if len(ids) >= session.context:
                raise InputError(
                    f"the conversation is {len(ids)} tokens long and the context has room for {session.context}; "
                    "/clear begins anew, --ctx makes room"
                )
            generation = session.generate(
                self._unread(ids), cancelled=interrupt.cancelled, progress=self._reading, **self._limits
            )
            reply = stream(generation, self._output, thinking)
        self._turns = [*turns, {"role": "assistant", "content": reply.text}]
        if generation.finish_reason == "length":
            full = session.position == session.context
            self._output.note("The context is full: /clear begins anew." if full else "Cut off at --max-tokens.")
        self._output.note(statistics(generation, session.model.stats()["experts"]))

    def _unread(self, ids: list[int]) -> list[int]:
        """Go back to where a conversation goes on from, and return what is still to be read.

        An answer that the template repeats otherwise than it was made, without its reasoning for one, is read again:
        caches with windows reach back over it by the snapshot alone.
        """
        session = self._session
        if self._asked and session.tokens != ids[: session.position]:
            session.restore(self._asked)
        return session.align(ids)

    def _reading(self, done: int, total: int) -> None:
        self._output.reading(done, total)
        if done == total:
            self._asked = self._session.snapshot()
