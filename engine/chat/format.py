"""How conversations become prompts and completions become messages again: what every chat format does."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol, Self

from numoe.engine.chat.thinking import Splitter, ThinkSplitter, with_thinking
from numoe.engine.chat.tools.call import Syntax, Use
from numoe.engine.chat.tools.reader import CallReader
from numoe.engine.text.grammar import named, outside
from numoe.engine.text.tags import Tags
from numoe.engine.text.tokenizer import Tokenizer


class ChatFormat(Protocol):
    """How a model writes conversations. `tags`: those around its reasoning.

    A file of `numoe.engine.chat.formats` calls its own FORMAT.
    """

    tags: Tags
    lead: str = ""
    """What comes before an answer without reasoning."""
    shown: Collection[str] = ()
    """Special tokens that `splitter` has to see."""
    syntax: Syntax | None = None
    """How calls of tools are written; None: that is not known."""

    @property
    def takes_tools(self) -> bool:
        """Whether the model can be given tools, and its calls be read."""
        return False

    @property
    def asks_for_reasoning(self) -> bool:
        """Whether the model is asked for reasoning or not; else it reasons, or does not, whatever is asked for."""
        question = [{"role": "user", "content": "?"}]
        return self.render(question, thinking=True) != self.render(question, thinking=False)

    @classmethod
    def of(cls, model_type: str, template: str, tokenizer: Tokenizer) -> Self | None:
        """The format where a model speaks it, else None.

        template: its chat template, "" without one. Raises InputError for a template that is not valid.
        """

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = False,
        reasoning_effort: str | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt for OpenAI-style messages, BOS included where the format has one.

        tools: OpenAI-style function schemas. thinking: ask for reasoning before the answer.
        add_generation_prompt: end with the beginning of the next answer.
        Raises InputError when the format cannot write the conversation.
        """

    def parse(self, completion: str, *, thinking: bool) -> dict[str, Any]:
        """A completion as {"content": str, "reasoning_content": str, "tool_calls": list}.

        thinking: the completion begins inside a thinking block, see `opens_thinking`.
        """

    def splitter(self, thinking: bool, *, formed: bool = False, use: Use | None = None) -> Splitter:
        """What tells reasoning from the answer in a stream.

        thinking, formed: as in `ThinkSplitter`. use: the tools, for a format whose splitter tells calls apart.
        """
        return ThinkSplitter(thinking, self.tags, formed=formed)

    def reader(self, use: Use) -> CallReader | None:
        """What tells calls from text in an answer without reasoning; None: the splitter has done so."""
        return CallReader(self.syntax, use.named) if self.syntax else None

    def formed(self, grammar: str, opened: bool) -> str:
        """A grammar for the answer, as one for reasoning and answer; opened: the completion begins inside reasoning."""
        return with_thinking(grammar, opened, self.tags)

    def called(self, use: Use, grammar: str | None, opened: bool, thinks: bool) -> str:
        """A grammar for an answer with calls as asked for, reasoning included.

        grammar: the form of an answer without calls; None: any. thinks: there may be reasoning before it.

        Raises:
            InputError: what is asked for cannot be followed.
        """
        assert self.syntax is not None
        made = f"start: {'calls' if use.choice != 'auto' else 'plain | TEXT calls | calls'}\n{self.syntax.grammar(use)}"
        if use.choice == "auto":
            made += f"{outside(*self.syntax.openings(use.named))}\n"
            made += "plain: TEXT\n" if grammar is None else named(grammar, "plain")
        return with_thinking(made, opened, self.tags) if opened or thinks else made
