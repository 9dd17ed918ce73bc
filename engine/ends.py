"""Which tokens end an answer, beside those that a model's files name.

Chat models end turns with more tokens than their files list. Known ones are taken by their spelling where the
vocabulary marks them as control tokens (the spellings are those of llama.cpp's src/llama-vocab.cpp and of further
chat templates), others where the chat template puts them behind an assistant's words. An ordinary token never is an
end by its spelling alone: `</s>` is one in Qwen's vocabulary.
"""

import re
from collections.abc import Iterable

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


def ends_in_template(template: str | None, spelled: Iterable[str]) -> set[str]:
    """Of these spellings, those that end turns in a chat template."""
    if template is None:
        return set()
    behind = {found[1] for found in _BEHIND_CONTENT.finditer(template) if _is_assistants(template[: found.start()])}
    closing = {marker for marker in behind if not marker.startswith(("</", "[/")) or marker in _ENDS}
    return {text for text in spelled if text in closing or (text in _ENDS and text in template)}


def _is_assistants(before: str) -> bool:
    """Whether what comes next may be an assistant's, by the last condition on roles in a template's text before it."""
    conditions = [found[1] for found in _BRANCH.finditer(before)]
    about_roles = [text for text in conditions if "role" in text]
    return not about_roles or "assistant" in about_roles[-1] or "model" in about_roles[-1]


def ends_of_vocabulary(control: Iterable[str], others: Iterable[str], template: str | None) -> set[str]:
    """The spellings that end an answer.

    Args:
        control: the texts of control tokens. others: of tokens that a template may use as such.
        template: the chat template.
    """
    control = set(control)
    ends = control & _ENDS | ends_in_template(template, control | set(others))
    if any(markers <= ends for markers in _MESSAGE_ENDS):
        ends.discard("<|end|>")
    return ends
