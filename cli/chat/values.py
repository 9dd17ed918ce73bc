"""The settings of a chat: what /set and /show tell of them, and how they are changed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from numoe.cli.chat.talk import Talk
from numoe.cli.output import printable
from numoe.cli.reply import NO_SWITCH
from numoe.cli.setting import May, Setting
from numoe.cli.settings import TAKEN, in_group, settings_in
from numoe.quant.errors import WrongUsage

_SETTINGS = settings_in(May.TALK)


class _Own(NamedTuple):
    """A setting that a chat changes in a way of its own: what it is now, what it does, and what changes it."""

    value: Callable[[Talk], str]
    help: str
    change: Callable[[Talk, str], None]


def change_system(talk: Talk, text: str) -> None:
    """Set the instructions; "" and none: there are none."""
    text = "" if text == "none" else text
    talk.change({"system": text or None})
    talk.output.note("The instructions are set." if text else "There are no instructions now.")


def change_thinking(talk: Talk, text: str) -> None:
    """Ask for reasoning, or not."""
    _require(text, "on", "off", named="think")
    talk.change({"think": text == "on"})
    said = f"Reasoning is {'asked for' if text == 'on' else 'not asked for'}."
    if not talk.conversation.session.model.description.chat_format.asks_for_reasoning:
        said += f" {NO_SWITCH} /think_budget 0 ends it at once."
    talk.output.note(said)


def _change_history(talk: Talk, text: str) -> None:
    _require(text, "on", "off", named="history")
    talk.keeps = text == "on"
    talk.output.note("What is said is kept." if talk.keeps else "What is said and typed from here on is not kept.")
    talk.keep()


def _require(text: str, *words: str, named: str) -> None:
    if text not in words:
        raise WrongUsage(f'{named} takes {" or ".join(words)}, not "{printable(text)[:60]}"')


def _on(switch: bool) -> str:
    return "on" if switch else "off"


_OWN: Mapping[str, _Own] = {
    "system": _Own(
        lambda talk: talk.conversation.chat.settings.system or "none", in_group("system")["system"].help, change_system
    ),
    "think": _Own(
        lambda talk: _on(talk.conversation.chat.settings.think), in_group("think")["think"].help, change_thinking
    ),
    "history": _Own(lambda talk: _on(talk.keeps), "Keep what is said and typed.", _change_history),
}
NAMES = (*_OWN, *_SETTINGS)
"""What /set takes."""


def meant(name: str) -> str | None:
    """The setting that a word means: by its name, that of its flag, or the engine's. None: none that a chat changes."""
    plain = name.lstrip("-").lower().replace("-", "_")
    if plain in _OWN:
        return plain
    return next((one.name for one in _SETTINGS.values() if plain in (one.name, one.field)), None)


def change(talk: Talk, text: str) -> None:
    """Do what /set says: NAME VALUE, NAME=VALUE; NAME tells of it, and nothing of all.

    Raises:
        InputError: there is no such setting, it cannot be changed in a chat, or not to that.
    """
    typed, value = re.fullmatch(r"([^\s=]*)(?:\s+=\s+|=|\s+)?(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    name, value = meant(typed), value.strip()
    if not text or (name and not value):
        talk.output.notes([_told(talk, one) for one in ([name] if name else NAMES)])
    elif name is None:
        raise _unknown(typed)
    elif name in _OWN:
        _OWN[name].change(talk, value)
    else:
        _change(talk, _SETTINGS[name], value)


def _change(talk: Talk, setting: Setting, text: str) -> None:
    value = setting.read(text, setting.name, none="none")
    if value is not None and not isinstance(value, tuple):
        setting.check(value, setting.name, text)
    talk.change({setting.name: value})
    talk.output.note(f"{setting.name} is {dict(values(talk))[setting.name]}.")


def _told(talk: Talk, name: str) -> tuple[str, str]:
    """A setting with its value, and what it does."""
    if name in _OWN:
        value = " ".join(_OWN[name].value(talk).split())
        return f"{name} {value if len(value) <= 20 else f'{value[:19]}…'}", _OWN[name].help
    setting = _SETTINGS[name]
    return f"{name} {dict(values(talk))[name]}", setting.help + setting.bounds


def _unknown(typed: str) -> WrongUsage:
    """What to say of a name that /set does not know."""
    plain = typed.lstrip("-").lower().replace("-", "_")
    setting = TAKEN["chat"].get(plain)
    if plain == "model":
        return WrongUsage("another model is chosen with /model NAME")
    if setting is not None:
        return WrongUsage(f"{setting.flag} is given where a chat begins; leave, and go on with numoe chat -c and that")
    return WrongUsage(f"there is no setting {printable(typed)[:40]}; there are {', '.join(NAMES)}")


def values(talk: Talk) -> list[tuple[str, str]]:
    """The settings of a chat that fill a field of the engine, and their values."""
    settings = talk.conversation.chat.settings
    fields = {**asdict(settings), **asdict(settings.sampling)}
    return [(name, _shown(fields[setting.field])) for name, setting in _SETTINGS.items()]


def _shown(value: Any) -> str:
    return (", ".join(value) or "none") if isinstance(value, (tuple, list)) else str(value).lower()
