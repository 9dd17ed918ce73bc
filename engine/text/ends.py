"""Which tokens end an answer, beside those that a model's files name.

A chat template may end turns with a token that they do not name. A GGUF file names one where the model has several;
there the known ones count by their spelling (from llama.cpp's src/llama-vocab.cpp and further chat templates) if the
vocabulary marks them as control tokens. An ordinary token never is an end by its spelling: `</s>` is one in Qwen's.
"""

import re
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet

_SPELLED = """
</s> <eos> <|endoftext|> <|end_of_text|> <|eos|> <｜end▁of▁sentence｜> [EOS] <|im_end|> <|end|> <end_of_turn>
<|end_of_turn|> <|END_OF_TURN_TOKEN|> <|eot_id|> <|eom_id|> <|eot|> <|eom|> <EOT> _<EOT> <|EOT|> [EOT] <turn|>
<|tool_response> <end_of_utterance> [|endofturn|] <|role_end|> [e~[ <|return|> <|call|> <|calls|> <|flush|>
<|fim_pad|> <fim-pad> <fim_pad> <|fim_repo|> <fim-repo> <|repo_name|> <reponame> <REPO> <|file_sep|>
"""
_ENDS = frozenset(_SPELLED.split())
_MESSAGE_ENDS = ({"<|return|>", "<|call|>"}, {"<|calls|>"})  # beside these <|end|> ends a part of a turn

# A condition of a template, or a marker behind a message's content: a string joined on, or text behind an expression.
_PARTS = re.compile(
    r"""\{%-?\s*(?P<word>if|elif|else|endif)\b(?P<condition>(?:[^%]|%(?!\}))*)%\}"""
    r"""|\bcontent\b['"\])]*(?:\s*\|\s*trim)?\s*(?:[+~]\s*['"]|-?\}\}\s*(?:\{\{-?\s*['"])?)"""
    r"""(?P<marker><[^<>\s'"]+>|\[[^\[\]\s'"]+\])"""
)
_SOUNDS_LIKE_ONE = re.compile(r"(?!</|\[/).*(end|eo[mst]|stop)", re.IGNORECASE)  # tool calls may come there, too


def turn_ends(template: str | None, spelled: Iterable[str], control: AbstractSet[str] = frozenset()) -> set[str]:
    """The spellings that end an answer.

    Args:
        template: the chat template.
        spelled: tokens that it may end turns with.
        control: control tokens, which also count where it does not.
    """
    ends = set(control & _ENDS)
    if template is not None:
        closing = {marker for marker in _behind_answers(template) if _SOUNDS_LIKE_ONE.match(marker)}
        ends |= {text for text in spelled if text in closing or (text in _ENDS and text in template)}
    if any(markers <= ends for markers in _MESSAGE_ENDS):
        ends.discard("<|end|>")
    return ends


def _behind_answers(template: str) -> Iterator[str]:
    """The markers behind content that may be an assistant's, by the conditions on roles around it."""
    is_answer = True
    around: list[tuple[bool, bool, bool]] = []  # of each condition: the answer before it, whether of roles, had one
    for part in _PARTS.finditer(template):
        word, condition = part["word"], part["condition"]
        if word is None:
            if is_answer:
                yield part["marker"]
            continue
        if word == "if":
            around.append((is_answer, False, False))
        if not around:  # the condition began in what is no Jinja
            continue
        before, of_roles, had_one = around[-1]
        if word == "endif":
            is_answer = before
            around.pop()
        elif "role" in condition:
            is_answer = "assistant" in condition or "model" in condition
            around[-1] = before, True, had_one or is_answer
        elif word != "if" and of_roles:  # the roles that no branch has named
            is_answer = before and not had_one
