"""`numoe serve`: models for clients of OpenAI's and Anthropic's APIs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from numoe.cli import arguments
from numoe.cli.output import Output
from numoe.cli.settings import Options, takes
from numoe.cli.text import read_text
from numoe.quant.errors import InputError, WrongUsage


def _meant(models: list[str] | None) -> list[str]:
    """The models, with those that aliases stand for in their place."""
    return [arguments.meant(model) or model for model in models or ()]


_MODELS_HELP = "Models to serve, as for `run`. Without any: tiny and all that are pulled."
Models = Annotated[
    list[str] | None,
    typer.Argument(metavar="MODELS", help=_MODELS_HELP, autocompletion=arguments.models_here, callback=_meant),
]


@takes(
    "host", "port", "api_key", "origin", "parallel", "queue", "idle_unload", "timeout", "log_prompts", "fields",
    "system", "reasoning", "ending", "sampling", "ctx", "kv", "draft", "prompt_cache", "ram", "threads", "ray", "check",
    "save", "quiet",
    parallel=None,
)  # fmt: skip
def serve(models: Models = None, *, options: Options) -> None:
    """Answer clients of OpenAI's and Anthropic's APIs.

    One model is in memory at a time, loaded when it is asked for. Options say how it is answered where a request says
    nothing else. Needs pip install 'numoe[serve]'.

    Examples:
    numoe serve tiny
    numoe serve Qwen/Qwen3-30B-A3B --ram 16GB --port 8080
    numoe serve --fields
    """
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(f"{error.name} is missing, which serving needs; pip install 'numoe[serve]' gets it") from None
    from numoe.cli.serve.app import tables

    with Output(options["quiet"]) as output:
        if options["fields"]:
            output.answer(tables())
            output.end_answer()
            return
        _serve(models or [], options, output)


def _serve(models: list[str], options: Options, output: Output) -> None:
    from numoe.cli.batch import PARALLEL
    from numoe.cli.serve.app import App
    from numoe.cli.serve.guard import Guard, is_loopback
    from numoe.cli.serve.models import Hub, require_context, require_given, served
    from numoe.cli.serve.server import listening, server
    from numoe.engine.experts.cluster import connect
    from numoe.quant.compute.memory import share_free_memory

    share_free_memory()  # before the first thread, which would keep its own
    key, host = _key(options["api_key"]), options["host"]
    if not is_loopback(host) and not key:
        raise WrongUsage(f"{host} can be reached from other machines, so that an API key is needed; give `api_key`")
    names = served(models)
    require_context(models, options)
    for name, given in (("--prompt-cache", options["prompt_cache"]), ("--draft", options["draft"])):
        if given not in (None, "none") and len(names) > 1:
            raise WrongUsage(f"{name} is of one model; name the one to serve")
    require_given(next(iter(names.values())), options)
    if options["ray"] is not None:
        connect(options["ray"])  # in the main thread, whose signals Ray changes, and before anybody asks
    hub = Hub(names, options, options["idle_unload"], output.note)
    room = (options["parallel"] or PARALLEL) + options["queue"]
    prompts = output.note if options["log_prompts"] else None
    app = App(hub, Guard(host, key, options["origin"] or ()), room, options["timeout"], output.note, prompts)
    with listening(host, options["port"]) as listener:
        address = f"{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        name = next(iter(names))
        said = ' -H "Authorization: Bearer $KEY"' if key else ""
        output.note(
            f"Serving {', '.join(names)} at http://{address}/v1 until Ctrl-C. For example:\n"
            f"curl http://{address}/v1/chat/completions{said} -d "
            f"""'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'"""
        )
        server(app).run(sockets=[listener])


def _key(given: str | None) -> str:
    """An API key, or that in the file of this name with @ before it.

    Raises:
        InputError: the file cannot be read, or has none.
    """
    if given is None or not given.startswith("@"):
        return given or ""
    key = read_text(str(Path(given[1:]).expanduser())).strip()
    if not key or any(not c.isprintable() for c in key):
        raise InputError(f"{given[1:]} does not hold an API key; put one line of text there")
    return key
