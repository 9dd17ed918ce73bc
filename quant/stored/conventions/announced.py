"""A quantization config, wherever it stands, and what is said where it asks for what numoe does not compute."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from numoe.quant.errors import InputError

_READ = (
    "fp8, nvfp4, mxfp4, int8 and int4 as compressed-tensors, ModelOpt, AutoAWQ, GPTQ, AutoRound, MLX, bitsandbytes and "
    "Quark write them, bf16, f16, f32 and GGUF"
)


@dataclass(frozen=True)
class Announced:
    """A table of a config and where it stands, such as "config.json: quantization_config"."""

    where: str
    values: Mapping[str, Any]

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """An entry of a type, or the default where there is none or null. Raises InputError for another type."""
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) is not kind:
            raise self.error(f'"{key}" must be {_KINDS[kind]}, not {value!r:.60}')
        return value

    def size(self, key: str, choices: Iterable[int] = (), default: int | None = None) -> int:
        """A positive integer, one of these if there are any."""
        value, choices = self.get(key, int, default), list(choices)
        if value is None or value < 1 or (choices and value not in choices):
            wanted = f"one of {', '.join(map(str, choices))}" if choices else "a positive integer"
            raise self.error(f'"{key}" must be {wanted}, not {self.values.get(key)!r:.60}')
        return int(value)

    def below(self, key: str) -> Announced:
        """A table inside; empty where there is none."""
        return Announced(f"{self.where}.{key}", self.get(key, dict, {}))

    def each(self, key: str) -> list[tuple[str, Announced]]:
        """The tables inside a table, by their names."""
        inner = self.below(key)
        return [(name, inner.below(name)) for name in inner.values]

    def only(self, *known: str) -> None:
        """Raises InputError where there is a key that none of these patterns is of, and that says anything."""
        for key, value in self.values.items():
            if value not in (None, False, "", [], {}) and not any(fnmatchcase(key, pattern) for pattern in known):
                raise self.error(f'"{key}" is not known: numoe cannot tell what it changes')

    def unsupported(self, name: str) -> InputError:
        """That weights are quantized in a way, by its name, that is not read."""
        return unsupported(self.where, name)

    def error(self, reason: str) -> InputError:
        return InputError(f"{self.where}: {reason}")


_KINDS: Mapping[type, str] = {int: "an integer", str: "a text", bool: "true or false", dict: "a table", list: "a list"}


def unsupported(where: str, name: str) -> InputError:
    """That weights are quantized in a way, by its name, that is not read."""
    return InputError(
        f'{where}: quantization "{name}" is not supported; numoe reads {_READ}: the BF16 or FP8 release of the same '
        "model runs"
    )
