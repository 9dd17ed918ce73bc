"""The fields of a protocol's requests, declared once: what is honoured and refused; the tables of the README here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numoe.cli.setting import Setting, number
from numoe.cli.settings import in_group

_WANTED = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


class Refused(Exception):
    """A request that is not answered. status: of HTTP. field: the one that is wrong, "" for none."""

    def __init__(self, status: int, message: str, field: str = "", code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.field, self.code = status, message, field, code


@dataclass(frozen=True)
class Field:
    """A field of a request.

    kinds: the types of its value in JSON; none: it is never taken. says: what becomes of it.
    only: the values that are taken, where others ask for what is not done. least, most: the bounds of a number.
    """

    name: str
    kinds: tuple[type, ...] = ()
    says: str = ""
    only: tuple[Any, ...] = ()
    least: float | None = None
    most: float | None = None
    needed: bool = False

    @property
    def told(self) -> str:
        """What that README says of it."""
        if not self.kinds:
            return f"refused{': ' + self.says if self.says else ''}"
        if self.only:
            taken = " or ".join(f"`{_json(value)}`" for value in self.only)
            return f"only {taken}{': ' + self.says if self.says else ''}"
        return self.says or "honoured"

    def check(self, value: Any) -> None:
        """Raises Refused for a value that is not taken."""
        if not self.kinds:
            raise Refused(400, f"{self.name} is not honoured here{'; ' + self.says if self.says else ''}", self.name)
        kinds = (*self.kinds, int) if float in self.kinds else self.kinds
        if type(value) not in kinds:
            wanted = " or ".join(_WANTED[kind] for kind in self.kinds)
            raise Refused(400, f"{self.name} takes {wanted}, not {_json(value):.80}", self.name)
        if self.only and value not in self.only:
            taken = " or ".join(map(_json, self.only))
            raise Refused(
                400, f"{self.name} {_json(value):.80} is not honoured here; give {taken} or leave it out", self.name
            )
        if self.least is None or isinstance(value, str | list | dict):
            return
        if value < self.least or (self.most is not None and value > self.most):
            bounds = f"from {number(self.least)} " + ("on" if self.most is None else f"to {number(self.most)}")
            raise Refused(400, f"{self.name} takes numbers {bounds}, not {_json(value):.80}", self.name)


def _json(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False, default=str)


def sampling_fields(*names: str) -> tuple[Field, ...]:
    """Those that settings of numoe's own are given by, as the engine calls them: all, or those of these names."""
    found = [setting for setting in in_group("sampling").values() if not names or setting.field in names]
    return tuple(_of_setting(setting) for setting in found)


def _of_setting(setting: Setting) -> Field:
    return Field(setting.field, (setting.kind,), "honoured", least=setting.least, most=setting.most)


def sampling_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Values of fields as values of numoe's settings."""
    return {name: given[one.field] for name, one in in_group("sampling").items() if one.field in given}


def refused(says: str, *names: str) -> tuple[Field, ...]:
    """Fields that are never taken; says: why, or what to do instead."""
    return tuple(Field(name, (), says) for name in names)


def harmless(*names: str, kind: type = str) -> tuple[Field, ...]:
    """Fields that by their own meaning change nothing of an answer."""
    return tuple(Field(name, (kind,), "taken; it changes nothing of an answer") for name in names)


def read(fields: Sequence[Field], body: Any, where: str = "") -> dict[str, Any]:
    """The values of an object's fields; what is null is not there, known or not. `where` goes before names in errors.

    Raises:
        Refused: a field is unknown, missing, or has a value that is not taken.
    """
    if not isinstance(body, dict):
        raise Refused(400, f"{where.rstrip('.') or 'the request'} is not a JSON object", where.rstrip("."))
    known = {field.name: field for field in fields}
    values = {}
    for name, value in body.items():
        if value is None:
            continue
        if name not in known:
            raise Refused(
                400, f"there is no field {where}{name:.80}; there are {', '.join(known)}", f"{where}{name:.80}"
            )
        try:
            known[name].check(value)
        except Refused as error:
            raise Refused(error.status, where + error.message, where + error.field) from None
        values[name] = value
    for field in fields:
        if field.needed and field.name not in values:
            raise Refused(400, f"{where}{field.name} is missing", f"{where}{field.name}")
    return values


def table(title: str, fields: Sequence[Field]) -> str:
    """The table of a protocol, as this folder's README has it."""
    rows = [f"| `{field.name}` | {field.told} |" for field in sorted(fields, key=lambda field: field.name)]
    return "\n".join([f"| {title} | |", "| --- | --- |", *rows])
