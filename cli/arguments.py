"""What commands are given by place rather than by name: models and folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def models_here(incomplete: str) -> list[str]:
    """What a MODEL that begins so can be, for completion in shells: models by name, and folders and GGUF files."""
    from numoe.engine.home import TINY, models

    names = [TINY, *(one.repo_id for one in models() if one.complete)]
    start = incomplete.rpartition("/")[2]
    head = incomplete.removesuffix(start)
    beside = Path(head or ".").iterdir() if incomplete and Path(head or ".").is_dir() else ()
    paths = [f"{head}{path.name}{'/' * path.is_dir()}" for path in beside if path.name.startswith(start)]
    found = sorted(path for path in paths if path.endswith(("/", ".gguf")))
    return [*dict.fromkeys(name for name in names if name.startswith(incomplete)), *found]


_MODEL_HELP = "A model folder, a .gguf file, the name of a pulled model, or tiny, the one inside numoe."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP, autocompletion=models_here)]
_OR_LAST_HELP = f"{_MODEL_HELP} Without it: of the last chat, else tiny."
ModelOrLast = Annotated[str | None, typer.Argument(metavar="MODEL", help=_OR_LAST_HELP, autocompletion=models_here)]
Prompt = Annotated[str | None, typer.Argument(metavar="PROMPT", help="The prompt; - is what is piped in.")]
_HUB_ID_HELP = "A hub id, such as deepseek-ai/DeepSeek-V4-Flash; OWNER/NAME:Q4_K_M is one of its GGUF files."
HubId = Annotated[str, typer.Argument(metavar="MODEL", help=_HUB_ID_HELP)]
Pulled = Annotated[str, typer.Argument(metavar="MODEL", help="The name of a pulled model, as `numoe list` shows it.")]
Source = Annotated[str, typer.Argument(help="The model to convert: a folder of safetensors or a downloaded hub id.")]
Destination = Annotated[Path, typer.Argument(help="The folder to make; it must not exist yet.")]
File = Annotated[str, typer.Argument(metavar="FILE", help="A text in UTF-8; - reads what is piped in.")]
