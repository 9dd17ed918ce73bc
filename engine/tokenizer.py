"""Text to token ids and back, from tokenizer.json, a SentencePiece tokenizer.model or a GGUF vocabulary.

All three become one `tokenizers.Tokenizer`, which encodes. Decoding is done here, byte by byte: streaming then
is the same thing as decoding, and a character whose bytes lie in several tokens is never cut.
"""

import codecs
import json
import re
import secrets
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from numoe.engine.sentencepiece import PieceType, SentencePieceModel, parse_sentencepiece
from numoe.quant.errors import InputError

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_SPACE = "\u2581"  # SentencePiece's visible space


class Tokenizer:
    """A vocabulary and the rules that go with it.

    bos_id: the id that begins a sequence, None if the vocabulary has none.
    add_bos: whether the model expects it before a text that does not begin with it already.
    eos_ids: every id that ends an answer. special_ids: the ids that the vocabulary marks as special.
    special_tokens: the texts of bos_token, eos_token, unk_token and pad_token, as chat templates name them.
    chat_template: the model's Jinja template, None if it ships none.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None,
        eos_ids: Iterable[int],
        add_bos: bool,
        special_tokens: Mapping[str, str],
        chat_template: str | None,
    ) -> None:
        self._backend = backend
        self._added = backend.get_added_tokens_decoder()
        self._byte_level, self._strips_space = _decoding(backend)
        self._bytes: dict[int, bytes] = {}
        self.bos_id = bos_id
        self.eos_ids = frozenset(eos_ids)
        self.add_bos = add_bos and bos_id is not None
        self.special_ids = frozenset(i for i, token in self._added.items() if token.special)
        self.special_tokens = dict(special_tokens)
        self.chat_template = chat_template

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest token id. A model may have more rows than this: padding."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, special: bool = True, begins: bool = False) -> list[int]:
        """The token ids of a text.

        special=True is for rendered prompts: the texts of special tokens become their ids.
        special=False is for text from strangers: it never becomes a special token or a chat marker such as
        `<|im_start|>` or `<think>`, whatever it spells.
        begins: the text begins a sequence, so that BOS comes before it if `add_bos` says so and it has none.
        Raises InputError when the text is not valid Unicode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"Character {error.start} of the text is half of a surrogate pair; pass valid UTF-8."
            ) from error
        backend = self._backend if special else self._markerless
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        if begins and self.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary nothing."""
        stream = self.stream(skip_special)
        return "".join([stream.push(i) for i in ids]) + stream.flush()

    def stream(self, skip_special: bool = False, keep_space: bool = False) -> "Detokenizer":
        """A decoder that takes one id at a time.

        skip_special leaves out `special_ids`; keep_space keeps the space that SentencePiece puts before a text.
        """
        return Detokenizer(self, skip_special, keep_space)

    def token(self, token_id: int) -> str:
        """The vocabulary's own spelling of one id. Raises InputError if there is no such token."""
        token: str | None = self._backend.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            raise InputError(f"There is no token {token_id}; ids go from 0 to {self.vocab_size - 1}.")
        return token

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one id stands for, b"" outside the vocabulary."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spelled(token_id)
        return known

    def _spelled(self, token_id: int) -> bytes:
        token: str | None = self._backend.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return b""
        if self._byte_level:
            if token_id in self._added or not _BYTE_OF.keys() >= set(token):
                return token.encode("utf-8")
            return bytes(_BYTE_OF[character] for character in token)
        if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
            return bytes.fromhex(byte[1])
        return token.replace(_SPACE, " ").encode("utf-8")

    @cached_property
    def marker_spellings(self) -> frozenset[str]:
        """The texts of special tokens and chat markers, none of which `special=False` turns into its id."""
        return frozenset(token.content for token in self._added.values() if _is_marker(token))

    @cached_property
    def _markerless(self) -> tokenizers.Tokenizer:
        """The same vocabulary, with every special token and chat marker deaf to text."""
        spec = json.loads(self._backend.to_str())
        markers = self.marker_spellings
        for token in spec["added_tokens"]:
            token["special"] |= token["content"] in markers
        if spec["model"]["type"] == "Unigram":
            # A Unigram model finds any piece of its vocabulary in the text, so its markers get names that none has.
            names = {marker: secrets.token_hex(16) for marker in markers}
            for entry in spec["model"]["vocab"]:
                entry[0] = names.get(entry[0], entry[0])
            for token in spec["added_tokens"]:
                token["content"] = names.get(token["content"], token["content"])
        spec["post_processor"] = None
        backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
        backend.encode_special_tokens = True
        return backend


def _is_marker(token: AddedToken) -> bool:
    text: str = token.content
    return token.special or text.startswith(("<", "[")) or re.search("[|｜]", text) is not None


class Detokenizer:
    """Decodes token ids one at a time. The pieces joined are exactly `Tokenizer.decode` of all the ids."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool, keep_space: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = tokenizer._strips_space and not keep_space

    def push(self, token_id: int) -> str:
        """The characters that this id completes; the bytes of an unfinished one are held back."""
        if token_id in self._skipped:
            return ""
        return self._trimmed(self._utf8.decode(self._tokenizer.token_bytes(token_id)))

    def flush(self) -> str:
        """What is still held back, once the last id was pushed: U+FFFD for an unfinished character."""
        return self._trimmed(self._utf8.decode(b"", final=True))

    def _trimmed(self, text: str) -> str:
        """SentencePiece put a space before the text, which is not part of it."""
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes as visible characters (Radford et al., 2019): itself, or the next one from U+0100."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in visible}
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return alphabet | {chr(256 + n): byte for n, byte in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()


def _decoding(backend: tokenizers.Tokenizer) -> tuple[bool, bool]:
    """(tokens are spelled in the byte alphabet, the first space is dropped), read from the tokenizer's decoder."""
    decoder: dict[str, Any] = {"type": "none"}
    if backend.decoder is not None:
        decoder = json.loads(backend.decoder.__getstate__())
    steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return True, False
    unknown = set(kinds) - {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
    if unknown:
        raise InputError(
            f"tokenizer.json has a decoder of type {unknown.pop()!r}, which is not supported; "
            "byte-level and SentencePiece decoders are."
        )
    strips = any(
        (step["type"] == "Strip" and step["start"] > 0)
        or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )
    return False, strips


# ---------------------------------------------------------------------------------------------------- model folders


# The files that hold a vocabulary; the first of these that a folder has whole is read.
_VOCABULARIES = (
    ("tokenizer.json",),
    ("tokenizer.model",),
)


def require_tokenizer(names: Collection[str], where: str) -> None:
    """Raises InputError when no file of these names is a vocabulary that can be read; `where` names their folder."""
    if not any(set(files) <= set(names) for files in _VOCABULARIES):
        readable = [" with ".join(files) for files in _VOCABULARIES]
        raise InputError(
            f"{where} has no tokenizer that numoe reads ({', '.join(readable[:-1])} or {readable[-1]}); "
            "take a release of the model that has one of these"
        )


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder: tokenizer.json, or tokenizer.model where there is none.

    tokenizer_config.json, special_tokens_map.json, generation_config.json and chat_template.jinja are read where
    they exist. Raises InputError naming the file that is missing or malformed.
    """
    config = _json(folder / "special_tokens_map.json") | _json(folder / "tokenizer_config.json")
    special_tokens = {name: text for name in _NAMED_TOKENS if (text := _token_text(config.get(name)))}
    spec_path, pieces_path = folder / "tokenizer.json", folder / "tokenizer.model"
    require_tokenizer([path.name for path in folder.iterdir()] if folder.is_dir() else (), str(folder))
    if spec_path.is_file():
        try:
            backend = tokenizers.Tokenizer.from_str(spec_path.read_text("utf-8"))
        except Exception as error:  # the library raises bare Exception for whatever it finds
            raise InputError(f"{spec_path} is not a valid tokenizer ({error}); fetch it again.") from error
    elif pieces_path.is_file():
        model = parse_sentencepiece(pieces_path.read_bytes(), str(pieces_path))
        backend = _sentencepiece(model)
        named = {"bos_token": model.bos_id, "eos_token": model.eos_id}
        special_tokens = {k: model.pieces[v] for k, v in named.items() if v is not None} | special_tokens
        config = {"add_bos_token": True} | config
    else:
        raise AssertionError("require_tokenizer let pass what nothing reads")

    ids: dict[str, int] = {}
    for name in ("bos_token", "eos_token"):
        if name in special_tokens:
            token_id = backend.token_to_id(special_tokens[name])
            if token_id is None:
                raise InputError(
                    f"{folder} names {special_tokens[name]!r} as its {name}, which its vocabulary lacks; "
                    "fetch the tokenizer files again."
                )
            ids[name] = token_id
    bos_id = ids.get("bos_token")
    add_bos = config.get("add_bos_token")
    if add_bos is None:  # then the post-processor of tokenizer.json decides
        add_bos = bos_id is not None and backend.encode("").ids[:1] == [bos_id]
    eos_ids = _generation_eos(folder) | ({ids["eos_token"]} if "eos_token" in ids else set())
    return Tokenizer(
        backend,
        bos_id=bos_id,
        eos_ids=eos_ids,
        add_bos=bool(add_bos),
        special_tokens=special_tokens,
        chat_template=_chat_template(folder, config),
    )


def _json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}); fetch it again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object; fetch it again.")
    return value


def _token_text(value: Any) -> str | None:
    """Special tokens are named by their text or by an object that describes them."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _generation_eos(folder: Path) -> set[int]:
    value = _json(folder / "generation_config.json").get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) for i in ids):
        raise InputError(f"{folder / 'generation_config.json'} has an eos_token_id that is not a number: {value!r}.")
    return set(ids)


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text("utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # [{"name": "default", "template": ...}, {"name": "tool_use", ...}]
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default", next(iter(named.values()), None))
    return template if isinstance(template, str) else None


# ------------------------------------------------------------------------------------------- SentencePiece and GGUF


def _sentencepiece(model: SentencePieceModel) -> tokenizers.Tokenizer:
    algorithm: models.Model
    try:
        if model.unigram:
            pieces = list(zip(model.pieces, model.scores, strict=True))
            algorithm = models.Unigram(pieces, model.unk_id, model.byte_fallback)
        else:
            algorithm = models.BPE(
                {piece: i for i, piece in enumerate(model.pieces)},
                _merges(model),
                unk_token=model.pieces[model.unk_id],
                fuse_unk=True,
                byte_fallback=model.byte_fallback,
            )
        steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    except Exception as error:  # the library raises bare Exception for whatever it finds
        raise InputError(
            f"The SentencePiece vocabulary does not fit together ({error}); use the model's tokenizer.json."
        ) from error
    backend = tokenizers.Tokenizer(algorithm)
    if model.collapse_spaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    undo: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(undo + ([decoders.Strip(" ", 1, 0)] if model.dummy_prefix else []))
    _add_tokens(backend, model.pieces, model.types)
    return backend


def _merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """BPE merges, best first: every way to join two pieces into a third, by the third one's score."""
    joinable = (PieceType.NORMAL, PieceType.USER_DEFINED)
    entries = zip(model.pieces, model.scores, model.types, strict=True)
    scores = {piece: score for piece, score, kind in entries if kind in joinable}
    merges = [
        (-score, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    merges.sort(key=lambda merge: merge[0])
    return [(left, right) for _, left, right in merges]


def _add_tokens(backend: tokenizers.Tokenizer, pieces: list[str], types: list[int]) -> None:
    """Control pieces become special tokens; user-defined ones are matched whole, ahead of the algorithm."""
    typed = list(zip(pieces, types, strict=True))
    control = [AddedToken(piece, special=True, normalized=False) for piece, kind in typed if kind == PieceType.CONTROL]
    # Those with a space in them are found by the algorithm, since text is matched before its spaces are replaced.
    whole = [
        AddedToken(piece, special=False, normalized=False)
        for piece, kind in typed
        if kind == PieceType.USER_DEFINED and _SPACE not in piece
    ]
    backend.add_special_tokens(control)
    backend.add_tokens(whole)


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _WORDS % r"\p{N}{1,3}"
_QWEN2 = _WORDS % r"\p{N}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
    r"|%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# The original spells out the cased letters of an older Unicode; newer ones only differ in where BPE may begin.
_DEEPSEEK_LLM = (
    r"[\r\n]",
    r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
    r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
    r"\s+$",
    "[一-龥\u0800-一가-\ud7ff]+",
    r"\p{N}+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥\u0800-一가-\ud7ff]+", r"\p{N}")
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")

# tokenizer.ggml.pre -> the expressions that cut text into words, each applied to what the one before left.
# The names are llama.cpp's (src/llama-vocab.cpp), the expressions those of the models' own tokenizer.json.
_PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    "gpt-2": (_GPT2,),
    "olmo": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "starcoder": (r"\p{N}", _GPT2),
    "refact": (r"\p{N}", _GPT2),
    "command-r": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "dbrx": (_LLAMA3,),
    "glm4": (_LLAMA3,),
    "chatglm-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "stablelm2": (_QWEN2,),
    "deepseek-llm": _DEEPSEEK_LLM,
    "deepseek-coder": _DEEPSEEK_CODER,
    "deepseek-v3": _DEEPSEEK3,
    "gpt-4o": (_CASED % (_ENDINGS, _ENDINGS, r"\p{N}{1,3}"),),
    "llama4": (_CASED % (_ENDINGS, _ENDINGS, r"\p{N}{1,3}"),),
    "tekken": (_CASED % ("", "", r"\p{N}"),),
}
_WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "gpt-4o", "llama4", "tekken"}  # a word in the vocabulary is not cut
_BOS_UNLESS_TOLD = {"llama-bpe", "llama3", "llama-v3"}  # files older than add_bos_token


def gguf_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata (the `tokenizer.*` keys of the GGUF specification).

    Raises InputError naming a key that is missing or malformed, an unknown `tokenizer.ggml.model` (gpt2 and llama
    are known) or an unknown `tokenizer.ggml.pre`.
    """

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    kind, pre = get("model"), get("pre", "default")
    pieces = [str(token) for token in _listed(metadata, "tokens")]
    types = [int(t) for t in _listed(metadata, "token_type", [PieceType.NORMAL] * len(pieces))]
    if len(types) != len(pieces):
        raise InputError(f"tokenizer.ggml.token_type has {len(types)} entries for {len(pieces)} tokens.")
    bos_id, eos_id = (_gguf_id(get(key), key, len(pieces)) for key in ("bos_token_id", "eos_token_id"))
    if kind == "gpt2":
        backend = _gguf_bpe(pieces, types, [str(m) for m in _listed(metadata, "merges")], pre)
    elif kind == "llama":
        scores = [float(score) for score in _listed(metadata, "scores")]
        if len(scores) != len(pieces):
            raise InputError(f"tokenizer.ggml.scores has {len(scores)} entries for {len(pieces)} tokens.")
        backend = _sentencepiece(
            SentencePieceModel(
                pieces,
                scores,
                types,
                unigram=False,
                byte_fallback=PieceType.BYTE in types,
                unk_id=_gguf_id(get("unknown_token_id", 0), "unknown_token_id", len(pieces)) or 0,
                bos_id=bos_id,
                eos_id=eos_id,
                dummy_prefix=bool(get("add_space_prefix", True)),
                collapse_spaces=bool(get("remove_extra_whitespaces", False)),
            )
        )
    else:
        raise InputError(f"The GGUF file's tokenizer.ggml.model is {kind!r}; gpt2 and llama are supported.")
    ends = (_gguf_id(get(key), key, len(pieces)) for key in ("eot_token_id", "eom_token_id"))
    keys = ("bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id")
    named = {name: _gguf_id(get(key), key, len(pieces)) for name, key in zip(_NAMED_TOKENS, keys, strict=True)}
    return Tokenizer(
        backend,
        bos_id=bos_id,
        eos_ids={i for i in (eos_id, *ends) if i is not None},
        add_bos=bool(get("add_bos_token", kind == "llama" or pre in _BOS_UNLESS_TOLD)),
        special_tokens={name: pieces[i] for name, i in named.items() if i is not None},
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def _listed(metadata: Mapping[str, Any], key: str, default: list[int] | None = None) -> list[Any]:
    value = metadata.get(f"tokenizer.ggml.{key}", default)
    if value is None:
        raise InputError(f"The GGUF file has no tokenizer.ggml.{key}; use a file made by a current converter.")
    return list(value)


def _gguf_id(value: Any, key: str, count: int) -> int | None:
    if value is None:
        return None
    if not 0 <= int(value) < count:
        raise InputError(f"The GGUF file's tokenizer.ggml.{key} is {value}, but it has {count} tokens.")
    return int(value)


def _gguf_bpe(pieces: list[str], types: list[int], merges: list[str], pre: str) -> tokenizers.Tokenizer:
    if pre not in _PRE_TOKENIZERS:
        raise InputError(
            f"The GGUF file's tokenizer.ggml.pre is {pre!r}, which is not known; use the model's tokenizer.json."
        )
    pairs = []
    for merge in merges:
        left, space, right = merge.partition(" ")
        if not space or " " in right:
            raise InputError(f"The GGUF file's tokenizer.ggml.merges has {merge!r}, which is not two tokens.")
        pairs.append((left, right))
    vocab = {piece: i for i, piece in enumerate(pieces)}
    try:
        model = models.BPE(vocab, pairs, ignore_merges=pre in _WHOLE_WORDS)
    except Exception as error:  # the library raises bare Exception for whatever it finds
        raise InputError(f"The GGUF file's vocabulary and merges do not fit together ({error}).") from error
    backend = tokenizers.Tokenizer(model)
    if pre in ("qwen2", "deepseek-r1-qwen"):
        backend.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _PRE_TOKENIZERS[pre]]
    bytes_last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, bytes_last])
    backend.decoder = decoders.ByteLevel()
    _add_tokens(backend, pieces, types)
    return backend
