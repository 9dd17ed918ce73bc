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
    r"""\{%-?\s*(?:if|elif|else)\b(?P<condition>[^%]*)%\}"""
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
    """The markers behind content that may be an assistant's, by the last condition on roles before it."""
    is_answer = True
    for part in _PARTS.finditer(template):
        condition, marker = part["condition"], part["marker"]
        if marker is None:
            is_answer = ("assistant" in condition or "model" in condition) if "role" in condition else is_answer
        elif is_answer:
            yield marker
