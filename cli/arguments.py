"""What commands are given by place rather than by name: models and folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def models_here(incomplete: str) -> list[str]:
    """What a MODEL that begins so can be, for completion in shells: models by name, and folders and GGUF files."""
    from numoe.engine.home import TINY, models

    names = [TINY, *_table("alias"), *(one.repo_id for one in models() if one.complete)]
    start = incomplete.rpartition("/")[2]
    head = incomplete.removesuffix(start)
    beside = Path(head or ".").iterdir() if incomplete and Path(head or ".").is_dir() else ()
    paths = [f"{head}{path.name}{'/' * path.is_dir()}" for path in beside if path.name.startswith(start)]
    found = sorted(path for path in paths if path.endswith(("/", ".gguf")))
    return [*dict.fromkeys(name for name in names if name.startswith(incomplete)), *found]


def templates_here(incomplete: str) -> list[str]:
    """The templates whose names begin so."""
    return [name for name in _table("template") if name.startswith(incomplete)]


def meant(model: str | None) -> str | None:
    """The model that an alias stands for; other names are their own."""
    return None if model is None else _table("alias").get(model, model)


def _table(name: str) -> dict[str, str]:
    from numoe.cli.config_file import table

    return table(name)


def chats_here(incomplete: str) -> list[str]:
    """The kept chats whose names begin so."""
    from numoe.engine.chat.files import chats

    return [path.stem for path in chats() if path.stem.startswith(incomplete)]


def pulled_here(incomplete: str) -> list[str]:
    """The pulled models, finished or not, whose names begin so."""
    from numoe.engine.home import models

    return [one.name for one in models() if one.name.startswith(incomplete)]


_MODEL_HELP = "A model folder, a .gguf file, the name of a pulled model, or tiny, the one inside numoe."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP, autocompletion=models_here, callback=meant)]
_OR_DEFAULT_HELP = f"{_MODEL_HELP} Without it: the default."
ModelOrDefault = Annotated[
    str | None, typer.Argument(metavar="MODEL", help=_OR_DEFAULT_HELP, autocompletion=models_here, callback=meant)
]
_OR_LAST_HELP = f"{_MODEL_HELP} Without it: the default, else that of the last chat, else tiny."
ModelOrLast = Annotated[
    str | None, typer.Argument(metavar="MODEL", help=_OR_LAST_HELP, autocompletion=models_here, callback=meant)
]
Prompt = Annotated[str | None, typer.Argument(metavar="PROMPT", help="The prompt; - is what is piped in.")]
_HUB_HELP = "A hub id, such as deepseek-ai/DeepSeek-V4-Flash; OWNER/NAME:Q4_K_M is one of its GGUF files."
HubId = Annotated[str, typer.Argument(metavar="MODEL", help=_HUB_HELP, callback=meant)]
_PULLED_HELP = "The name of a pulled model, as `numoe list` shows it."
Pulled = Annotated[str, typer.Argument(metavar="MODEL", help=_PULLED_HELP, autocompletion=pulled_here, callback=meant)]
_SOURCE_HELP = "The model to convert: a folder of safetensors, or the name of a pulled model."
Source = Annotated[str, typer.Argument(metavar="MODEL", help=_SOURCE_HELP, autocompletion=models_here, callback=meant)]
Destination = Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to make; it must not exist yet.")]
File = Annotated[str, typer.Argument(metavar="FILE", help="A text in UTF-8; - reads what is piped in.")]
