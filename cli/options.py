"""Every argument and option of the commands, declared once. Defaults that differ stand in the commands."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A model folder, a .gguf file or the hub id of a downloaded model."),
]
PromptArgument = Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="The prompt; -p does the same.")]

Prompt = Annotated[str | None, typer.Option("-p", "--prompt", help="The prompt. Piped text is put after it.")]
System = Annotated[str | None, typer.Option("-s", "--system", help="Instructions that come before the conversation.")]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")]
Think = Annotated[bool, typer.Option("--think/--no-think", help="Ask models that can for reasoning before the answer.")]

MaxTokens = Annotated[
    int | None, typer.Option("-n", "--max-tokens", min=0, help="Most tokens in an answer; else until it ends.")
]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="End the answer before this text. Can be repeated.")]
Temperature = Annotated[float, typer.Option("--temp", min=0, help="Randomness; 0 takes the likeliest token.")]
TopP = Annotated[
    float, typer.Option("--top-p", min=0, max=1, help="Keep the likeliest tokens up to this sum; 1 is off.")
]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Keep so many of the likeliest tokens; 0 is off.")]
MinP = Annotated[
    float,
    typer.Option("--min-p", min=0, max=1, help="Keep tokens at least this likely, the likeliest being 1; 0 is off."),
]
RepeatPenalty = Annotated[float, typer.Option("--repeat-penalty", min=0, help="Above 1 avoids repeats; 1 is off.")]
Seed = Annotated[
    int | None, typer.Option("--seed", min=0, help="The same seed gives the same text; else drawn each time.")
]
Logprobs = Annotated[
    int, typer.Option("--logprobs", min=0, help="With --json: log-probabilities of each token and so many others.")
]

Context = Annotated[
    int | None, typer.Option("--ctx", min=1, help="Tokens of context; else 8192 or the model's limit, if lower.")
]
Ram = Annotated[
    str | None, typer.Option("--ram", metavar="SIZE", help="Memory to use at most, such as 16GB; else what is free.")
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads to compute with; else all cores.")]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Nothing but the answer, and errors.")]
