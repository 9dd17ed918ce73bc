"""How repositories on the Hugging Face hub are called."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

# As the hub has it: words joined by single signs, 96 characters at most for the owner and for the name.
_HUB_ID = re.compile(r"(?!.*(--|\.\.))(\b[\w.-]{1,96}\b)/(\b[\w.-]{1,96}\b)(?<!\.git)", re.ASCII)
_HOSTS = {"hf.co", "huggingface.co", "www.huggingface.co", "hub:", "hf:"}


def is_hub_id(name: str) -> bool:
    """Whether a name has the form OWNER/NAME of a repository on the hub."""
    return _HUB_ID.fullmatch(name) is not None and not name.endswith(".gguf")


def named(text: str) -> tuple[str, str | None]:
    """A name as `parted` knows it, and the revision that is said with it, of an address of the hub.

    Such as https://huggingface.co/OWNER/NAME/tree/main, hf.co/OWNER/NAME or that of a GGUF file. What is no such
    address stays as it is.
    """
    scheme, host, path = _parts(text.strip())
    words = [unquote(word) for word in path.split("/") if word]
    if words[:1] == ["models"]:
        words = words[1:]
    if host.lower() not in _HOSTS or scheme not in ("", "http", "https") or len(words) < 2:
        return text, None
    name = f"{words[0]}/{words[1].removesuffix('.git')}"
    revision = words[3] if len(words) > 3 and words[2] in ("tree", "blob", "resolve", "commit") else None
    if revision and words[-1].lower().endswith(".gguf"):
        name += f":{'/'.join(words[4:])}"
    return name, revision


def _parts(text: str) -> tuple[str, str, str]:
    """Scheme, host and path of an address with or without a scheme."""
    if match := re.match(r"(hf|hub)://", text):
        return "", f"{match[1]}:", text[match.end() :]
    try:
        parts = urlsplit(text if "://" in text else f"//{text}")
    except ValueError:  # which names no host
        return "", "", ""
    return parts.scheme.lower(), parts.netloc, parts.path


def parted(name: str) -> tuple[str, str] | None:
    """OWNER/NAME and what a colon after it says of one of the repository's GGUF files, "" for nothing.

    None for a name that means no repository.
    """
    repo_id, colon, wanted = name.partition(":")
    return (repo_id, wanted) if is_hub_id(repo_id) and bool(colon) == bool(wanted) else None
