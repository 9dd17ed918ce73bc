"""Chat templates of models, rendered by `template_process.py`, which has limits on time, memory and text."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any
from weakref import finalize

from numoe.engine.python import isolated
from numoe.quant.errors import InputError

_PATIENCE = 60.0  # seconds, of which a template computes one: the machine may have much else to do


class TemplateError(Exception):
    """A template is not valid, refuses, or takes more than it may. The text is the reason."""


class Renderer:
    """The process that renders templates: begun when first needed, and anew when one has ended it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def render(self, template: str, variables: Mapping[str, Any] | None) -> str:
        """What a template makes of variables that JSON has; of None, "" if it is valid.

        Raises:
            TemplateError: it makes nothing.
            InputError: no process can be begun.
        """
        try:
            asked = json.dumps({"template": template, "variables": variables})
        except RecursionError:
            raise TemplateError("what it is given is nested too deeply") from None
        with self._lock:
            answer = self._ask(asked)
        if "error" in answer:
            raise TemplateError(answer["error"])
        return answer["text"]

    def _ask(self, line: str) -> dict[str, str]:
        if self._process is None or self._process.poll() is not None:
            self._process = self._begun()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        watch = threading.Timer(_PATIENCE, process.kill)
        watch.start()
        try:
            with suppress(BrokenPipeError):  # it has ended, which the answer shows
                process.stdin.write(line + "\n")
                process.stdin.flush()
            said = process.stdout.readline()
        except BaseException:  # Ctrl-C: what is still to come is no answer to the next question
            self._end(process)
            raise
        finally:
            watch.cancel()
        if said.endswith("\n"):
            answer: dict[str, str] = json.loads(said)
            return answer
        self._end(process)
        slow = (-getattr(signal, "SIGPROF", 0), -getattr(signal, "SIGKILL", 0), 1)  # which the clock or `watch` sent
        return {"error": "it takes too long" if process.returncode in slow else "it brings Python down"}

    def _begun(self) -> subprocess.Popen[str]:
        program = Path(__file__).with_name("template_process.py")
        command = isolated(f"import runpy\nrunpy.run_path({str(program)!r}, run_name='__main__')")
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="ascii",
                cwd=program.parent,
            )
        except OSError as error:
            raise InputError(
                f"{command[0]} cannot be started to render the chat template ({error.strerror}); allow more processes, "
                "or go without it by `numoe run raw=true`"
            ) from error
        finalize(self, _end, process)
        return process

    def _end(self, process: subprocess.Popen[str]) -> None:
        self._process = None
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@cache
def renderer() -> Renderer:
    """That of this process."""
    return Renderer()
