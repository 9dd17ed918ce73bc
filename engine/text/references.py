"""Where the references of a JSON schema lead: to what is in it, and to an end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from numoe.quant.errors import InputError, shown

_MOST, _ROUNDS = 1000, 32
"""Places that are referred to, and how often all are looked at: each time a chain of them is followed on."""
_ELSEWHERE = ("const", "enum", "default", "examples")  # values, of which none is a schema


def refuse_endless(schema: Any, what: str) -> None:
    """Raises InputError for a schema that refers out of itself, or to itself so that no value ever ends; `what` begins
    the error."""
    root = schema if isinstance(schema, Mapping) else {}
    own = root.get("$id") if isinstance(root.get("$id"), str) else ""
    named = {one["$id"] for one in _schemas(root) if isinstance(one.get("$id"), str)}
    targets: dict[str, Any] = {}
    for one in _schemas(root):
        reference = one.get("$ref")
        if not isinstance(reference, str):
            continue
        place = reference.removeprefix(own) if own else reference
        if place in ("", "#") or place.startswith("#/"):
            targets[reference] = _at(root, place)
        elif not place.startswith("#") and not any(reference.startswith(name) for name in named):
            raise InputError(f"{what} cannot be used: $ref {shown(reference)} leads out of it; put that into $defs")
    if len(targets) > _MOST:
        raise InputError(f"{what} cannot be used: it refers to {len(targets)} places; give up to {_MOST}")
    ending: set[str] = set()
    order, known = list(targets), -1
    for _ in range(_ROUNDS):
        if len(ending) == known:
            break
        known = len(ending)
        order.reverse()  # chains may go either way
        ending.update(one for one in order if one not in ending and _ends(targets[one], ending, targets))
    if not _ends(root, ending, targets):
        endless = shown(min(targets.keys() - ending))
        raise InputError(
            f"{what} cannot be used: $ref {endless} leads to itself without an end; give it one, say anyOf with null"
        )


def _schemas(value: Any) -> Iterator[Mapping[str, Any]]:
    """Every object in a schema that may be one itself."""
    if isinstance(value, Mapping):
        yield value
        for key, inner in value.items():
            if key not in _ELSEWHERE or isinstance(inner, Mapping):
                yield from _schemas(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _schemas(inner)


def _at(root: Any, place: str) -> Any:
    """What a pointer leads to; True, which anything fits, where that is nothing: it is told elsewhere."""
    found = root
    for part in unquote(place).split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isdecimal() and len(name) < 10 and int(name) < len(found):
            found = found[int(name)]
        else:
            return True
    return found


def _ends(schema: Any, ending: set[str], targets: Mapping[str, Any]) -> bool:
    """Whether some value of a schema ends, where those do that are referred to by `ending`."""
    if not isinstance(schema, Mapping):
        return True

    def ends(inner: Any) -> bool:
        return _ends(inner, ending, targets)

    reference = schema.get("$ref")
    if isinstance(reference, str) and reference in targets and reference not in ending:
        return False
    if not all(map(ends, _listed(schema.get("allOf")))):
        return False
    if any(choices and not any(map(ends, choices)) for choices in (_listed(schema.get(k)) for k in ("anyOf", "oneOf"))):
        return False
    if schema.get("type") in ("object", ["object"]):
        known = schema.get("properties")
        needed = [one for one in _listed(schema.get("required")) if isinstance(one, str)]
        others = schema.get("additionalProperties", True)
        return all(ends(known.get(one, others) if isinstance(known, Mapping) else others) for one in needed)
    least = schema.get("minItems")
    if schema.get("type") in ("array", ["array"]) and isinstance(least, int):
        first = _listed(schema.get("prefixItems"))[:least]
        return all(map(ends, first)) and (len(first) == least or ends(schema.get("items", True)))
    return True


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
