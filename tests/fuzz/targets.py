"""Every reader of what others wrote, with samples of what it reads and a way to damage them.

A target gives a result or raises InputError; everything else is a fault of ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tiny
from fuzz.clients import readers
from fuzz.mutate import Mutator, changed, damaged, either, lines
from gguf_files import write_gguf
from helpers import tiny_tokenizer
from machines import a_machine, keep

from numoe.cli import config as settings_file
from numoe.cli.batch import _KEYED, read_batch
from numoe.cli.settings import SETTINGS
from numoe.engine import load
from numoe.engine.chat.answer import Turn
from numoe.engine.chat.files import Chat
from numoe.engine.chat.formats import deepseek_v4, harmony, jinja
from numoe.engine.description import _read, describe
from numoe.engine.families import from_gguf
from numoe.engine.hub.repository import _listing
from numoe.engine.measure import machine
from numoe.engine.measure.replay import read_trace
from numoe.engine.text.grammar import choice_grammar, json_grammar, regex_grammar
from numoe.engine.text.tokenizer import gguf_tokenizer, load_tokenizer
from numoe.quant.documents import parse_json
from numoe.quant.files import Files
from numoe.quant.stored.checkpoint import open_checkpoint
from numoe.quant.stored.gguf import read_gguf
from numoe.quant.stored.manifest import read_manifest
from numoe.quant.stored.safetensors import read_header
from numoe.quant.stored.shards import distant_header, parse_index

TESTS = Path(__file__).parent.parent
TINY = TESTS.parent / "engine" / "tiny"
RELEASED = sorted(path for path in (TESTS / "configs").glob("*.json") if "NVFP4" not in path.name)


@dataclass(frozen=True)
class Target:
    """A reader.

    name: what it reads. seeds: samples that it reads well. read: reads one. mutate: damages one.
    """

    name: str
    seeds: Sequence[bytes]
    read: Callable[[bytes], Any]
    mutate: Mutator = damaged


_document = either(changed, changed, damaged)


def targets(folder: Path) -> list[Target]:
    """All of them; `folder` is empty and theirs, and NUMOE_HOME below it."""
    made = [*_models(folder), *_vocabularies(folder), *_chats(folder), *_own(folder), *_elsewhere()]
    made += [Target(*one) for one in readers()]
    assert len({one.name for one in made}) == len(made)
    return made


def _in_file(folder: Path, name: str, read: Callable[[Path], Any]) -> Callable[[bytes], Any]:
    """A reader of a file by this name."""

    def written(data: bytes) -> Any:
        (folder / name).write_bytes(data)
        return read(folder / name)

    return written


def _models(folder: Path) -> list[Target]:
    golden = tiny.load_golden("qwen3_moe_a")
    checkpoint = tiny.write_checkpoint("qwen3_moe_a", folder / "checkpoint")
    shard = next(checkpoint.glob("*.safetensors"))
    gguf = write_gguf(checkpoint, golden.config, folder / "model.gguf", "qwen3moe")
    small = gguf.read_bytes()
    metadata, shapes = _gguf_keys(gguf)
    configs = [json.dumps(tiny.load_golden(case).config).encode() for case in tiny.cases()]
    configs += [path.read_bytes() for path in RELEASED]
    end = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": {"a": "x.safetensors", "b": "y.safetensors"}})
    return [
        Target("safetensors", [shard.read_bytes()], _in_file(folder, "x.safetensors", read_header)),
        Target("safetensors header", [shard.read_bytes()[:end]], partial(_header, size=shard.stat().st_size),
               either(damaged, _with_length)),
        Target("index", [index.encode()], lambda data: parse_index(data, Path("index")), _document),
        Target("gguf", [small], _in_file(folder, "x.gguf", _gguf)),
        Target("gguf keys", [json.dumps(metadata).encode()], lambda data: _gguf_spec(data, shapes), changed),
        Target("config.json", configs, _spec, changed),
        Target("model folder", [(checkpoint / "config.json").read_bytes()],
               _in_file(checkpoint, "config.json", lambda path: describe(path.parent).plan()), _document),
    ]  # fmt: skip


def _header(data: bytes, size: int) -> Any:
    return distant_header(lambda start, stop: data[start:stop], Path("x.safetensors"), size)


def _with_length(random: Any, data: bytes) -> bytes:
    made = changed(random, data[8:])
    return len(made).to_bytes(8, "little") + made


def _gguf(path: Path) -> Any:
    tensors, metadata = read_gguf(path, Files())
    open_checkpoint(path)
    return tensors, dict(metadata)


def _gguf_keys(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    checkpoint = open_checkpoint(path)
    return dict(checkpoint.metadata), {name: checkpoint[name].shape for name in checkpoint.names()}


def _gguf_spec(data: bytes, shapes: dict[str, tuple[int, ...]]) -> Any:
    value = parse_json(data, "x")
    return from_gguf(value if isinstance(value, dict) else {}, shapes, None, Path("x.gguf"))


def _spec(data: bytes) -> Any:
    value = parse_json(data, "config.json")
    kind, spec, _ = _read(value if isinstance(value, dict) else {}, None)
    return kind, spec.context


def _vocabularies(folder: Path) -> list[Target]:
    made = folder / "vocabulary"
    made.mkdir()
    tiny_tokenizer(made, 120)
    small = (made / "tokenizer.json").read_bytes()
    beside = (made / "tokenizer_config.json").read_bytes()
    config = json.loads(beside) | {
        "eos_token": {"content": "</s>"},
        "additional_special_tokens": ["</s>"],
        "add_bos_token": True,
        "tokenizer_class": "LlamaTokenizer",
        "added_tokens_decoder": {"2": {"content": "</s>", "special": True}},
    }
    generation = json.dumps({"eos_token_id": [2, 1]}).encode()
    models = folder / "sentencepiece"
    models.mkdir()
    spm = [path.read_bytes() for path in (TESTS / "golden").glob("sentencepiece_*.model")]
    gguf = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.tokens": ["a", "b", "ab", "</s>"], "tokenizer.ggml.token_type": [1, 1, 1, 3],
        "tokenizer.ggml.eos_token_id": 3, "tokenizer.ggml.bos_token_id": 3, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages }}", "tokenizer.ggml.eos_token_ids": [3],
    }  # fmt: skip
    llama = gguf | {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0, -1.0, -2.0, 0.0]}

    def tokenizer(name: str, good: bytes, folder: Path = made) -> Callable[[bytes], Any]:
        def read(data: bytes) -> Any:
            (folder / name).write_bytes(data)
            try:
                return _used(load_tokenizer(folder))
            finally:
                (folder / name).write_bytes(good)

        return read

    return [
        Target("tokenizer.json", [small], tokenizer("tokenizer.json", small), either(changed, changed, damaged)),
        Target("tokenizer_config.json", [json.dumps(config).encode()], tokenizer("tokenizer_config.json", beside),
               _document),
        Target("generation_config.json", [generation], tokenizer("generation_config.json", generation), _document),
        Target("tokenizer.model", spm, tokenizer("tokenizer.model", spm[0], models)),
        Target("gguf vocabulary", [json.dumps(one).encode() for one in (gguf, llama)],
               lambda data: _used(gguf_tokenizer(_object(data))), changed),
    ]  # fmt: skip


def _object(data: bytes) -> dict[str, Any]:
    value = parse_json(data, "x")
    return value if isinstance(value, dict) else {}


def _used(tokenizer: Any) -> Any:
    """It is to fail when it is read, and not later."""
    ids = tokenizer.encode("It's 12 <|im_start|> o'clock. </s>\n" + "ab " * 20, special=False, begins=True)
    tokenizer.marker_variants("ab")
    return tokenizer.decode(ids), tokenizer.vocab_size, [tokenizer.token_bytes(i) for i in sorted(tokenizer.eos_ids)]


def _chats(folder: Path) -> list[Target]:
    templates = [
        b"{% for m in messages %}{{ m['role'] }}: {{ m.content | trim }}\n{% endfor %}",
        b"{% set ns = namespace(n=0) %}{% for m in messages if m.role %}{% set ns.n = ns.n + 1 %}"
        b"{{ '%s' % ns.n }}{{ m | tojson(indent=2) }}{% endfor %}{{ range(ns.n) | list | join(',') }}",
    ]
    chat = Chat("tiny", turns=(Turn("a", text="b"),))
    chat.write(folder / "chat.json")
    answers = [path.read_bytes() for path in (TESTS / "v4_chat").glob("test_output_*.txt")]
    channels = (
        b"<|channel|>analysis<|message|>a<|end|><|start|>assistant to=functions.x<|channel|>commentary<|message|>{}"
    )
    return [
        Target("template", templates, _rendered),
        Target("chat", [(folder / "chat.json").read_bytes()], _in_file(folder, "chat.json", Chat.read), _document),
        Target("deepseek answer", answers, _answered(deepseek_v4.FORMAT.of("deepseek_v4", "", None))),
        Target("harmony answer", [channels], _answered(harmony.FORMAT("", {}, ()))),
    ]


def _rendered(data: bytes) -> Any:
    template = jinja.FORMAT(data.decode("utf-8", "replace"), {"bos_token": "<s>"})
    return template.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])


def _answered(chat: Any) -> Callable[[bytes], Any]:
    return lambda data: chat.parse(data.decode("utf-8", "replace"), thinking=True)


def _own(folder: Path) -> list[Target]:
    """What numoe itself wrote, and others may have changed."""
    model = load("tiny", ram="200MB")
    session = model.session(64)
    session.feed([1, 2, 3])
    session.save(folder / "session")
    home = machine._file().parent
    home.mkdir(parents=True, exist_ok=True)
    keep(a_machine())
    toml = b'temp = 0.5\nram = "16GB"\nquiet = true\n[run]\nseed = 3\n'
    batch = b'{"prompt": "a"}\n{"id": 1, "messages": [{"role": "user", "content": "b"}], "seed": 3, "stop": ["x"]}\n'
    values = {setting.name: setting.value(setting.default) for setting in SETTINGS if setting.name in _KEYED}
    values |= {"raw": False}
    described = model.description
    return [
        Target("manifest", [(TINY / "numoe.json").read_bytes()],
               _in_file(folder, "numoe.json", lambda path: read_manifest(path.parent)), _document),
        Target("session", [(folder / "session").read_bytes()],
               _in_file(folder, "session", lambda path: model.restore(path).close())),
        Target("machine.json", [machine._file().read_bytes()],
               _in_file(home, "machine.json", lambda _: machine.known()), _document),
        Target("config.toml", [toml], _in_file(home, "config.toml", lambda _: settings_file.settings())),
        Target("batch", [batch], _in_file(folder, "batch", lambda path: read_batch(str(path), values, described)),
               either(lines, damaged)),
        Target("trace", [b"# 8 routed experts\n0 1 3 4\n1 1 2 3\n"], _in_file(folder, "trace", read_trace)),
    ]  # fmt: skip


def _elsewhere() -> list[Target]:
    sha = "0123456789abcdef" * 4
    files = [{"rfilename": "model.safetensors", "size": 5, "blobId": sha[:40], "lfs": {"sha256": sha, "size": 5}}]
    listing = json.dumps({"id": "a/b", "sha": sha[:40], "siblings": files}).encode()
    schema = {
        "type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "multipleOf": 3}, "b": {"const": 5}},
        "$defs": {"c": {"type": "string", "pattern": "^a+$", "maxLength": 5}}, "required": ["a"],
        "additionalProperties": {"anyOf": [{"$ref": "#/$defs/c"}, {"enum": [1, "x"]}]},
    }  # fmt: skip
    return [
        Target("hub listing", [listing], lambda data: _listing(data, "a/b"), _document),
        Target("schema", [json.dumps(schema).encode()], lambda data: json_grammar(parse_json(data, "schema")), changed),
        Target("regex", [rb"(a|b){1,3}[^\d]\w+?x*\p{L}"], lambda data: regex_grammar(data.decode("utf-8", "replace"))),
        Target("choices", [b'["yes", "no"]'], _choices, changed),
    ]


def _choices(data: bytes) -> Any:
    value = parse_json(data, "choices")
    return choice_grammar([one for one in value if isinstance(one, str)] if isinstance(value, list) else [])
