"""What OpenAI's three protocols have in common: errors, formats of answers, tools, and fields."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from numoe.cli.serve.fields import Field, Refused, read, refused
from numoe.cli.serve.question import tool_of

if TYPE_CHECKING:
    from numoe.engine.chat.tools.call import Use

_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
MOST_STOPS, MOST_BIASES = 64, 4096  # which are looked at after every token
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
NO_EFFECT = ("user", "safety_identifier", "prompt_cache_key")
"""Fields that change nothing of an answer, as OpenAI describes them."""
NOT_STORED = Field("store", (bool,), "answers are not kept", only=(False,))
PLAIN_TIER = Field("service_tier", (str,), "there is one", only=("auto", "default"))
LATER = refused("", "moderation", "prompt_cache_options", "prompt_cache_retention")


def error_document(error: Refused) -> dict[str, Any]:
    """What is wrong with a request, as OpenAI's API says it."""
    kind = _KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.field or None, "code": error.code or None}}


def new_id(prefix: str) -> str:
    """A new id of an object."""
    return f"{prefix}{secrets.token_hex(12)}"


def use_of(tools: Any, choice: Any, several: bool, *, flat: bool = False) -> Use | None:
    """Tools and how they are called; None: there are none, or none is to be called.

    flat: tools are described as in Responses, without an object `function`.

    Raises:
        Refused: something else is asked for.
    """
    from numoe.engine.chat.tools.call import Use

    made = []
    for number, tool in enumerate(tools or ()):
        where = f"tools[{number}]"
        if not isinstance(tool, dict) or tool.get("type") != "function":
            kind = tool.get("type") if isinstance(tool, dict) else tool
            raise Refused(400, f"{where} is of the type {kind!r:.40}; there are functions alone", where)
        if not flat:
            read((Field("type", (str,)), Field("function", (dict,), needed=True)), tool, f"{where}.")
        made.append(tool_of(tool if flat else tool["function"], where if flat else f"{where}.function"))
    if choice == "none":
        return None
    name = choice if choice is not None else "auto"
    if isinstance(choice, dict):
        function = choice if flat else choice.get("function")
        name = function.get("name") if choice.get("type") == "function" and isinstance(function, dict) else None
    if not isinstance(name, str) or (isinstance(choice, str) and choice not in ("auto", "required")):
        raise Refused(400, "tool_choice is none, auto, required or names a function", "tool_choice")
    if not made:
        if choice not in (None, "auto"):
            raise Refused(400, "tool_choice needs tools", "tool_choice")
        return None
    return Use(tuple(made), name, several)


def schema_of(form: Any, where: str, *, flat: bool = False) -> Any:
    """The JSON Schema that an answer has to have; None: any text.

    Raises:
        Refused: something else is asked for.
    """
    if form is None or form.get("type") == "text":
        return None
    if form.get("type") == "json_object":
        return {"type": "object"}
    if form.get("type") != "json_schema":
        raise Refused(400, f"{where}.type is text, json_object or json_schema", where)
    inner = form if flat else form.get("json_schema")
    fields = (Field("name", (str,)), Field("description", (str,)), Field("schema", (dict, bool), needed=True),
              Field("strict", (bool,)), Field("type", (str,)))  # fmt: skip
    return read(fields, inner, f"{where}." if flat else f"{where}.json_schema.")["schema"]


def stops(given: Any) -> tuple[str, ...]:
    """Stop strings, of which one may be given alone."""
    found = [given] if isinstance(given, str) else list(given or ())
    if len(found) > MOST_STOPS:
        raise Refused(400, f"there are {len(found)} stop strings; give up to {MOST_STOPS}", "stop")
    if not all(isinstance(one, str) and one for one in found):
        raise Refused(400, "stop takes a text or a list of texts, none of them empty", "stop")
    return tuple(found)


def biases(given: Any) -> Mapping[str, float]:
    """What is added to logits, by token ids.

    Raises:
        Refused: it is something else.
    """
    found: dict[str, Any] = given or {}
    if len(found) > MOST_BIASES:
        raise Refused(400, f"logit_bias has {len(found)} tokens; give up to {MOST_BIASES}", "logit_bias")
    for key, value in found.items():
        if not (
            key.isascii() and key.isdecimal() and len(key) < 10 and type(value) in (int, float) and -100 <= value <= 100
        ):
            raise Refused(400, "logit_bias takes numbers from -100 to 100 by token ids", "logit_bias")
    return found


def usage(prompt: int, reused: int, completion: int, thinking: int) -> dict[str, Any]:
    """Tokens of a request, as chat and completions tell them."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": reused},
        "completion_tokens_details": {"reasoning_tokens": thinking},
    }


def calls_of(given: Any, where: str) -> list[dict[str, Any]]:
    """Calls of an earlier answer.

    Raises:
        Refused: they are something else.
    """
    made = []
    for number, call in enumerate(given if isinstance(given, list) else [None]):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not all(isinstance(function.get(k), str) for k in ("name", "arguments")):
            raise Refused(400, f"{where}[{number}] is no call of a function with a name and arguments", where)
        made.append({"id": str(call.get("id") or ""), "type": "function", "function": function})
    return made


def total(made: Sequence[Any]) -> dict[str, Any]:
    """The usage of several answers to one prompt."""
    return usage(
        made[0].prompt_tokens,
        max(one.reused_tokens for one in made),
        sum(len(one.tokens) for one in made),
        sum(one.thinking_tokens for one in made),
    )
