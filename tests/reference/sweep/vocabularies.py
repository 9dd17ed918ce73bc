"""Real tokenizers: ids and texts against transformers, SentencePiece, tiktoken and llama.cpp's own vectors."""

import json
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path

import sentencepiece
import tiktoken
import tiktoken.load
import transformers
from report import Report

from numoe.engine.text.tokenizer import gguf_tokenizer, load_tokenizer
from numoe.quant.errors import InputError
from numoe.quant.stored.checkpoint import open_checkpoint

TEXTS = (
    "",
    "Hello, world!",
    "  leading and   many    spaces  ",
    " x  y   z    \n\n\n\n   \t\t a\r\n\r\nb \u00a0\u3000\u2028 c",
    "\n",
    " ",
    "\t\n \n  \n   \n",
    "I'm, you'RE, they'Ll, we’ve; it's 'quoted' ''double'' 'S",
    "1 12 123 1234 12345678901234567890 3.14 1,234,567.89 ½ ² ٣٤٥ ४५६ 一二三 Ⅻ",
    'def f(x: int) -> str:\n    return f"{x!r:>8}"  # x**2 != x^2\n\n\n\tif a<b and b>c: a[i]+=1;\n',
    '<html><body class="a">&nbsp;</body></html> {{ x }} {% y %} \\n \\u00e9 C:\\x\\y $HOME ~/a_b-c.d#e?f=g&h=i@j',
    "Der Fluß fließt; ÄÖÜ äöü ẞ. Ça va? ¡Mañana! naïve café cafe\u0301 ﬁne ① Å Å K",
    "Привет, мир! Ёлка Їжак Ελληνικά ὀξύς Հայերեն ქართული",
    "你好，世界！東京は日本の首都です。ﾊﾝｶｸ 한국어 텍스트 ㄅㄆㄇ 𠀀𪜀",
    "مرحبا بالعالم ؟ שלום עולם, נִקּוּד हिन्दी में नमस्ते বাংলা தமிழ் తెలుగు ไทยภาษา ລາວ မြန်မာ ខ្មែរ བོད་ አማርኛ",
    "😀👍🏽👩‍👩‍👧‍👦🇩🇪☺️ ❤️‍🔥 a😀b 😀😀 \u200d\ufe0f",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ℝ∑∫√≠≤∞ ←→↔ ░▒▓ ♠♥ †‡ … – — ‘’“” «»",
    "\x00\x01\x07\x08\x1b[0m\x7f\x85\ufeff\ufffd\ufffe\U000e0001\U0010ffff",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa bbbb ========================== -------- ......... !!!!!!! ______",
    "HTTPServer iPhone McDonald XMLHttpRequest snake_case camelCase SCREAMING_CASE ALLCAPS aB aBC ABc",
    "▁ already▁escaped ▁▁ <0x0A> <0xE4> Ġ Ċ",
    "The quick brown fox jumps over the lazy dog. " * 4,
    "e\u0301\u0323 \u1e69 \u0073\u0323\u0307 \u212b \u0958 \uac00 \u1100\u1161 \ufb1d \u2126 \u0344",
)

QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SEPARATOR = "\n__ggml_vocab_test__\n"


def sweep(folders: Mapping[str, Path], report: Report) -> None:
    for package, folder in folders.items():
        for path in sorted(folder.rglob("*")):
            name = f"{package} {path.name}"
            try:
                if path.name.endswith("tokenizer.json"):
                    _compare_json(name, path, report)
                elif ".model" in path.suffixes:
                    _compare_sentencepiece(name, path, report)
                elif path.suffix == ".gguf":
                    _compare_gguf(name, path, report)
                elif path.suffix == ".tiktoken" or path.name.startswith("tekken"):
                    _compare_tiktoken(name, path, report)
            except InputError as error:
                report.refuse(error)


def _compare_json(name: str, path: Path, report: Report) -> None:
    """A tokenizer.json, with the tokenizer_config.json beside it if there is one, against transformers."""
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copy(path, Path(scratch) / "tokenizer.json")
        config = path.with_name("tokenizer_config.json")
        if config.is_file():
            shutil.copy(config, scratch)
        ours = load_tokenizer(Path(scratch))
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(scratch)

    def encode(text: str, split: bool = False) -> list[int]:
        ids: list[int] = theirs.encode(text, add_special_tokens=False, split_special_tokens=split)
        return ids

    def decode(ids: list[int]) -> str:
        text: str = theirs.decode(ids, clean_up_tokenization_spaces=False)
        return text

    added = theirs.added_tokens_decoder
    for text in [*TEXTS, *_spelled(token.content for token in added.values())]:
        ids = encode(text)
        report.compare(f"{name}: encode {text!r}", ours.encode(text), ids)
        report.compare(f"{name}: decode {ids}", ours.decode(ids), decode(ids))
    for text in [*TEXTS, *_spelled(token.content for token in added.values() if token.special)]:
        report.compare(f"{name}: encode {text!r} as text", ours.encode(text, special=False), encode(text, split=True))
    # Of a run of byte tokens that is not UTF-8 the reference gives one U+FFFD for each, even for its valid ones.
    pieces = [i for i in range(len(theirs)) if not re.fullmatch("<0x..>", theirs.convert_ids_to_tokens(i) or "")]
    for start in range(0, len(pieces), 5000):
        part = pieces[start : start + 5000 : 7]
        report.compare(f"{name}: decode ids {part[0]}, {part[1]}, ...", ours.decode(part), decode(part))
    report.compare(f"{name}: bos_id", ours.bos_id, theirs.bos_token_id)
    begun, theirs_begun = ours.encode("Hi", begins=True), theirs.encode("Hi")
    asked = config.is_file() and json.loads(config.read_text("utf-8")).get("add_bos_token")
    if asked and begun == [theirs.bos_token_id, *theirs_begun]:
        report.set_apart("transformers 5 leaves add_bos_token unread beside a tokenizer.json")
    else:
        report.compare(f"{name}: Hi at the beginning", begun, theirs_begun)
    report.compare(f"{name}: ends", theirs.eos_token_id is None or theirs.eos_token_id in ours.eos_ids, True)
    special = {*theirs.all_special_ids, *ours.special_ids}
    report.compare(f"{name}: ends that are not special", sorted(ours.eos_ids - special), [])


def _spelled(tokens: Iterable[str]) -> list[str]:
    """Texts that spell tokens, each alone, between words and between spaces; of many tokens a few."""
    some = sorted(set(tokens))
    some = some[:: max(len(some) // 40, 1)]
    return [text for token in some for text in (token, f"a{token}b", f"one  {token}  two\n{token}\n")]


def _compare_sentencepiece(name: str, path: Path, report: Report) -> None:
    """A tokenizer.model against the sentencepiece library, which takes control pieces for text."""
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copy(path, Path(scratch) / "tokenizer.model")
        ours = load_tokenizer(Path(scratch))
    control = [theirs.id_to_piece(i) for i in range(theirs.vocab_size()) if theirs.is_control(i)]
    for text in [*TEXTS, *_spelled(control)]:
        ids = theirs.encode(text)
        report.compare(f"{name}: encode {text!r} as text", ours.encode(text, special=False), ids)
        report.compare(f"{name}: decode {ids}", ours.decode(ids), theirs.decode(ids))
    for kind, ours_id, theirs_id in (("bos", ours.bos_id, theirs.bos_id()), ("eos", ours.eos_ids, {theirs.eos_id()})):
        report.compare(f"{name}: {kind}", ours_id, theirs_id)


def _compare_tiktoken(name: str, path: Path, report: Report) -> None:
    """A table of ranks, of which Qwen's is known by its name, against the tiktoken library."""
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copy(path, scratch)
        ours = load_tokenizer(Path(scratch))
    ranks = tiktoken.load.load_tiktoken_bpe(str(path))
    theirs = tiktoken.Encoding(path.name, pat_str=QWEN_WORDS, mergeable_ranks=ranks, special_tokens={})
    for text in TEXTS:
        ids = theirs.encode_ordinary(unicodedata.normalize("NFC", text))  # as Qwen's own code does
        report.compare(f"{name}: encode {text!r} as text", ours.encode(text, special=False), ids)
        report.compare(f"{name}: decode {ids}", ours.decode(ids), theirs.decode(ids))


def _compare_gguf(name: str, path: Path, report: Report) -> None:
    """A GGUF vocabulary against the vectors beside it, and against itself: what is encoded decodes to the text."""
    with open_checkpoint(path) as opened:
        ours = gguf_tokenizer(opened.metadata)
    inputs, outputs = (path.with_name(f"{path.name}.{kind}") for kind in ("inp", "out"))
    if inputs.is_file():
        texts = inputs.read_bytes().decode().removesuffix(SEPARATOR).split(SEPARATOR)
        for text, line in zip(texts, outputs.read_text().splitlines(), strict=True):
            ids = [int(token) for token in line.split()]
            report.compare(f"{name}: encode {text!r}", ours.encode(text, special=False), ids)
    for text in TEXTS:
        back = ours.decode(ours.encode(text, special=False))
        report.compare(f"{name}: there and back", _normalized(back), _normalized(text))


def _normalized(text: str) -> str:
    """Without what vocabularies do not keep: how a character is composed, and SentencePiece's own space."""
    return unicodedata.normalize("NFC", text).replace("\u2581", " ")
