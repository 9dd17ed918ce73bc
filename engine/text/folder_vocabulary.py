"""The vocabulary of a model folder, which is spread over several files.

Tokens are in tokenizer.json, tokenizer.model, vocab.json with merges.txt, or a tiktoken file; more of them in
tokenizer_config.json (`added_tokens_decoder`) or added_tokens.json; special ones are named in tokenizer_config.json and
special_tokens_map.json; ends of answers in generation_config.json or config.json; the chat template in
chat_template.jinja or tokenizer_config.json. What wins over what is as in transformers 5.23.
"""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from numoe.engine.text.ends import turn_ends
from numoe.engine.text.library import library
from numoe.engine.text.sentencepiece import SentencePieceModel, parse_sentencepiece
from numoe.engine.text.vocabulary import (
    KIMI,
    NAMED_TOKENS,
    PRE_TOKENIZERS,
    Vocabulary,
    byte_level_backend,
    joins,
    sentencepiece_backend,
    tiktoken_vocabulary,
)
from numoe.quant.documents import is_there, parse_json, read_document, read_object, refuse_lfs_pointer
from numoe.quant.errors import InputError

# The files that hold the tokens; the first of these that a folder has whole is read.
_TOKEN_FILES = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("vocab.json", "merges.txt"),
    ("tiktoken.model",),
    ("qwen.tiktoken",),
)
_MOST_GROWTH = 100  # characters of one: a short prompt would take all memory; those of models make a few
_SPECIALS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def require_tokenizer(names: Collection[str], where: str) -> None:
    """Raises InputError when no file of these names is a vocabulary that can be read; `where` names their folder."""
    _token_files(names, where)


def _token_files(names: Collection[str], where: str) -> tuple[str, ...]:
    for files in _TOKEN_FILES:
        if set(files) <= set(names):
            return files
    readable = [" with ".join(files) for files in _TOKEN_FILES]
    raise InputError(
        f"{where} has no tokenizer that numoe reads ({', '.join(readable[:-1])} or {readable[-1]}); "
        "take a release of the model that has one of these"
    )


def read_folder(folder: Path) -> Vocabulary:
    """The vocabulary of a model folder.

    Raises:
        InputError: a file is missing or malformed; the sentence names it.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    files = _token_files(names, str(folder))
    with library(f"the tokenizer files of {folder} do not fit together", "get them again"):
        return _read(folder, files)


def _read(folder: Path, files: tuple[str, ...]) -> Vocabulary:
    config = _Config(folder)
    notes: list[str] = []
    if files[0] == "tokenizer.json":
        backend = _tokenizer_json(folder / files[0])
    elif files[0] == "tokenizer.model":
        backend = _tokenizer_model(folder / files[0], config)
    else:
        backend, notes = _byte_level(folder, files, config)
    # The text of a SentencePiece vocabulary is normalized by putting spaces before it, which no token has.
    _add_tokens(backend, config, normalized=files[0] != "tokenizer.model")

    special_tokens = {name: text for name in NAMED_TOKENS if (text := config.text(name))}
    ids: dict[str, int] = {}
    for name in ("bos_token", "eos_token"):
        if name in special_tokens:
            token_id = backend.token_to_id(special_tokens[name])
            if token_id is None:
                raise InputError(
                    f"{folder} names {special_tokens[name]!r} as its {name}, which none of its tokenizer's files has; "
                    "add the one that has it (added_tokens.json?), or correct tokenizer_config.json"
                )
            ids[name] = token_id
    bos_id = ids.get("bos_token")
    add_bos = config.switch("add_bos_token")
    if add_bos is None:  # then the post-processor of tokenizer.json decides
        add_bos = bos_id is not None and backend.encode("").ids[:1] == [bos_id]
    template = _chat_template(folder, config)
    added = backend.get_added_tokens_decoder()
    ends = turn_ends(template, (token.content for token in added.values()))
    eos_ids = _declared_ends(folder) | {i for i, token in added.items() if token.content in ends}
    return Vocabulary(
        backend,
        bos_id=bos_id,
        eos_ids=frozenset(eos_ids | ({ids["eos_token"]} if "eos_token" in ids else set())),
        add_bos=add_bos,
        special_tokens=special_tokens,
        chat_template=template,
        notes=tuple(notes),
    )


class _Config:
    """tokenizer_config.json and special_tokens_map.json as one table, and the tokens that are added."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "tokenizer_config.json"
        self._values = _object(self._path)
        if "added_tokens_decoder" not in self._values:
            self._values |= _object(folder / "special_tokens_map.json")
        self.model_type = _object(folder / "config.json").get("model_type")
        self._added_path = folder / "added_tokens.json"
        self.defaults: dict[str, Any] = {}

    def get(self, key: str) -> Any:
        value = self._values.get(key)
        return self.defaults.get(key) if value is None else value

    def refusal(self, key: str, kind: str) -> InputError:
        return InputError(f"{self._path}: {key} is {json.dumps(self.get(key))[:60]}, not {kind}; correct or remove it")

    def text(self, key: str) -> str | None:
        """A special token's text: it is named by that, or by an object that describes it."""
        value = self.get(key)
        if isinstance(value, dict) and "content" in value:
            value = value["content"]
        if value is not None and not isinstance(value, str):
            raise self.refusal(key, "a token's text")
        return value or None

    def switch(self, key: str) -> bool | None:
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.refusal(key, "true or false")
        return value

    @property
    def tokenizer_class(self) -> str:
        value = self.get("tokenizer_class") or ""
        if not isinstance(value, str):
            raise self.refusal("tokenizer_class", "a text")
        return value.removesuffix("Fast")

    @property
    def where(self) -> Path:
        """The file that adds tokens."""
        return self._added_path if self.get("added_tokens_decoder") is None else self._path

    def added(self) -> dict[int, AddedToken]:
        """Id -> token: those of added_tokens_decoder, else those of added_tokens.json."""
        table = self.get("added_tokens_decoder")
        if table is None:
            specials = {self.text(name) for name in _SPECIALS} | set(self.extra())
            tokens = {}
            for text, token_id in _object(self._added_path).items():
                if type(token_id) is not int:
                    raise InputError(f"{self._added_path} gives {text!r} an id that is not a number; fetch it again")
                special = text in specials
                tokens[token_id] = AddedToken(text, normalized=not special, special=special)
            return tokens
        try:
            return {int(key): _described(token) for key, token in table.items()}
        except (AttributeError, TypeError, ValueError):
            raise self.refusal("added_tokens_decoder", "a table of ids and the tokens that they stand for") from None

    def extra(self) -> list[str]:
        """Further special tokens, named by their texts."""
        texts = []
        for key in ("additional_special_tokens", "extra_special_tokens"):
            value = self.get(key) or []
            entries = list(value.values()) if isinstance(value, dict) else value
            if not isinstance(entries, list):
                raise self.refusal(key, "a list of tokens")
            for entry in entries:
                text = entry.get("content") if isinstance(entry, dict) else entry
                if not isinstance(text, str):
                    raise self.refusal(key, "a list of tokens")
                texts.append(text)
        return texts


def _described(token: Any) -> AddedToken:
    flags = {key: token.get(key, False) for key in ("single_word", "lstrip", "rstrip", "special")}
    flags["normalized"] = token.get("normalized", not flags["special"])
    if not all(isinstance(flag, bool) for flag in flags.values()) or not isinstance(token.get("content"), str):
        raise TypeError
    return AddedToken(token["content"], **flags)


def _object(path: Path) -> dict[str, Any]:
    return read_object(path) if is_there(path) else {}


def _text(path: Path) -> str:
    """The text of a file, in the encodings that JSON may have."""
    data = read_document(path)
    refuse_lfs_pointer(data, path)
    try:
        return data.decode(json.detect_encoding(data))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); fetch it again") from None


# ------------------------------------------------------------------------------------------------- kinds of tokens


def _tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    text = _text(path)
    try:
        return _backend_of(text, path)
    except InputError:
        # It may be no JSON, which is said better there. Or it is about settings that nothing here depends on.
        spec = parse_json(text, path)
        if not isinstance(spec, dict) or (spec.get("truncation") is None and spec.get("padding") is None):
            raise
        return _backend_of(json.dumps(spec | {"truncation": None, "padding": None}), path)


def _backend_of(text: str, path: Path) -> tokenizers.Tokenizer:
    with library(f"{path} is not a valid tokenizer", "fetch it again"):
        backend = tokenizers.Tokenizer.from_str(text)
        # They would cut prompts, or fill them up; transformers leaves them to its callers.
        backend.no_truncation()
        backend.no_padding()
        if backend.normalizer is not None:
            growth = _growth(json.loads(backend.normalizer.__getstate__()))
            if growth > _MOST_GROWTH:
                raise InputError(f"{path} makes {growth:.3g} characters of one before it cuts text; fetch it again")
        if backend.post_processor is not None:
            pieces = _pieces(json.loads(backend.post_processor.__getstate__()))
            pieces = max(pieces, backend.num_special_tokens_to_add(False))
            if pieces > _MOST_GROWTH:
                raise InputError(f"{path} makes {pieces:,} pieces of every text after it is cut; fetch it again")
        backend.encode("It's 12 o'clock.\n")  # some faults show only now
    return backend


def _pieces(step: dict[str, Any]) -> int:
    """How many tokens and copies of the text a post-processor puts one after another; an entry may be many tokens."""
    return len(step.get("single") or ()) + sum(map(_pieces, step.get("processors") or ()))


def _growth(step: dict[str, Any]) -> int:
    """How many characters a normalizer may make of one: replacements one after another multiply."""
    if "normalizers" in step:
        return math.prod(map(_growth, step["normalizers"]))
    if step["type"] == "Prepend":
        return 1 + len(step["prepend"])
    return max(1, len(step["content"])) if step["type"] == "Replace" else 1


def _tokenizer_model(path: Path, config: _Config) -> tokenizers.Tokenizer:
    data = read_document(path)
    refuse_lfs_pointer(data, path)
    model = parse_sentencepiece(data, str(path))
    _rename(model, config)
    named = {"bos_token": model.bos_id, "eos_token": model.eos_id, "unk_token": model.unk_id}
    config.defaults |= {key: model.pieces[i] for key, i in named.items() if i is not None}
    config.defaults["add_bos_token"] = True
    if config.tokenizer_class != "LlamaTokenizer":
        return sentencepiece_backend(model)
    if config.switch("add_prefix_space") is False:
        model = replace(model, dummy_prefix=False)
    return sentencepiece_backend(model, "always" if config.switch("legacy") else "first")


def _rename(model: SentencePieceModel, config: _Config) -> None:
    """Pieces that were left free when the vocabulary was trained may have got a text since."""
    known = set(model.pieces)
    for token_id, token in config.added().items():
        if 0 <= token_id < len(model.pieces) and token.content not in known:
            model.pieces[token_id] = token.content


def _byte_level(folder: Path, files: tuple[str, ...], config: _Config) -> tuple[tokenizers.Tokenizer, list[str]]:
    if config.switch("add_prefix_space"):
        raise InputError(
            f"{folder / 'tokenizer_config.json'}: add_prefix_space is not supported beside {files[0]}; "
            "get a tokenizer.json for this model"
        )
    path = folder / files[0]
    qwen = config.tokenizer_class.startswith("Qwen") or str(config.model_type).startswith("qwen")
    if files[0] == "vocab.json":
        vocabulary = read_object(path)
        if not vocabulary or not all(type(i) is int and 0 <= i < 1 << 32 for i in vocabulary.values()):
            raise InputError(f"{path} is not a table of tokens and their ids; fetch it again")
        named = ("eos_token", "unk_token", "pad_token" if qwen else "bos_token")
        config.defaults |= dict.fromkeys(named, "<|endoftext|>")
        merges = _merges(folder / files[1])
        notes = []
        if not qwen and config.tokenizer_class != "GPT2Tokenizer":
            notes = [
                f"{folder.name} does not say how its tokenizer cuts text into words, which is taken to be GPT-2's way; "
                "if answers are poor, get a tokenizer.json for this model."
            ]
        return byte_level_backend(
            vocabulary, merges, PRE_TOKENIZERS["qwen2" if qwen else "gpt-2"], composes=qwen
        ), notes
    data = read_document(path)
    refuse_lfs_pointer(data, path)
    vocabulary = tiktoken_vocabulary(data, str(path))
    merges = joins({token: -rank for token, rank in vocabulary.items()})
    size = len(vocabulary)
    if files[0] == "qwen.tiktoken":  # its special tokens are in Qwen's Python file (tokenization_qwen.py)
        specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205))]
        cuts, composes = PRE_TOKENIZERS["qwen2"], True
        config.defaults |= {"eos_token": "<|endoftext|>"}
    else:
        added = {i: token.content for i, token in config.added().items()}
        if max(added, default=0) >= 1 << 24:
            raise config.refusal("added_tokens_decoder", "a table of ids that a model has")
        specials = [added.get(i, f"<|reserved_token_{i}|>") for i in range(size, max(added, default=0) + 1)]
        # Classes of transformers' own cut as Llama 3 does; others are Moonshot's Python files.
        own = config.tokenizer_class in ("PreTrainedTokenizer", "TokenizersBackend", "LlamaTokenizer")
        cuts, composes = PRE_TOKENIZERS["llama-bpe"] if own else KIMI, False
    backend = byte_level_backend(vocabulary, merges, cuts, whole_words=True, composes=composes)
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    return backend, []


def _merges(path: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        line = line.removesuffix("\r")
        if not line.strip() or line.startswith("#version"):
            continue
        pair = line.split(" ")
        if len(pair) != 2:
            raise InputError(f"{path}: line {number} is not two tokens with a space between them; fetch it again")
        merges.append((pair[0], pair[1]))
    return merges


def _add_tokens(backend: tokenizers.Tokenizer, config: _Config, normalized: bool) -> None:
    """The tokens that other files add to the vocabulary, in the order of their ids.

    normalized: they are looked for in normalized text where their description says so.
    """
    before = backend.get_added_tokens_decoder()
    described = {repr(token) for token in before.values()}
    named = {config.text(name) for name in _SPECIALS}
    describes = config.get("added_tokens_decoder") is not None  # added_tokens.json has only texts
    for token_id, token in sorted(config.added().items()):
        if repr(token) in described or (not describes and token_id in before):
            continue
        is_new = backend.token_to_id(token.content) is None
        flags = {"normalized": token.normalized and normalized, "special": token.special or token.content in named}
        token = AddedToken(**(token.__getstate__() | flags))
        backend.add_tokens([token])
        got = backend.token_to_id(token.content)
        if is_new and got is not None and got != token_id:
            raise InputError(
                f"{config.where}: the token {token.content!r} has the id {token_id}, but the vocabulary goes on with "
                f"{got}; the files do not belong together, get them again"
            )
    texts = [config.text(name) for name in _SPECIALS] + config.extra()
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    ends = {config.text("bos_token"), config.text("eos_token")} - set(config.defaults.values())
    for text in texts:
        # A beginning or end that the vocabulary lacks is refused, not added.
        if text and text not in known and (text not in ends or backend.token_to_id(text) is not None):
            known.add(text)
            backend.add_tokens([AddedToken(text, special=True, normalized=False)])


# --------------------------------------------------------------------------------------------- templates and ends


def _chat_template(folder: Path, config: _Config) -> str | None:
    path = folder / "chat_template.jinja"
    if is_there(path):
        return _text(path).replace("\r\n", "\n").replace("\r", "\n")
    template = config.get("chat_template")
    if isinstance(template, list):  # [{"name": "default", "template": ...}, {"name": "tool_use", ...}]
        template = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
    if isinstance(template, dict):
        template = template.get("default", next(iter(template.values()), None))
    if template is not None and not isinstance(template, str):
        raise config.refusal("chat_template", "a template's text")
    return template


def _declared_ends(folder: Path) -> set[int]:
    """eos_token_id of generation_config.json, or of config.json where that says none."""
    for name in ("generation_config.json", "config.json"):
        config = _object(folder / name)
        inner = config.get("text_config")
        value = config.get("eos_token_id")
        if value is None and isinstance(inner, Mapping):
            value = inner.get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(i) is int for i in ids):
            raise InputError(
                f"{folder / name} has an eos_token_id that is not a number: {json.dumps(value)[:60]}; "
                "correct or remove it"
            )
        return {i for i in ids if i >= 0}
    return set()
