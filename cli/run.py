"""`numoe run`: one prompt, one answer; or a file of prompts, and an answer to each."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

import typer

from numoe.cli import arguments
from numoe.cli.config import options_of
from numoe.cli.config_file import table
from numoe.cli.fetch import fetch_missing
from numoe.cli.output import Output
from numoe.cli.reply import Aloud, Lines
from numoe.cli.settings import Options, in_group, takes
from numoe.cli.text import typed, whole_prompt
from numoe.quant.errors import WrongUsage


@takes(
    "model", "pull", "prompt", "prompt_file", "file", "prompt_cache", "template", "system", "raw", "continue_",
    "session", "tools", "tool_choice", "reasoning", "show_thinking", "form", "ending", "sampling", "room", "check",
    "json", "jsonl", "logprobs", "batch", "out", "parallel", "trace", "save", "log", "verbose", "quiet",
)  # fmt: skip
def run(
    model_argument: arguments.ModelOrDefault = None, prompt_argument: arguments.Prompt = None, *, options: Options
) -> None:
    """Answer one prompt, or a file of prompts.

    The prompt is what PROMPT, -p or --prompt-file gives; files and piped text come before it. With a prompt, standard
    input is read to its end unless it is a terminal; < /dev/null goes without. - as the prompt is standard input.
    Without any in a terminal, a chat begins.

    With a default model (`numoe config set model NAME`), -m or -c, MODEL may be left out. -c goes on with the last
    prompt and its answer, which are kept unless --no-save says otherwise.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 an answer of a given form was cut off before its end, 130 Ctrl-C,
    141 the reader of stdout left, 143 SIGTERM.

    Examples:
    numoe run tiny "What colour is a frog?"
    cat letter.txt | numoe run MODEL "Who wrote this?"
    numoe run MODEL --schema person.json -f letter.txt "Who wrote this?" | jq .name
    numoe run MODEL --batch questions.jsonl --out answers.jsonl
    numoe run OWNER/NAME --pull "What colour is a frog?"
    """
    if prompt_argument is None and model_argument is not None and _is_prompt(model_argument, options):
        model_argument, prompt_argument = None, model_argument
    given = (prompt_argument, options["prompt"], options["prompt_file"])
    _refuse_contradictions(options, prompted=any(text is not None for text in given))
    model = model_argument or arguments.meant(options["model"])
    if _opens_chat(options, given):
        from numoe.cli.chat.loop import converse

        converse(model, options_of("chat", options))
        return
    if model is None:
        model = _last_model(options)
    form = Lines if options["jsonl"] else Aloud if options["show_thinking"] else Output
    with ExitStack() as stack:
        output = stack.enter_context(form(options["quiet"]))
        text = "" if options["batch"] is not None else _prompt(given, options, output)
        output.status(f"loading {model}")
        from numoe.cli.asking import Asking
        from numoe.engine import describe

        if options["pull"]:
            fetch_missing(model, options, output)
        description = describe(model, check=options["check"])
        for told in description.tokenizer.notes:
            output.note(told)
        options.recommend(description.sampling)
        if options["verbose"]:
            output.note(_sampling(options, description.sampling))
        asking = Asking(model, description, options, output, stack)
        code = asking.batch() if options["batch"] is not None else asking.prompt(text)
    if code:
        raise typer.Exit(code)


def _is_prompt(text: str, options: Options) -> bool:
    """Whether what stands alone is no MODEL: another one is named, and this is none."""
    from numoe.engine.home import lookup
    from numoe.engine.hub.hub_id import is_hub_id

    if "model" in options.stated or options["continue_"]:
        return True
    if is_hub_id(text) or lookup(text) is not None:
        return False
    if options["model"] is None and " " in text:
        raise WrongUsage(
            "numoe run needs MODEL before a prompt; name one, or set a default with `numoe config set model`"
        )
    return options["model"] is not None


def _opens_chat(options: Options, given: tuple[str | None, ...]) -> bool:
    """Whether nothing is asked, and somebody is there to talk with."""
    other = ("file", "template", "batch", "json", "jsonl", "raw", "trace", "continue_", "session", "tools")
    asked = any(text is not None for text in given) or any(options[name] for name in (*other, *in_group("form")))
    return not asked and typed() and sys.stdout.isatty() and sys.stderr.isatty()


def _last_model(options: Options) -> str:
    """The model that -c goes on with. Raises WrongUsage where it is not asked for: there is no MODEL then."""
    from numoe.cli.history import read_last

    if not options["continue_"]:
        raise WrongUsage("numoe run needs MODEL; name one, or set a default with `numoe config set model NAME`")
    return read_last().model


def _prompt(given: tuple[str | None, str | None, str | None], options: Options, output: Output) -> str:
    """What is asked, put into its template."""
    name = options["template"]
    if name is None:
        return whole_prompt(*given, options["file"], output.note)
    templates = table("template")
    if name not in templates:
        raise WrongUsage(f'there is no template "{name}"; `numoe template` shows those that there are')
    place = "{input}"
    template = templates[name]
    text = whole_prompt(*given, options["file"], output.note, needed=place in template)
    return template.replace(place, text) if place in template else "\n\n".join(filter(None, (template, text)))


def _refuse_contradictions(options: Options, prompted: bool) -> None:
    """Raises WrongUsage where options exclude each other; `prompted`: the prompt is given by one of them."""
    batch = options["batch"] is not None
    if options["raw"] and (options["system"] is not None or options["session"] is not None or options["continue_"]):
        raise WrongUsage("--raw skips the template that --system, --session and -c need; write all into the prompt")
    if options["continue_"] and options["session"] is not None:
        raise WrongUsage("-c goes on with the last prompt and --session with a chat; give one of them")
    goes_on = options["session"] is not None or options["continue_"]
    if options["tools"] is not None and (options["raw"] or batch or goes_on):
        raise WrongUsage("--tools are for one prompt; leave out --raw, -c, --session and --batch")
    if options["tool_choice"] is not None and options["tools"] is None:
        raise WrongUsage("--tool-choice is of --tools; give those too")
    if options["json"] + options["jsonl"] + batch > 1:
        raise WrongUsage("--json, --jsonl and --batch each have a form of their own; choose one")
    if options["logprobs"] and not (options["json"] or options["jsonl"] or batch):
        raise WrongUsage("--logprobs are part of the JSON document; add --json")
    if sum(options[name] is not None for name in in_group("form")) > 1:
        raise WrongUsage("--schema, --choices and --regex are each the whole form; choose one")
    others = prompted or options["file"] or options["template"] is not None
    if batch and (others or options["session"] is not None or options["continue_"]):
        raise WrongUsage("--batch has the prompts in its file; leave out the others, --file, -t, -c and --session")
    if batch and (options["parallel"] or 1) > 1 and options["trace"] is not None:
        raise WrongUsage("--trace follows one sequence; leave out --parallel")
    if options["prompt_cache"] is not None and (batch or options["session"] is not None):
        raise WrongUsage("--prompt-cache is for one prompt; chats and batches read what they share once anyway")
    if "parallel" in options.stated and not batch:
        raise WrongUsage("--parallel is for the prompts of --batch; leave it out")
    if options["out"] is not None and not batch:
        raise WrongUsage("--out is for the answers of --batch; send this one on with >")


def _sampling(options: Options, own: dict[str, Any]) -> str:
    """How the answer is sampled: temp 0.6 (the model's own), top_p 1.0, seed 3 (as given)."""
    settings = {name: one for name, one in in_group("sampling").items() if options[name] is not None}
    why = {
        name: " (as given)" if name in options.chosen else " (the model's own)" * (one.field in own)
        for name, one in settings.items()
    }
    return "sampling: " + ", ".join(f"{name} {options[name]}{why[name]}" for name in settings)
