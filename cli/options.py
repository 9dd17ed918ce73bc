"""Every argument and option of the commands, declared once. Defaults that differ stand in the commands."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Recipe(StrEnum):
    """The keys of `numoe.quant.convert.recipe.RECIPES`, which takes NumPy to import."""

    INT8 = "int8"
    INT4 = "int4"
    NATIVE = "native"


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
ModelOrTiny = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP, autocompletion=models_here)]
_OR_LAST_HELP = f"{_MODEL_HELP} Without it: of the last chat, else tiny."
ModelOrLast = Annotated[str | None, typer.Argument(metavar="MODEL", help=_OR_LAST_HELP, autocompletion=models_here)]
PromptArgument = Annotated[str | None, typer.Argument(metavar="PROMPT", help="The prompt; - is what is piped in.")]

Prompt = Annotated[
    str | None, typer.Option("-p", "--prompt", metavar="TEXT", help="The prompt. Piped text comes before it.")
]
System = Annotated[
    str | None, typer.Option("-s", "--system", metavar="TEXT", help="Instructions that come before the conversation.")
]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")]
Think = Annotated[bool, typer.Option("--think/--no-think", help="Ask models that can for reasoning before the answer.")]
ThinkBudget = Annotated[
    int | None, typer.Option("--think-budget", metavar="N", min=0, help="Most tokens of reasoning; else until it ends.")
]

MaxTokens = Annotated[
    int | None,
    typer.Option("-n", "--max-tokens", metavar="N", min=0, help="Most tokens in an answer; else until it ends."),
]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", help="End the answer before this text. Can be repeated.")
]
Temperature = Annotated[
    float, typer.Option("--temp", metavar="X", min=0, help="Randomness; 0 takes the likeliest token.")
]
TopP = Annotated[
    float,
    typer.Option("--top-p", metavar="X", min=0, max=1, help="Keep the likeliest tokens up to this sum; 1 is off."),
]
TopK = Annotated[int, typer.Option("--top-k", metavar="N", min=0, help="Keep so many of the likeliest; 0 is off.")]
MinP = Annotated[
    float,
    typer.Option("--min-p", metavar="X", min=0, max=1, help="Keep tokens this likely beside the best; 0 is off."),
]
RepeatPenalty = Annotated[
    float, typer.Option("--repeat-penalty", metavar="X", min=0, help="Above 1 avoids repeats; 1 is off.")
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", min=0, help="The same seed gives the same text; else drawn each time."),
]
Logprobs = Annotated[
    int,
    typer.Option(
        "--logprobs", metavar="K", min=0, help="In JSON: log-probabilities of each token and of the K likeliest."
    ),
]

Context = Annotated[
    int | None,
    typer.Option("--ctx", metavar="N", min=1, help="Tokens of context; else 8192 or the model's limit, if lower."),
]
Ram = Annotated[
    str | None, typer.Option("--ram", metavar="SIZE", help="Memory to use at most, such as 16GB; else what is free.")
]
Threads = Annotated[
    int | None, typer.Option("--threads", metavar="N", min=1, max=1024, help="Cores to compute with; else all.")
]

Source = Annotated[str, typer.Argument(help="The model to convert: a folder of safetensors or a downloaded hub id.")]
Destination = Annotated[Path, typer.Argument(help="The folder to make; it must not exist yet.")]
Quant = Annotated[
    Recipe, typer.Option("--quant", help="int4 or int8 rounds the weights that are many; native keeps them as stored.")
]

Session = Annotated[
    str | None, typer.Option("--session", metavar="NAME", help="Go on with the chat of this name, or begin it.")
]
HubId = Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, such as deepseek-ai/DeepSeek-V4-Flash.")]
Keep = Annotated[bool, typer.Option("--keep", help="Keep the original files too, in the Hugging Face cache.")]
Revision = Annotated[
    str | None, typer.Option("--revision", metavar="R", help="A branch, tag or commit; else the main branch.")
]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Nothing but the answer, and errors.")]


def given(context: typer.Context, name: str) -> bool:
    """Whether an option was given rather than left at its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
