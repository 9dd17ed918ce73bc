"""Every argument and option of the commands, declared once. Defaults that differ stand in the commands."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Recipe(StrEnum):
    """The keys of `numoe.quant.recipe.RECIPES`, which takes NumPy to import."""

    INT8 = "int8"
    INT4 = "int4"
    NATIVE = "native"


_MODEL_HELP = "A model folder, a .gguf file, the hub id of a downloaded model, or tiny, the one inside numoe."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP)]
ModelOrTiny = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP)]
PromptArgument = Annotated[str | None, typer.Argument(metavar="PROMPT", help="The prompt; -p does the same.")]

Prompt = Annotated[
    str | None, typer.Option("-p", "--prompt", metavar="TEXT", help="The prompt. Piped text is put after it.")
]
System = Annotated[
    str | None, typer.Option("-s", "--system", metavar="TEXT", help="Instructions that come before the conversation.")
]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")]
Think = Annotated[bool, typer.Option("--think/--no-think", help="Ask models that can for reasoning before the answer.")]

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
        "--logprobs", metavar="N", min=0, help="With --json: log-probabilities of each token and its N rivals."
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
    int | None, typer.Option("--threads", metavar="N", min=1, help="Threads to compute with; else all cores.")
]

Source = Annotated[str, typer.Argument(help="The model to convert: a folder of safetensors or a downloaded hub id.")]
Destination = Annotated[Path, typer.Argument(help="The folder to make; it must not exist yet.")]
Quant = Annotated[
    Recipe, typer.Option("--quant", help="int4 or int8 rounds the weights that are many; native keeps them as stored.")
]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Nothing but the answer, and errors.")]
