"""Which tokens end an answer, beside those that a model's files name.

A chat template may end turns with a token that they do not name. A GGUF file names one where the model has several;
there the known ones count by their spelling (from llama.cpp's src/llama-vocab.cpp and further chat templates) if the
vocabulary marks them as control tokens. An ordinary token never is an end by its spelling: `</s>` is one in Qwen's.
"""

import re
from collections.abc import Iterable
from collections.abc import Set as AbstractSet

_SPELLED = """
</s> <eos> <|endoftext|> <|end_of_text|> <|eos|> <｜end▁of▁sentence｜> [EOS] <|im_end|> <|end|> <end_of_turn>
<|end_of_turn|> <|END_OF_TURN_TOKEN|> <|eot_id|> <|eom_id|> <|eot|> <|eom|> <EOT> _<EOT> <|EOT|> [EOT] <turn|>
<|tool_response> <end_of_utterance> [|endofturn|] <|role_end|> [e~[ <|return|> <|call|> <|calls|> <|flush|>
<|fim_pad|> <fim-pad> <fim_pad> <|fim_repo|> <fim-repo> <|repo_name|> <reponame> <REPO> <|file_sep|>
"""
_ENDS = frozenset(_SPELLED.split())
_MESSAGE_ENDS = ({"<|return|>", "<|call|>"}, {"<|calls|>", "<|flush|>"})  # beside these <|end|> ends a part of a turn

# A marker behind a message's content: as a string that is joined on, or as text behind an expression.
_BEHIND_CONTENT = re.compile(
    r"""\bcontent\b['"\])]*(?:\s*\|\s*trim)?\s*"""
    r"""(?:[+~]\s*['"]|-?\}\}\s*(?:\{\{-?\s*['"])?)(<[^<>\s'"]+>|\[[^\[\]\s'"]+\])"""
)
_BRANCH = re.compile(r"\{%-?\s*(?:if|elif|else)\b([^%]*)%\}")


def turn_ends(template: str | None, spelled: Iterable[str], control: AbstractSet[str] = frozenset()) -> set[str]:
    """The spellings that end an answer.

    Args:
        template: the chat template.
        spelled: tokens that it may end turns with.
        control: control tokens, which also count where it does not.
    """
    ends = set(control & _ENDS)
    if template is not None:
        behind = {found[1] for found in _BEHIND_CONTENT.finditer(template) if _is_assistants(template[: found.start()])}
        closing = {marker for marker in behind if marker in _ENDS or not marker.startswith(("</", "[/"))}
        ends |= {text for text in spelled if text in closing or (text in _ENDS and text in template)}
    if any(markers <= ends for markers in _MESSAGE_ENDS):
        ends.discard("<|end|>")
    return ends


def _is_assistants(before: str) -> bool:
    """Whether what comes next may be an assistant's, by the last condition on roles in a template's text before it."""
    conditions = [found[1] for found in _BRANCH.finditer(before)]
    about_roles = [text for text in conditions if "role" in text]
    return not about_roles or "assistant" in about_roles[-1] or "model" in about_roles[-1]
