"""Every setting of the commands, declared once: options, config.toml, NUMOE_*, batches and /set all follow from here.

A command names the settings that it takes, by groups or alone, and gets their values as `Options`:

    @takes("system", "sampling", "json", temp=0.6)
    def command(model: arguments.Model, options: Options) -> None: ...
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from numoe.cli.arguments import chats_here, models_here, templates_here
from numoe.cli.setting import SIZE, Background, May, Rows, Setting, recipe
from numoe.cli.text import read_count, read_schema, read_tools
from numoe.cli.usage import refuse_rest
from numoe.quant.convert.recipes import RECIPES

if TYPE_CHECKING:
    from numoe.engine.budget import Budget
    from numoe.engine.chat.answer import Settings


def _filling(name: str, kind: Any, help: str, group: str = "", field: str = "", **more: Any) -> Setting:
    """A setting that fills a field of the engine: of the same name, where no other is given."""
    return Setting(name, kind, help, group, field=field or name, **more)


def _sampling(name: str, kind: type, help: str, **more: Any) -> Setting:
    """A setting of how the next token is chosen, which can be given everywhere."""
    metavar = "X" if kind is float else "N"
    return _filling(name, kind, help, "sampling", metavar=metavar, may=May.ANYWHERE, **more)


SETTINGS: tuple[Setting, ...] = (
    # Who is asked, and what.
    Setting("model", str, "The model, where none stands before the prompt.", short="-m", metavar="MODEL",
            may=May.CONFIG, completes=models_here),
    Setting("pull", bool, "Download the model first, if it is not here and fits.", default=False),
    Setting("prompt", str, "The prompt. Piped text comes before it.", short="-p", metavar="TEXT"),
    Setting("prompt_file", str, "Read the prompt from a file; - is standard input.", metavar="FILE"),
    Setting("file", list[str], "Put a text file before the prompt. Can be repeated.", short="-f", metavar="FILE"),
    Setting("template", str, "Put the prompt into this one, see `numoe template`.", short="-t", metavar="NAME",
            completes=templates_here),
    Setting("batch", str, 'Answer each line of a file: {"prompt": TEXT} or {"messages": [...]}.', metavar="FILE"),
    Setting("prompt_cache", Path,
            "Keep what was read of the prompt in this file, and read that no more; chat and serve begin with it.",
            metavar="FILE"),
    Setting("session", str, "Go on with the chat of this name, or begin it.", metavar="NAME", completes=chats_here),
    Setting("continue_", bool, "Go on with the last one.", default=False, short="-c", long="--continue"),
    Setting("list", bool, "List the chats that are kept, and leave.", default=False),
    Setting("search", str, "List those in which this is said.", metavar="TEXT"),
    Setting("show", str, "Print what was said in the chat of this name, and leave.", metavar="NAME",
            completes=chats_here),
    Setting("tools", str, "Functions that the model may call, as OpenAI's API lists them; calls are printed as JSON.",
            metavar="FILE|JSON", parse=read_tools),
    Setting("tool_choice", str, "auto, required, or the name of the tool that is called.", metavar="NAME"),
    Setting("commands", bool, "Let the model ask for commands of [tools] in config.toml; you are asked each time.",
            default=False, long="--tools"),
    # How it is answered.
    _filling("system", str, "Instructions that come before the conversation.", short="-s", metavar="TEXT",
             may=May.CONFIG | May.LINE),
    _filling("think", bool, "Ask models that can for reasoning before the answer.", "reasoning", default=False,
             long="--think/--no-think", may=May.CONFIG | May.LINE),
    _filling("think_budget", int, "Most tokens of reasoning; else until it ends.", "reasoning", metavar="N", least=0,
             may=May.ANYWHERE),
    Setting("show_thinking", bool, "Print the reasoning too, between <think> and </think>.", default=False,
            may=May.CONFIG),
    _filling("max_tokens", int, "Most tokens in an answer; else until it ends.", "ending", short="-n", metavar="N",
             least=0, may=May.ANYWHERE),
    _filling("stop", list[str], "End the answer before this text. Can be repeated.", "ending", metavar="TEXT",
             may=May.LINE | May.TALK),
    _sampling("temp", float, "Randomness; 0 takes the likeliest token.", default=0.0, least=0, most=10**6,
              field="temperature"),
    _sampling("top_p", float, "Keep the likeliest tokens up to this sum; 1 is off.", default=1.0, least=0, most=1),
    _sampling("top_k", int, "Keep so many of the likeliest; 0 is off.", default=0, least=0),
    _sampling("min_p", float, "Keep tokens this likely beside the best; 0 is off.", default=0.0, least=0, most=1),
    _sampling("repeat_penalty", float, "Above 1 avoids repeats; 1 is off.", default=1.0, least=1e-3, most=1000,
              field="repetition_penalty"),
    _sampling("presence_penalty", float, "Taken from the logits of tokens that the answer has; 0 is off.", default=0.0,
              least=-2, most=2),
    _sampling("frequency_penalty", float, "The same, as often as the answer has them; 0 is off.", default=0.0,
              least=-2, most=2),
    _sampling("seed", int, "The same seed gives the same text; else drawn each time.", least=0,
              most=2**63 - 1),
    Setting("schema", str, "The answer is JSON that this JSON Schema accepts.", "form", metavar="FILE|JSON",
            may=May.LINE, parse=read_schema, json=(dict, bool)),
    Setting("choices", str, "The answer is one of these texts, cut at the commas.", "form", metavar="A,B,C",
            may=May.LINE, parse=lambda text: [choice.strip() for choice in text.split(",")], json=(list,)),
    Setting("regex", str, "The answer matches this regular expression as a whole.", "form", metavar="R", may=May.LINE),
    Setting("raw", bool, "Continue the prompt as it is, without the chat template.", default=False),
    Setting("logprobs", int, "In JSON: log-probabilities of each token and of the K likeliest.", "", 0, "K", least=0,
            may=May.LINE),
    # What the model gets of the machine.
    _filling("ctx", int, "Tokens of context, such as 32k or 1M; else 8192 or the model's limit, if lower.", "room",
             metavar="N", least=1, field="context", may=May.CONFIG | May.TALK, scan=read_count),
    Setting("kv", Rows, "How what is remembered of tokens is held: exactly, or as int8 in a third of the memory.",
            "room", Rows.FLOAT32, may=May.CONFIG),
    Setting("draft", str, "Have this small model guess ahead for a large one of its vocabulary; none: guess nothing.",
            "room", metavar="MODEL", may=May.CONFIG),
    Setting("ram", str, "Memory to use at most, such as 16GB; else what is free.", "room", metavar=SIZE,
            may=May.CONFIG),
    Setting("threads", int, "Cores to compute with; else all.", "room", metavar="N", least=1, most=1024,
            may=May.CONFIG),
    Setting("ray", str, "Have the nodes of a Ray cluster hold and compute experts, of the one with this head; alone: "
            "one of this machine.", "room", metavar="ADDRESS", may=May.CONFIG),
    Setting("check", bool, "Compare every byte of the model that is read with its hash.", default=False,
            may=May.CONFIG),
    Setting("read_gb_s", float, "Reckon with a disk that reads X GB a second.", metavar="X", least=0.001),
    Setting("cores", int, "Reckon with N such cores.", metavar="N", least=1),
    Setting("nodes", str, "Reckon with machines that share the experts, the one that runs numoe first: 4x64GB or "
            "1x128GB,3x64GB.", metavar="NxSIZE"),
    Setting("link", str, "The network between them, such as 10Gbit.", default="1Gbit", metavar="RATE"),
    Setting("measure", bool, "Measure this machine anew.", default=False),
    Setting("chart", str, "Draw memory and speed, over memory and context; on the screen with -, or into a file "
            "(.svg, .png).", metavar="FILE"),
    # Models on the disk.
    Setting("quant", str, "int4 or int8 rounds the weights that are many; native keeps them as stored. Or by role: "
            "experts=int4,attention=int8", default=..., metavar="RECIPE", may=May.CONFIG, parse=recipe,
            completes=lambda incomplete: list(RECIPES)),
    Setting("calibrate", str, "For int4: spare the weights that matter for this text.", metavar="FILE"),
    Setting("keep", bool, "Keep the original files too, in the Hugging Face cache.", default=False),
    Setting("connections", int, "Connections over which a file is downloaded at once; default 4.", metavar="N", least=1,
            most=16, may=May.CONFIG),
    Setting("revision", str, "A branch, tag or commit; else the main branch.", metavar="R"),
    Setting("repair", bool, "Remove damaged files, so that `numoe pull` gets these and no others anew.", default=False),
    Setting("yes", bool, "Do not ask.", default=False, short="-y"),
    # Who is served.
    Setting("host", str, "Address to listen on; others than this machine need --api-key.", default="127.0.0.1",
            metavar="ADDRESS", may=May.CONFIG),
    Setting("port", int, "Port to listen on; 0 takes a free one.", default=11545, metavar="N", least=0, most=65535,
            may=May.CONFIG),
    Setting("api_key", str, "What clients must know; @FILE reads it from a file.", metavar="KEY", may=May.CONFIG,
            secret=True),
    Setting("origin", list[str], "Let web pages of this origin ask; * is any. Can be repeated.", metavar="ORIGIN"),
    Setting("queue", int, "Questions that may wait; those beyond are refused.", default=64, metavar="N", least=0,
            may=May.CONFIG),
    Setting("idle_unload", float, "Unload a model that nobody has asked for so many seconds.", metavar="S", least=1,
            may=May.CONFIG),
    Setting("timeout", float, "Cut an answer off after so many seconds.", default=3600.0, metavar="S", least=1,
            may=May.CONFIG),
    Setting("log_prompts", bool, "Write what is asked to the log.", default=False),
    Setting("fields", bool, "Print what becomes of every field of a request, and leave.", default=False),
    # What is measured.
    Setting("decode_tokens", int, "Tokens to decode.", "speed", 32, "N", short="-n", long="--max-tokens", least=1),
    Setting("prompt_tokens", int, "Tokens to read before them.", "speed", 512, "N", least=1),
    Setting("repetitions", int, "Runs; the figures are their medians.", "speed", 3, "N", least=1),
    Setting("replay", Path, "Only tell how caches would have done on the trace of a run.", metavar="FILE"),
    Setting("against", str, "Compare with this model: KL divergence, top-1 agreement.", metavar="MODEL2",
            completes=models_here),
    Setting("window", int, "Tokens read at once; else 2048 or the model's limit, if lower.", metavar="N", least=2),
    Setting("stride", int, "Tokens from one window to the next; else half a window.", metavar="N", least=1),
    Setting("results", int, "At most so many repositories.", default=20, metavar="N", long="--limit", least=1,
            most=100),
    Setting("limit", int, "Read only so many tokens of the text.", metavar="N", least=1),
    # What is shown, and where it goes.
    Setting("plain", bool, "Show answers as the model writes them, not as Markdown.", default=False, may=May.CONFIG),
    Setting("theme", Background, "Colours for a dark or a light background; auto asks the terminal.",
            default=Background.AUTO, metavar="|".join(Background), may=May.CONFIG,
            completes=lambda incomplete: list(Background)),
    Setting("verbose", bool, "Tell how the answer is sampled, and what that follows from.", default=False),
    Setting("save", bool, "Keep what is said, to go on with it.", default=True, long="--save/--no-save",
            may=May.CONFIG),
    Setting("log", bool, "Keep prompts and answers for `numoe logs`.", default=False, long="--log/--no-log",
            may=May.CONFIG),
    Setting("last", int, "So many at most.", default=10, short="-n", metavar="N", least=1),
    Setting("json", bool, "Print one JSON document.", default=False),
    Setting("jsonl", bool, "Print one JSON line a piece as it comes; the last is the document of --json.",
            default=False),
    Setting("out", Path, "With --batch: add the answers that this file lacks, one line each.", metavar="FILE"),
    Setting("parallel", int, "Answer so many at once, as far as memory goes; default 16, of a batch up to 64.",
            metavar="N", least=1, most=256, may=May.CONFIG),
    Setting("trace", Path, "Write which experts each token takes, for bench --replay.", metavar="FILE"),
    Setting("quiet", bool, "Nothing but the answer, and errors.", default=False, short="-q", may=May.CONFIG),
)  # fmt: skip
"""In the order in which `numoe config` and /set list them."""


def settings_in(place: May) -> dict[str, Setting]:
    """The settings that can be given there too, by name."""
    return {setting.name: setting for setting in SETTINGS if place in setting.may}


def in_group(name: str) -> dict[str, Setting]:
    """The settings of a group, by name, or the one that is called so itself. Raises KeyError when there are none."""
    found = {setting.name: setting for setting in SETTINGS if name in (setting.group, setting.name)}
    if not found:
        raise KeyError(name)
    return found


class Options(dict[str, Any]):
    """The values of the settings that a command takes, by name."""

    stated: Mapping[str, Any] = {}
    """Those that the command line gives itself."""
    chosen: Mapping[str, Any] = {}
    """Those that the user gives in any way: also by config.toml and NUMOE_*."""

    @property
    def memory(self) -> Budget:
        """What `ram` leaves to models: numoe's process takes of it too, as nothing else runs there."""
        from numoe.engine.budget import Budget
        from numoe.engine.measure.machine import process_bytes

        return Budget(self["ram"], process_bytes())

    @property
    def loading(self) -> dict[str, Any]:
        """What `numoe.engine.load` is given of these by their own names."""
        return {name: self[name] for name in ("threads", "kv", "ray")}

    def recommend(self, own: Mapping[str, Any]) -> None:
        """Sample as a model's authors recommend, by fields of `Sampling`, where the user says nothing else."""
        from numoe.engine import Sampling

        for name, setting in in_group("sampling").items() if own else ():
            if name not in self.chosen and name != "seed":
                self[name] = own.get(setting.field, getattr(Sampling(), setting.field))


TAKEN: dict[str, dict[str, Setting]] = {}
"""The settings that commands take, by the names of their functions."""


def takes(*names: str, **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator for a command that takes these settings, beside arguments that its signature has.

    names: of settings or groups, in the order of --help. defaults: those that are other than declared.
    The command gets the values as `options`.
    """
    taken = {name: setting for one in names for name, setting in in_group(one).items()}
    taken |= {name: replace(taken[name], default=default) for name, default in defaults.items()}

    def made(command: Callable[..., None]) -> Callable[..., None]:
        TAKEN[command.__name__] = taken
        signature = inspect.signature(command, eval_str=True)
        own = {name: parameter for name, parameter in signature.parameters.items() if name != "options"}

        @functools.wraps(command)
        def call(context: typer.Context, **values: Any) -> None:
            refuse_rest(context)
            options = Options({name: setting.value(values[name]) for name, setting in taken.items()})
            options.stated = {name: value for name, value in options.items() if _source(context, name) == "COMMANDLINE"}
            given = ("COMMANDLINE", "DEFAULT_MAP")
            options.chosen = {name: value for name, value in options.items() if _source(context, name) in given}
            command(**{name: values[name] for name in own}, options=options)

        first = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        rest = [setting.parameter for setting in taken.values()]
        call.__annotations__ = {}
        call.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[first, *own.values(), *rest]
        )
        return call

    return made


def _source(context: typer.Context, name: str) -> str:
    source = context.get_parameter_source(name)
    return "" if source is None else source.name


def filled(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """The engine's settings with these values, by names of ours; those that fill no field are passed over.

    Raises:
        InputError: a value is out of range.
    """
    from numoe.engine import Sampling

    named = {setting.field: values[setting.name] for setting in SETTINGS if setting.field and setting.name in values}
    sampling = {field.name: named.pop(field.name) for field in fields(Sampling) if field.name in named}
    return replace(settings, sampling=replace(settings.sampling, **sampling), **named)


_BARE = {
    "--chart": ("-", re.compile(r"-|.+\.(?!gguf)[a-z]{2,4}", re.IGNORECASE)),
    "--ray": ("local", re.compile(r"local|auto|ray://\S+|[^\s/]+:\d+|\d+(\.\d+){3}")),
}
"""Options that need no value: what they mean then, and what is one where it follows."""


def with_bare(args: Sequence[str]) -> list[str]:
    """A command line in which `_BARE` options have their values: Typer's have one or none."""
    made: list[str] = []
    for number, arg in enumerate(args):
        if arg == "--":
            return [*made, *args[number:]]
        made.append(arg)
        following = args[number + 1] if number + 1 < len(args) else ""
        if arg in _BARE and not _BARE[arg][1].fullmatch(following):
            made.append(_BARE[arg][0])
    return made


def spelled(message: str, names: Mapping[str, str] | None = None) -> str:
    """What the engine says, with settings as they are given where it is read: by their flags.

    The engine writes `ctx`, and `numoe pull NAME quant=int8` or `numoe run raw=true` where a command is the next step.

    names: how to spell those that are given in another way, commands among them.
    """
    flags = {name: setting.flag for setting in SETTINGS for name in (setting.field, setting.name) if name}
    alone = flags | dict(names or {})

    def given(found: re.Match[str]) -> str:
        flag, value = flags.get(found[1]), found[2]
        return found[0] if flag is None else f" {flag}" if value == "true" else f" {flag} {value}"

    def quoted(found: re.Match[str]) -> str:
        if found[1].startswith("numoe "):
            if found[1] in alone:
                return alone[found[1]]
            return re.sub(r" (\w+)=([^\s`]+)", given, found[0])
        return alone.get(found[1], found[0])

    return re.sub("`([^`]*)`", quoted, message)
