"""How repositories on the Hugging Face hub are called."""

from __future__ import annotations

import re

# As the hub has it: words joined by single signs, 96 characters at most for the owner and for the name.
_HUB_ID = re.compile(r"(?!.*(--|\.\.))(\b[\w.-]{1,96}\b)/(\b[\w.-]{1,96}\b)(?<!\.git)", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Whether a name has the form OWNER/NAME of a repository on the hub."""
    return _HUB_ID.fullmatch(name) is not None and not name.endswith(".gguf")
