"""Vocabularies as `tokenizers.Tokenizer`: SentencePiece's, byte-level BPE's, tiktoken's.

The expressions that cut text into words before byte-level BPE are those of the models' own tokenizer.json; their names
are llama.cpp's (src/llama-vocab.cpp), as GGUF files give them in `tokenizer.ggml.pre`.
"""

import base64
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from numoe.engine.text.sentencepiece import PieceType, SentencePieceModel
from numoe.quant.errors import InputError

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
SPACE = "\u2581"  # SentencePiece's visible space
_LONGEST_PIECE = 1 << 14  # characters; the merges of a piece are found in its length squared


@dataclass(frozen=True)
class Vocabulary:
    """What a folder or a file says of its tokens; the fields are those of `tokenizer.Tokenizer`.

    pieces: the spelling of every id, where the file lists them: some list one twice, and both ids say it.
    """

    backend: tokenizers.Tokenizer
    bos_id: int | None
    eos_ids: frozenset[int]
    add_bos: bool
    special_tokens: Mapping[str, str]
    chat_template: str | None
    pieces: list[str] | None = None
    notes: tuple[str, ...] = ()


@contextmanager
def library(what: str, remedy: str) -> Iterator[None]:
    """The boundary around the tokenizers library, which raises bare Exception, and panics in Rust.

    Raises:
        InputError: whatever it raised, as "what (reason); remedy".
    """
    try:
        with _silent():
            yield
    except InputError:
        raise
    except BaseException as error:
        # Panics derive from BaseException, so that few catch them, and their class can't be imported.
        if isinstance(error, MemoryError) or not (
            isinstance(error, Exception) or type(error).__name__ == "PanicException"
        ):
            raise
        said = str(error).replace("`", "'")  # which are around parameters of ours
        raise InputError(f"{what} ({said}); {remedy}") from None


@contextmanager
def _silent() -> Iterator[None]:
    """Rust prints a panic to file descriptor 2 before Python hears of it."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


# ---------------------------------------------------------------------------------------------------- SentencePiece


def sentencepiece_backend(
    model: SentencePieceModel,
    prefix: Literal["always", "first"] | None = None,
    merges: list[tuple[str, str]] | None = None,
) -> tokenizers.Tokenizer:
    """prefix: where transformers puts a space, unless one is there: before a text, always also behind special tokens.

    None: SentencePiece itself puts one before every piece of text.
    merges: of BPE, best first, where they are listed; else they follow from the scores.
    """
    algorithm: models.Model
    with library("the SentencePiece vocabulary does not fit together", "use the model's tokenizer.json"):
        if model.unigram:
            pieces = list(zip(model.pieces, model.scores, strict=True))
            algorithm = models.Unigram(pieces, model.unk_id, model.byte_fallback)
        else:
            if merges is None:
                entries = zip(model.pieces, model.scores, model.types, strict=True)
                joinable = (PieceType.NORMAL, PieceType.USER_DEFINED)
                merges = joins({piece: score for piece, score, kind in entries if kind in joinable})
            algorithm = models.BPE(
                {piece: i for i, piece in enumerate(model.pieces)},
                merges,
                unk_token=model.pieces[model.unk_id],
                fuse_unk=True,
                byte_fallback=model.byte_fallback,
            )
        steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    backend = tokenizers.Tokenizer(algorithm)
    if model.collapse_spaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.dummy_prefix and prefix:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=prefix, split=False)
    elif model.dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    undo: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(undo + ([decoders.Strip(" ", 1, 0)] if model.dummy_prefix else []))
    add_typed_tokens(backend, model.pieces, model.types)
    return backend


def joins(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """BPE merges, best first: every way to join two pieces into a third, by the third one's score.

    Raises:
        InputError: a piece is too long.
    """
    merges = []
    for piece, score in scores.items():
        if len(piece) > _LONGEST_PIECE:
            raise InputError(f"the vocabulary has a piece of {len(piece)} characters; get the model's own tokenizer")
        merges += [
            (-score, piece[:cut], piece[cut:])
            for cut in range(1, len(piece))
            if piece[:cut] in scores and piece[cut:] in scores
        ]
    merges.sort(key=lambda merge: merge[0])
    return [(left, right) for _, left, right in merges]


def add_typed_tokens(backend: tokenizers.Tokenizer, pieces: list[str], types: list[int]) -> None:
    """Control pieces become special tokens; user-defined ones are matched whole, ahead of the algorithm."""
    typed = list(zip(pieces, types, strict=True))
    control = [AddedToken(piece, special=True, normalized=False) for piece, kind in typed if kind == PieceType.CONTROL]
    # Those with a space in them are found by the algorithm, since text is matched before its spaces are replaced.
    whole = [
        AddedToken(piece, special=False, normalized=False)
        for piece, kind in typed
        if kind == PieceType.USER_DEFINED and SPACE not in piece
    ]
    backend.add_special_tokens(control)
    backend.add_tokens(whole)


# --------------------------------------------------------------------------------------------------- byte-level BPE


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes as visible characters (Radford et al., 2019): itself, or the next one from U+0100."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in visible}
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return alphabet | {chr(256 + n): byte for n, byte in enumerate(hidden)}


BYTE_OF = _byte_alphabet()


def byte_level_backend(
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    cuts: Iterable[str],
    *,
    whole_words: bool = False,
    composes: bool = False,
) -> tokenizers.Tokenizer:
    """BPE over bytes that are spelled in GPT-2's alphabet.

    Args:
        vocabulary: token -> id. merges: pairs of tokens, best first.
        cuts: the expressions that cut text into words, each applied to what the one before left.
        whole_words: a word that is in the vocabulary is not cut further.
        composes: text is brought into Unicode's NFC before.

    Raises:
        InputError: vocabulary and merges do not fit together.
    """
    with library("the vocabulary and its merges do not fit together", "get the model's own files again"):
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=whole_words))
    if composes:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in cuts]
    bytes_last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_last])
    backend.decoder = decoders.ByteLevel()
    return backend


def tiktoken_vocabulary(data: bytes, name: str) -> dict[str, int]:
    """Token -> id of a tiktoken file: lines of a token's bytes in base64, and its id, which is its rank in merging.

    Raises:
        InputError: it is something else.
    """
    spelled = {byte: character for character, byte in BYTE_OF.items()}
    vocabulary = {}
    try:
        for line in data.splitlines():
            if line.strip():
                token, rank = line.split()
                vocabulary["".join(spelled[byte] for byte in base64.b64decode(token, validate=True))] = int(rank)
    except ValueError as error:
        raise InputError(f"{name} cannot be read as a tiktoken vocabulary ({error}); fetch it again") from None
    if not vocabulary or sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise InputError(f"{name} does not number its tokens from 0 on, each once; fetch it again")
    return vocabulary


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(numbers: str, letters: str = r"\p{L}+", signs: str = r"[^\s\p{L}\p{N}]+[\r\n]*", lines: str = _LINES) -> str:
    return rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?{letters}|{numbers}| ?{signs}|{lines}"


def _cased(endings: str, numbers: str, excluded: str = "", signs: str = r"[\r\n/]*") -> str:
    upper, lower = (rf"[\p{{L{case}}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{excluded}]" for case in "ul")
    lower = lower.replace(r"\p{Lt}", "")
    word = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{word}{upper}*{lower}+{endings}|{word}{upper}+{lower}*{endings}|{numbers}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+{signs}|{_LINES}"
    )


_DIGITS = (r"\p{N}", _GPT2)
_LLAMA3 = (_words(r"\p{N}{1,3}"),)
_QWEN2 = (_words(r"\p{N}"),)
_GPT4O = (_cased(f"{_ENDINGS}?", r"\p{N}{1,3}"),)
_ASIAN = "[一-龥\u3040-ゟ゠-ヿ]+"
_SIGNED = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
_DEEPSEEK3 = (r"\p{N}{1,3}", _ASIAN, rf"{_SIGNED}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES}")
# The original spells out the cased letters of an older Unicode; newer ones only differ in where BPE may begin.
_DEEPSEEK_LLM = (
    r"[\r\n]",
    r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
    r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
    r"\s+$",
    "[一-龥\u0800-一가-\ud7ff]+",
    r"\p{N}+",
)
_BLOOM = " ?[^(\\s|.,!?…。，、।۔،)]+"
_TRIPLES = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"  # from the right
_SPACES = "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)) + r"|\s{1,2}(?!\S)|\s"
# Kimi's and Moonlight's own Python files (tokenization_kimi.py, tokenization_moonshot.py).
KIMI = (r"\p{Han}+|" + _cased(f"{_ENDINGS}?", r"\p{N}{1,3}", r"&&[^\p{Han}]", r"[\r\n]*"),)

# Those that cut alike, by the names that they have.
_ALIKE: Mapping[tuple[str, ...], str] = {
    (
        _GPT2,
    ): "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert mpt olmo jais trillion"
    " granite-docling exaone4 jina-v1-en jina-v2-code roberta-bpe",
    _DIGITS: "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
    _LLAMA3: "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano dbrx smaug-bpe minicpm5"
    " glm4 glm5 chatglm-bpe",
    _QWEN2: "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
    _DEEPSEEK3: "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
    _GPT4O: "gpt-4o llama4 kanana2 talkie minimax-m2",
    (_BLOOM,): "bloom poro-chat gpt3-finnish",
    KIMI: "kimi-k2",
    (_words(r"\p{N}", signs=r"[^\s\p{L}\p{N}]++[\r\n]*", lines=r"\s*[\r\n]|\s+(?!\S)|\s+"),): (
        "bailingmoe bailingmoe2 llada-moe"
    ),
    (r"\d{1,3}(?=(?:\d{3})*\b)", *_GPT4O): "tiny_aya cohere2moe",
}
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    name: cuts for cuts, names in _ALIKE.items() for name in names.split()
} | {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"),
    "qwen35": (_words(r"\p{N}", r"[\p{L}\p{M}]+", r"[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),),
    "seed-coder": (_words(r"\p{N}", signs=r"[^\s\p{L}\p{N}\r\n]+"),),
    "exaone-moe": (
        _words(
            r"\p{N}",
            r"(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
            r"[^\s\p{L}\p{N}]+[\r\n/]?",
            r"\s*[\r\n]|\s+(?!\S)|\s+",
        ),
    ),
    "ufakzeka": (_words(r"\p{N}").removeprefix(f"{_ENDINGS}|"),),
    "laguna": (r"[^\n]+|[\n]+", *_QWEN2),
    "jais-2": (_words(r"\p{N}{1,3}", lines=rf"\s*[\r\n]+|{_SPACES}"),),
    "deepseek-llm": _DEEPSEEK_LLM,
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥\u0800-一가-\ud7ff]+", r"\p{N}"),
    "spark2_5": (
        r"\p{N}{1,3}",
        _ASIAN,
        rf"{_SIGNED}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+",
        r"\p{N}",
    ),
    "youtu": (
        "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥\u3040-ゟ゠-ヿ]+",
        _cased(f"{_ENDINGS}?", r"\p{N}"),
    ),
    "tekken": (_cased("", r"\p{N}"),),
    "granite-embed-multi-97m": (_cased(f"{_ENDINGS}?", r"\p{N}{1,3}"),),
    "viking": (_BLOOM, r"\p{N}"),
    "superbpe": (r"\p{N}+", r"(?=(\d{3})+(?!\d))"),
    "afmoe": (
        _TRIPLES,
        "[一-鿿㐀-䶿豈-﫿\u3040-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+",
        _DEEPSEEK3[2],
    ),
    "chameleon": (
        "<sentinel:[0-9]+>",
        "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
        "([\\t\\n]|    |  )",
        r"\p{N}",
        r"[\p{P}!-/:-@\[-`{-~]",
        _GPT2,
    ),
}
