"""Tokenizers from every kind of vocabulary, against the libraries that made them; streaming; bad files."""

import json
import os
import struct
import sys
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from vocabularies import BACKEND, CORPUS, MARKERS, SPECIALS, byte_level_backend, plain, sentencepiece_folder

from numoe.engine.text.sentencepiece import PieceType, parse_sentencepiece
from numoe.engine.text.tokenizer import Tokenizer, gguf_tokenizer, load_tokenizer, require_tokenizer
from numoe.engine.text.vocabulary import PRE_TOKENIZERS, joins
from numoe.quant.errors import InputError

GOLDEN = Path(__file__).parents[1] / "golden"
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
byte_level_text = st.lists(st.one_of(texts, st.sampled_from([*SPECIALS, *MARKERS])), max_size=8).map("".join)


def write_folder(folder: Path, backend: tokenizers.Tokenizer = BACKEND, **files: Any) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), "utf-8")
    return folder


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {
        "byte_level": plain(BACKEND),
        "unigram": sentencepiece_folder(tmp_path_factory.mktemp("unigram"), "unigram"),
        "bpe": sentencepiece_folder(tmp_path_factory.mktemp("bpe"), "bpe"),
    }


KINDS = ["byte_level", "unigram", "bpe"]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_streamed_pieces_join_to_the_decoded_text(loaded: dict[str, Tokenizer], kind: str, data: st.DataObject) -> None:
    tokenizer = loaded[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30))
    skip = data.draw(st.booleans())
    stream = tokenizer.stream(skip)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip)


@given(st.lists(st.integers(0, BACKEND.get_vocab_size() - len(MARKERS) - 1), max_size=30))
@settings(max_examples=100, deadline=None)
def test_decoding_agrees_with_the_library_on_any_ids(ids: list[int]) -> None:
    assert plain(BACKEND).decode(ids) == BACKEND.decode(ids, skip_special_tokens=False)
    assert plain(BACKEND).decode(ids, skip_special=True) == BACKEND.decode(ids, skip_special_tokens=True)


@given(byte_level_text)
@settings(max_examples=100, deadline=None)
def test_no_piece_of_a_stream_holds_half_a_character(text: str) -> None:
    tokenizer = plain(BACKEND)
    stream = tokenizer.stream()
    joined = ""
    for token_id in tokenizer.encode(text):
        joined += stream.push(token_id)
        assert text.startswith(joined)
    assert joined == text and stream.flush() == ""


@given(byte_level_text)
@settings(max_examples=100, deadline=None)
def test_untrusted_text_never_becomes_a_special_token(text: str) -> None:
    tokenizer = plain(BACKEND)
    ids = tokenizer.encode(text, special=False)
    assert tokenizer.marker_spellings == {*SPECIALS, *MARKERS}
    assert not set(ids) & {BACKEND.token_to_id(t) for t in SPECIALS + MARKERS}
    assert tokenizer.decode(ids) == text


def test_only_what_the_template_spells_is_a_marker() -> None:
    """Gemma's vocabulary has HTML's tags as tokens of their own, which are text like any other."""
    backend = tokenizers.Tokenizer.from_str(BACKEND.to_str())
    backend.add_tokens([AddedToken("<table>", special=False), AddedToken("<turn>", special=False)])
    template = "{% for m in messages %}<turn>{{ m.content }}{% endfor %}"
    tokenizer = Tokenizer(
        backend, bos_id=None, eos_ids=[], add_bos=False, special_tokens={}, chat_template=template
    )  # fmt: skip
    assert tokenizer.encode("<table>", special=False) == [backend.token_to_id("<table>")]
    assert backend.token_to_id("<turn>") not in tokenizer.encode("<turn>", special=False)
    assert not set(tokenizer.encode("".join(SPECIALS), special=False)) & {backend.token_to_id(t) for t in SPECIALS}


def small_vocabulary(kind: str) -> Tokenizer:
    """A vocabulary in which markers are found by every way there is: before and after normalization, as pieces."""
    markers = ["<a>", "A|b"]
    if kind == "unigram":
        pieces = ["<unk>", *markers, "<", ">", "|", "a", "A", "b", "aA", "<a", "\u2581"]
        backend = tokenizers.Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], 0, False))
    else:
        letters = {letter: i for i, letter in enumerate("<>|aAb \u2581")}
        backend = tokenizers.Tokenizer(models.BPE(letters | {"<a": 8, "<a>": 9}, [("<", "a"), ("<a", ">")]))
    backend.normalizer = normalizers.NFKC()
    backend.decoder = decoders.Fuse()
    flags = {"normalized": kind != "bpe", "lstrip": kind == "unigram"}
    backend.add_tokens([AddedToken("<a>", special=True, **flags), AddedToken("A|b", special=False, **flags)])
    backend.add_tokens([AddedToken("aA", special=False, normalized=False)])
    return plain(backend)


@pytest.mark.parametrize("kind", ["bpe", "normalized", "unigram"])
@given(text=st.text("<>|aAb ＜＞｜", max_size=12))
@settings(max_examples=150, deadline=None)
def test_text_without_markers_needs_no_second_vocabulary(kind: str, text: str) -> None:
    tokenizer, second = small_vocabulary(kind), small_vocabulary(kind)
    assert tokenizer.encode(text, special=False) == second._markerless.encode(text, add_special_tokens=False).ids
    assert "_markerless" not in vars(tokenizer) or set(tokenizer.encode(text)) & tokenizer._marker_ids


def test_untrusted_text_in_sentencepiece_vocabularies(loaded: dict[str, Tokenizer]) -> None:
    for kind in ("unigram", "bpe"):
        tokenizer = loaded[kind]
        assert tokenizer.encode("<s>a</s>")[0] == tokenizer.bos_id == 1
        assert not set(tokenizer.encode("<s>a</s>", special=False)) & {1, 2}


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sentencepiece_models_encode_as_the_library_does(loaded: dict[str, Tokenizer], kind: str) -> None:
    golden = json.loads((GOLDEN / f"sentencepiece_{kind}.json").read_text("utf-8"))
    for text, ids, decoded in zip(golden["texts"], golden["ids"], golden["decoded"], strict=True):
        assert loaded[kind].encode(text) == ids, text
        if kind == "bpe":  # the library writes " ⁇ " for the unknown piece, which the unigram model has
            assert loaded[kind].decode(ids) == decoded, text


@given(texts.filter(lambda text: "\u2581" not in text and "<" not in text))
@settings(max_examples=60, deadline=None)
def test_byte_fallback_keeps_every_text(loaded: dict[str, Tokenizer], text: str) -> None:
    assert loaded["bpe"].decode(loaded["bpe"].encode(text)) == text


def test_the_first_space_is_dropped_once_and_only_at_the_start(loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded["bpe"]
    stream = tokenizer.stream(skip_special=True)
    ids = [1, *tokenizer.encode("  two")]
    assert "".join(map(stream.push, ids)) == "  two"
    assert tokenizer.decode(ids) == "<s>   two"


# --------------------------------------------------------------------------------------------------------- folders


def test_ids_named_by_the_configuration_files(tmp_path: Path) -> None:
    write_folder(
        tmp_path,
        special_tokens_map={"bos_token": {"content": "<s>"}, "pad_token": "</s>"},
        tokenizer_config={"bos_token": "<|im_start|>", "eos_token": "</s>", "add_bos_token": True},
        generation_config={"eos_token_id": [3, 5]},
    )
    tokenizer = load_tokenizer(tmp_path)
    end = BACKEND.token_to_id("</s>")
    assert tokenizer.token(tokenizer.bos_id or 0) == "<s>" and tokenizer.add_bos
    assert tokenizer.eos_ids == {3, 5, end}
    assert tokenizer.special_ids == {BACKEND.token_to_id(t) for t in SPECIALS}
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    assert tokenizer.vocab_size == BACKEND.get_vocab_size()


def test_the_post_processor_decides_about_bos_where_the_configuration_does_not(tmp_path: Path) -> None:
    backend = byte_level_backend()
    backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", backend.token_to_id("<s>"))])
    write_folder(tmp_path, backend, tokenizer_config={"bos_token": "<s>"})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.add_bos
    assert tokenizer.encode("a") == [backend.token_to_id("a")], "encode itself adds none"
    write_folder(tmp_path, backend, tokenizer_config={"bos_token": "<s>", "add_bos_token": False})
    assert not load_tokenizer(tmp_path).add_bos
    write_folder(tmp_path, backend, tokenizer_config={"add_bos_token": True})
    assert not load_tokenizer(tmp_path).add_bos, "there is no BOS to add"


def test_chat_templates_in_each_place(tmp_path: Path) -> None:
    assert load_tokenizer(write_folder(tmp_path)).chat_template is None
    assert load_tokenizer(write_folder(tmp_path, tokenizer_config={"chat_template": "one"})).chat_template == "one"
    entries = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "two"}]
    assert load_tokenizer(write_folder(tmp_path, tokenizer_config={"chat_template": entries})).chat_template == "two"
    (tmp_path / "chat_template.jinja").write_text("three", "utf-8")
    assert load_tokenizer(tmp_path).chat_template == "three"


def test_bad_folders_are_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no tokenizer that numoe reads \(tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1', "utf-8")
    with pytest.raises(InputError, match=r"tokenizer\.json is not valid JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", "utf-8")
    with pytest.raises(InputError, match=r"tokenizer\.json is not a valid tokenizer"):
        load_tokenizer(tmp_path)
    write_folder(tmp_path, tokenizer_config={"eos_token": "<nowhere>"})
    with pytest.raises(InputError, match=r"'<nowhere>' as its eos_token"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[", "utf-8")
    with pytest.raises(InputError, match=r"tokenizer_config\.json is not valid JSON"):
        load_tokenizer(tmp_path)
    write_folder(tmp_path, tokenizer_config={}, generation_config={"eos_token_id": "x"})
    with pytest.raises(InputError, match=r"generation_config\.json has an eos_token_id"):
        load_tokenizer(tmp_path)
    backend = byte_level_backend()
    backend.decoder = decoders.WordPiece()
    write_folder(tmp_path, backend, generation_config={})
    with pytest.raises(InputError, match=r"decoder of type 'WordPiece'"):
        load_tokenizer(tmp_path)


TRUNCATION = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
PADDING = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
PADDING |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"}


def test_text_is_neither_truncated_nor_padded(tmp_path: Path) -> None:
    spec = json.loads(BACKEND.to_str())
    settings: list[dict[str, Any]] = [{"padding": PADDING | {"strategy": {"Fixed": n}}} for n in (64, 10**9, 10**30)]
    settings += [{"padding": PADDING | {"pad_to_multiple_of": 0}}, {"truncation": TRUNCATION}]
    settings += [{"truncation": TRUNCATION | {"stride": stride}} for stride in (5, -1, 10**30)]
    for changed in settings:
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec | changed), "utf-8")
        tokenizer = load_tokenizer(tmp_path)
        for special in (True, False):
            assert tokenizer.encode(CORPUS[0], special) == BACKEND.encode(CORPUS[0]).ids, changed


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
)


SAID = "{{{{ m.content }}}}"
ROLES = f"{{{{% if m.role == '{{}}' %}}}}{{{{% if x %}}}}{SAID}{{{{% endif %}}}}{{}}{SAID}<|says_end|>{{{{% endif %}}}}"


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({"config": {"eos_token_id": 4}}, {4}),
        ({"config": {"eos_token_id": [4, 5]}, "generation_config": {}}, {4, 5}),
        ({"config": {"eos_token_id": 4}, "generation_config": {"eos_token_id": [6, 7]}}, {6, 7}),
        ({"config": {"text_config": {"eos_token_id": [4]}}}, {4}),
        ({"config": {"eos_token_id": -1}}, set()),
        ({"tokenizer_config": {"chat_template": CHATML}}, {"<|im_end|>"}),
        ({"tokenizer_config": {"chat_template": CHATML.replace("im_end", "says_end")}}, {"<|says_end|>"}),
        (
            {"tokenizer_config": {"chat_template": "{% if m.role == 'user' %}{{ m.content }}<|says_end|>{% endif %}"}},
            set(),
        ),
        ({"tokenizer_config": {"chat_template": ROLES.format("user", "{% else %}")}}, {"<|says_end|>"}),
        ({"tokenizer_config": {"chat_template": ROLES.format("assistant", "{% else %}")}}, set()),
        ({"tokenizer_config": {"chat_template": ROLES.format("user", "{% endif %}{% if a %}")}}, {"<|says_end|>"}),
        ({"tokenizer_config": {"chat_template": "{{ m.content + '<|tools|>' }}{{ m.content + '</s>' }}"}}, {"</s>"}),
        (
            {"tokenizer_config": {"chat_template": "<|call|><|return|>{{ m.content + '<|end|>' }}"}},
            {"<|call|>", "<|return|>"},
        ),
    ],
)
def test_ends_of_answers_in_each_place(tmp_path: Path, files: dict[str, Any], ends: set[int | str]) -> None:
    backend = byte_level_backend()
    backend.add_special_tokens(["<|im_end|>", "<|says_end|>", "<|tools|>", "<|call|>", "<|return|>", "<|end|>"])
    write_folder(tmp_path, backend, **files)
    expected = {backend.token_to_id(end) if isinstance(end, str) else end for end in ends}
    assert load_tokenizer(tmp_path).eos_ids == expected


ADDED = {"<|im_end|>": 600, "<|im_start|>": 601}
DESCRIBED = {str(i): {"content": text, "special": text == "<|im_end|>"} for text, i in ADDED.items()}
CHAT = "<s>the <|im_start|>user\nhi<|im_end|>\nthe dog"
# transformers 5.23 on the same folders (protobuf installed); `legacy` puts a space behind every special token.
LEGACY = [1, 268, 518, 601, 518, 421, 261, 14, 295, 600, 518, 14, 522, 264, 368]
ONCE = [1, 522, 264, 518, 601, 421, 261, 14, 295, 600, 14, 522, 264, 368]


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        ({"added_tokens": ADDED, "tokenizer_config": {"tokenizer_class": "LlamaTokenizer", "legacy": True}}, LEGACY),
        ({"added_tokens": ADDED, "tokenizer_config": {"tokenizer_class": "LlamaTokenizer", "legacy": False}}, ONCE),
        ({"added_tokens": ADDED, "tokenizer_config": {"tokenizer_class": "LlamaTokenizerFast"}}, ONCE),
        ({"tokenizer_config": {"added_tokens_decoder": DESCRIBED, "eos_token": "<|im_end|>"}}, LEGACY),
        ({"added_tokens": ADDED, "special_tokens_map": {"eos_token": "<|im_end|>"}}, LEGACY),
        ({"tokenizer_config": {"additional_special_tokens": ["<|im_end|>", "<|im_start|>"]}}, LEGACY),
    ],
)
def test_tokens_added_beside_a_sentencepiece_model(tmp_path: Path, files: dict[str, Any], ids: list[int]) -> None:
    for name, value in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value), "utf-8")
    tokenizer = sentencepiece_folder(tmp_path, "bpe")
    assert tokenizer.encode(CHAT) == ids
    assert tokenizer.eos_ids == {600 if "<|im_end|>" in str(files).partition("eos_token")[2] else 2}


def test_tokens_added_beside_a_tokenizer_json(tmp_path: Path) -> None:
    size = BACKEND.get_vocab_size()
    named = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    write_folder(tmp_path, added_tokens={"<|im_end|>": size, "<think>": 2}, tokenizer_config=named)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("<|im_end|><think>") == [size, BACKEND.token_to_id("<think>")]
    assert tokenizer.eos_ids == {size} <= tokenizer.special_ids
    decoder = {str(size): {"content": "<|im_end|>", "special": False}, "2": {"content": "#", "special": True}}
    write_folder(tmp_path, tokenizer_config=named | {"added_tokens_decoder": decoder})
    assert {2, size} <= load_tokenizer(tmp_path).special_ids
    write_folder(tmp_path, added_tokens={"<|im_end|>": size + 5}, tokenizer_config={})
    with pytest.raises(InputError, match=rf"added_tokens\.json: the token '<\|im_end\|>' has the id {size + 5}, but"):
        load_tokenizer(tmp_path)


def test_pieces_left_free_get_their_later_text(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {"599": {"content": "<|im_end|>", "special": True}}})
    )
    assert sentencepiece_folder(tmp_path, "bpe").encode("<|im_end|>") == [599]


def write_merges(folder: Path, **config: Any) -> Path:
    model = json.loads(BACKEND.to_str())["model"]
    (folder / "vocab.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(model["vocab"]).encode())
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]
    (folder / "merges.txt").write_bytes("\r\n".join(lines).encode())
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_vocabularies_with_their_merges(tmp_path: Path) -> None:
    """Cut as transformers' class cuts: GPT-2 keeps numbers whole, Qwen2 takes digits apart and composes characters."""
    words = {}
    for name in ("GPT2Tokenizer", "Qwen2TokenizerFast"):
        tokenizer = load_tokenizer(write_merges(tmp_path, tokenizer_class=name))
        cut = tokenizer._backend.pre_tokenizer.pre_tokenize_str("a 12")
        words[name] = [word for word, _ in cut]
        assert tokenizer.notes == () and tokenizer.decode(tokenizer.encode("It's 12 你")) == "It's 12 你"
    assert words == {"GPT2Tokenizer": ["a", "Ġ12"], "Qwen2TokenizerFast": ["a", "Ġ", "1", "2"]}
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")
    (note,) = load_tokenizer(write_merges(tmp_path)).notes
    assert "does not say how its tokenizer cuts text" in note
    with pytest.raises(InputError, match=r"add_prefix_space is not supported beside vocab\.json"):
        load_tokenizer(write_merges(tmp_path, add_prefix_space=True))


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("tiktoken.model", {"tokenizer_class": "TikTokenTokenizer"}, ["你好", "It's", " ", "123", "4", "/\n"]),
        ("tiktoken.model", {"tokenizer_class": "LlamaTokenizer"}, ["你好It", "'s", " ", "123", "4", "/\n"]),
        ("qwen.tiktoken", {}, ["你好It", "'s", " ", "1", "2", "3", "4", "/\n"]),
    ],
)
def test_tiktoken_vocabularies(tmp_path: Path, name: str, config: dict[str, Any], words: list[str]) -> None:
    tokens = [*(bytes([byte]) for byte in range(256)), b"It", b"th", b"the"]
    (tmp_path / name).write_bytes(b"".join(b"%b %d\n" % (b64encode(token), i) for i, token in enumerate(tokens)))
    decoder = {"259": {"content": "[BOS]", "special": True}, "261": {"content": "<|im_end|>", "special": True}}
    if name != "qwen.tiktoken":
        config |= {"added_tokens_decoder": decoder, "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("tthe<|im_end|>") == [116, 258, 261]
    assert 261 in tokenizer.special_ids and tokenizer.eos_ids == ({261} if decoder and config else {259})
    cut = [word for word, _ in tokenizer._backend.pre_tokenizer.pre_tokenize_str("你好It's 1234/\n")]
    letters = {c: b for b, c in enumerate(tokenizer.token(i) for i in range(256))}
    assert [bytes(letters[c] for c in word).decode() for word in cut] == words


def test_a_tokenizer_is_required_by_the_names_of_files() -> None:
    for names in (["tokenizer.json"], ["tokenizer.model", "x"], {"vocab.json", "merges.txt"}, ("tiktoken.model",)):
        require_tokenizer(names, "somewhere")
    for names in ([], ["vocab.json"], ["merges.txt"], ["sub/tokenizer.json"], ["tekken.json"]):
        with pytest.raises(InputError, match=r"^OWNER/NAME has no tokenizer that numoe reads \(tokenizer\.json, "):
            require_tokenizer(names, "OWNER/NAME")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        *(({name: LFS}, rf"{name} is a Git LFS pointer") for name in ("tokenizer.json", "tokenizer.model")),
        *(({name: LFS}, rf"{name} is a Git LFS pointer") for name in ("tiktoken.model", "qwen.tiktoken")),
        ({"vocab.json": b'{"a": 0}', "merges.txt": LFS}, r"merges\.txt is a Git LFS pointer"),
        ({"vocab.json": b'{"a": 0}', "merges.txt": b"a b c"}, "line 1 is not two tokens"),
        ({"vocab.json": b'{"a": 1.5}', "merges.txt": b""}, "not a table of tokens and their ids"),
        ({"vocab.json": b'{"a": 0, "b": 0}', "merges.txt": b"a b"}, "do not fit together"),
        ({"tiktoken.model": b"YQ=="}, "cannot be read as a tiktoken vocabulary"),
        ({"tiktoken.model": b"YQ== 1"}, "does not number its tokens from 0 on"),
        ({"tokenizer.json": b"\xff{"}, "is not UTF-8"),
        ({"tokenizer.json": b"[" * 100_000}, "nested too deeply"),
        ({"chat_template.jinja": b"\xe9"}, r"chat_template\.jinja is not UTF-8"),
        ({"added_tokens.json": b'{"<x>": "1"}'}, "'<x>' an id that is not a number"),
        ({"generation_config.json": b'{"eos_token_id": NaN}'}, r"generation_config\.json has an eos_token_id .* NaN"),
        ({"generation_config.json": b'{"eos_token_id": true}'}, "not a number: true"),
        ({"config.json": b'{"eos_token_id": ["2"]}'}, r"/config\.json has an eos_token_id that is not a number"),
    ],
)
def test_bad_files_are_refused_by_their_name(tmp_path: Path, files: dict[str, bytes], sentence: str) -> None:
    if not {"tokenizer.model", "vocab.json", "tiktoken.model", "qwen.tiktoken"} & files.keys():
        write_folder(tmp_path)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=sentence):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("bos_token", [5, [], {"content": 3}, {}, True]),
        ("chat_template", [5, {"default": 4}, [{"name": "default", "template": 4}]]),
        ("add_bos_token", ["false", 1, {}]),
        (
            "added_tokens_decoder",
            [5, [], {"x": {"content": "a"}}, {"1": 2}, {"1": {}}, {"1": {"content": "a", "lstrip": 3}}],
        ),
        ("additional_special_tokens", ["<s>", [1], 5]),
    ],
)
def test_values_of_another_type_are_refused_by_their_key(tmp_path: Path, key: str, values: list[Any]) -> None:
    for value in values:
        write_folder(tmp_path, tokenizer_config={key: value})
        with pytest.raises(InputError, match=rf"tokenizer_config\.json: {key} is .*; correct or remove it"):
            load_tokenizer(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="file systems elsewhere refuse such names")
def test_folders_whose_name_is_not_utf8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    assert load_tokenizer(write_folder(tmp_path, generation_config={"eos_token_id": 3})).eos_ids == {3}
    for file in tmp_path.glob("*.json"):
        file.rename(folder / file.name)
    assert load_tokenizer(folder).eos_ids == {3}


def test_byte_order_marks_and_other_encodings(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(BACKEND.to_str().encode("utf-16"))
    for name, text in (("tokenizer_config", '{"eos_token": "</s>"}'), ("generation_config", '{"eos_token_id": 3}')):
        (tmp_path / f"{name}.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "chat_template.jinja").write_bytes(b"\xef\xbb\xbfone\r\n")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_ids == {3, BACKEND.token_to_id("</s>")} and tokenizer.chat_template == "one\n"


def test_normalizers_that_multiply_text_are_refused(tmp_path: Path) -> None:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 50}
    steps = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Sequence", "normalizers": [step] * 9}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(BACKEND.to_str()) | {"normalizer": steps}), "utf-8")
    with pytest.raises(InputError, match=r"tokenizer\.json makes 1\.95e\+15 characters of one"):
        load_tokenizer(tmp_path)
    steps = {"type": "Prepend", "prepend": "a" * 1000}
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(BACKEND.to_str()) | {"normalizer": steps}), "utf-8")
    with pytest.raises(InputError, match=r"tokenizer\.json makes 1e\+03 characters of one"):
        load_tokenizer(tmp_path)


_SPECIAL = {"SpecialToken": {"id": "<s>", "type_id": 0}}


@pytest.mark.parametrize(
    ("single", "ids", "pieces"),
    [([{"Sequence": {"id": "A", "type_id": 0}}] * 5000, 1, "5,000"), ([_SPECIAL] * 50, 30, "1,500")],
)
def test_post_processors_that_multiply_text_are_refused(
    single: list[object], ids: int, pieces: str, tmp_path: Path
) -> None:
    special = {"<s>": {"id": "<s>", "ids": [1] * ids, "tokens": ["<s>"] * ids}}
    step = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": special}
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(BACKEND.to_str()) | {"post_processor": step}))
    with pytest.raises(InputError, match=rf"tokenizer\.json makes {pieces} pieces of every text"):
        load_tokenizer(tmp_path)


def test_ids_with_gaps_that_no_model_has_are_refused(tmp_path: Path) -> None:
    spec = json.loads(BACKEND.to_str())
    spec["model"]["vocab"] |= {"zz": (1 << 31) - 1}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    with pytest.raises(InputError, match="a token with the id 2147483647"):
        load_tokenizer(tmp_path).encode("<s>", special=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}},
    ],
)
def test_panics_of_the_library_are_sentences(tmp_path: Path, changes: Any, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(BACKEND.to_str()) | changes), "utf-8")
    with pytest.raises(InputError, match=r"tokenizer\.json is not a valid tokenizer"):
        load_tokenizer(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_text_that_makes_the_library_panic(capfd: pytest.CaptureFixture[str]) -> None:
    backend = byte_level_backend()
    backtracks = pre_tokenizers.Split(tokenizers.Regex("(x+x+)+y"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([backtracks, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    for special in (True, False):
        with pytest.raises(InputError, match="the text cannot be cut into tokens"):
            plain(backend).encode("x" * 30, special)
    assert capfd.readouterr() == ("", "")


def test_ids_that_no_model_has(tmp_path: Path) -> None:
    spec = json.loads(BACKEND.to_str())
    spec["model"]["vocab"]["far"] = 2**32 - 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    with pytest.raises(InputError, match="a token with the id 4294967295"):
        assert load_tokenizer(tmp_path).vocab_size
    with pytest.raises(InputError, match=r"There is no token"):
        plain(BACKEND).token(10**30)


def test_text_and_ids_that_do_not_exist() -> None:
    tokenizer = plain(BACKEND)
    with pytest.raises(InputError, match="surrogate"):
        tokenizer.encode("ab\ud800")
    for token_id in (-1, tokenizer.vocab_size):
        assert tokenizer.decode([token_id]) == ""
        with pytest.raises(InputError, match=f"There is no token {token_id};"):
            tokenizer.token(token_id)


# --------------------------------------------------------------------------------------------------- SentencePiece


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_sentencepiece_files_never_crash_the_parser(data: st.DataObject) -> None:
    whole = (GOLDEN / "sentencepiece_unigram.model").read_bytes()
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 3)) if damaged else 0):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        model = parse_sentencepiece(bytes(damaged), "tokenizer.model")
    except InputError as error:
        assert "tokenizer.model cannot be read as a SentencePiece model" in str(error)
    else:
        assert len(model.pieces) == len(model.scores) == len(model.types) > model.unk_id


def test_a_file_that_is_no_sentencepiece_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # a tiktoken file, which Llama 3 names the same
    with pytest.raises(InputError, match=r"put the model's tokenizer\.json beside it"):
        load_tokenizer(tmp_path)


def test_scores_that_are_no_numbers_and_endless_pieces_are_refused() -> None:
    piece = b"\x0a\x01a\x15" + struct.pack("<f", float("nan"))
    with pytest.raises(InputError, match="score is not a number"):
        parse_sentencepiece(b"\x0a" + bytes([len(piece)]) + piece, "tokenizer.model")
    with pytest.raises(InputError, match="a piece of 400000 characters"):
        joins({"a": 0.0, "a" * 400_000: -1.0})


def test_word_models_are_refused_by_their_number() -> None:
    piece = b"\x0a\x01a\x15" + struct.pack("<f", -1.0)
    data = b"\x0a" + bytes([len(piece)]) + piece + b"\x12\x02\x18\x03"  # trainer_spec.model_type = 3
    with pytest.raises(InputError, match="model_type 3"):
        parse_sentencepiece(data, "tokenizer.model")


# ------------------------------------------------------------------------------------------------------------ GGUF


def gguf_metadata(pre: str = "smollm", **changes: Any) -> dict[str, Any]:
    vocab = sorted(BACKEND.get_vocab(), key=BACKEND.get_vocab().__getitem__)
    merges = json.loads(BACKEND.to_str())["model"]["merges"]
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": vocab,
        "token_type": [3 if t in SPECIALS else 4 if t in MARKERS else 1 for t in vocab],
        "merges": [" ".join(pair) for pair in merges],
        "bos_token_id": vocab.index("<s>"),
        "eos_token_id": vocab.index("</s>"),
        "eot_token_id": vocab.index("<|im_start|>"),
    }
    values |= changes
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


@given(byte_level_text)
@settings(max_examples=100, deadline=None)
def test_gguf_vocabulary_encodes_as_the_tokenizer_it_was_made_from(text: str) -> None:
    tokenizer = GGUF
    assert tokenizer.encode(text) == BACKEND.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text


GGUF = gguf_tokenizer(gguf_metadata())


def test_gguf_special_tokens_and_template() -> None:
    metadata = gguf_metadata() | {"tokenizer.chat_template": "{{ messages }}"}
    tokenizer = gguf_tokenizer(metadata)
    assert tokenizer.eos_ids == {BACKEND.token_to_id("</s>"), BACKEND.token_to_id("<|im_start|>")}
    assert tokenizer.special_ids == {BACKEND.token_to_id(t) for t in SPECIALS}
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.chat_template == "{{ messages }}"
    assert not tokenizer.add_bos and gguf_tokenizer(gguf_metadata(add_bos_token=True)).add_bos


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["It", "'s", " 1234", " a", "  ", " b", "\n", "\n", "Xé"]),
        ("smollm", ["It", "'s", " ", "1", "2", "3", "4", " a", "  ", " b", "\n", "\n", "Xé"]),
        ("llama-bpe", ["It", "'s", " ", "123", "4", " a", "  ", " b", "\n\n", "Xé"]),
        ("qwen2", ["It", "'s", " ", "1", "2", "3", "4", " a", "  ", " b", "\n\n", "Xé"]),
        ("deepseek-v3", ["It", "'s", " ", "123", "4", " a", "  ", " b", "\n\n", "Xé"]),
        ("deepseek-llm", ["It", "'", "s", " ", "1234", " a", "  ", " b", "\n", "\n", "X", "é"]),
        ("gpt-4o", ["It's", " ", "123", "4", " a", "  ", " b", "\n\n", "Xé"]),
        ("tekken", ["It", "'s", " ", "1", "2", "3", "4", " a", "  ", " b", "\n\n", "Xé"]),
        ("seed-coder", ["It", "'s", " ", "1", "2", "3", "4", " a", "  ", " b", "\n\n", "Xé"]),
        ("viking", ["It's", " ", "1", "2", "3", "4", " a", "  ", " b", "\n\n", "Xé"]),
        ("superbpe", ["It's ", "1", "234", " a   b\n\nXé"]),
        ("tiny_aya", ["It's", " ", "1", "234", " a", "  ", " b", "\n\n", "Xé"]),
        ("afmoe", ["It", "'s", " ", "1", "234", " a", "  ", " b", "\n\n", "Xé"]),
        ("jais-2", ["It", "'s", " ", "123", "4", " a", "  ", " b", "\n\n", "Xé"]),
        ("kimi-k2", ["It's", " ", "123", "4", " a", "  ", " b", "\n\n", "Xé"]),
    ],
)
def test_text_is_cut_into_words_as_the_vocabulary_was_trained(pre: str, words: list[str]) -> None:
    pre_tokenizer = gguf_tokenizer(gguf_metadata(pre))._backend.pre_tokenizer
    tokenizer = plain(BACKEND)
    alphabet = {character: BACKEND.token_to_id(character) for character in pre_tokenizers.ByteLevel.alphabet()}
    cut = [word for word, _ in pre_tokenizer.pre_tokenize_str("It's 1234 a   b\n\nXé")]
    assert [tokenizer.decode([alphabet[c] for c in word]) for word in cut] == words


@pytest.mark.parametrize(
    ("name", "like"),
    [
        *((name, "llama-bpe") for name in ("smaug-bpe", "falcon3", "pixtral", "midm-2.0", "minicpm5", "glm4", "lfm2")),
        *((name, "qwen2") for name in ("megrez", "kormo", "stablelm2", "hunyuan", "grok-2")),
        *((name, "gpt-2") for name in ("trillion", "phi-2", "gigachat", "mpt", "exaone4")),
        *((name, "smollm") for name in ("minerva-7b", "exaone", "codeshell")),
        *((name, "deepseek-v3") for name in ("joyai-llm", "hunyuan-dense")),
    ],
)
def test_names_of_pre_tokenizers_that_cut_alike(name: str, like: str) -> None:
    assert PRE_TOKENIZERS[name] == PRE_TOKENIZERS[like]


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_keeps_every_character(pre: str) -> None:
    text = "It's 12345 a   b\n\nXé \r\n\te\u0301 中文かな한글 ¿«x»? IMGIMGABZ  "
    tokenizer = gguf_tokenizer(gguf_metadata(pre))
    assert tokenizer.decode(tokenizer.encode(text)) in (text, text.replace("e\u0301", "é"))
    assert not tokenizer.notes


def test_a_missing_pre_tokenizer_is_told() -> None:
    for pre in (None, ""):
        (note,) = gguf_tokenizer(gguf_metadata(pre=pre)).notes
        assert "does not name its pre-tokenizer" in note
    assert gguf_tokenizer(gguf_metadata("falcon3")).add_bos and not gguf_tokenizer(gguf_metadata("dbrx")).add_bos


def retyped(kinds: dict[str, int], **changes: Any) -> dict[str, Any]:
    """GGUF's keys of a vocabulary that has these tokens of these types in it, as its last ones."""
    metadata = gguf_metadata()
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    template = changes.pop("template", None)
    listed = {"tokens": [*tokens, *kinds], "token_type": [*types, *kinds.values()]}
    metadata = gguf_metadata(**(listed | {"eos_token_id": None, "eot_token_id": None} | changes))
    return metadata | ({"tokenizer.chat_template": template} if template else {})


@pytest.mark.parametrize(
    ("metadata", "ends"),
    [
        (retyped({"<|im_end|>": 3, "<|eot_id|>": 1, "<EOT>": 4}), {"</s>", "<|im_end|>"}),
        (retyped({"<|im_end|>": 1}, template=CHATML), {"</s>", "<|im_end|>"}),
        (retyped({"<|says_end|>": 3}, template=CHATML.replace("im_end", "says_end")), {"</s>", "<|says_end|>"}),
        (retyped({"<|return|>": 3, "<|call|>": 3, "<|end|>": 3}), {"</s>", "<|return|>", "<|call|>"}),
        (retyped({}, eos_token_id=[5, 6]), {"</s>", 5, 6}),
        (retyped({}, eos_token_ids=[5, 6], eom_token_id=7, eot_token_id=2**32 - 1), {"</s>", 5, 6, 7}),
        (retyped({}, token_type=None, tokens=gguf_metadata()["tokenizer.ggml.tokens"]), set()),
    ],
)
def test_ends_of_answers_in_gguf_files(metadata: dict[str, Any], ends: set[int | str]) -> None:
    tokenizer = gguf_tokenizer(metadata)
    tokens = metadata["tokenizer.ggml.tokens"]
    assert tokenizer.eos_ids == {tokens.index(end) if isinstance(end, str) else end for end in ends}
    for end in ends & set(tokens):
        assert tokenizer.encode(str(end)) == [tokens.index(end)], "also one that was typed as a plain token"


def test_ids_of_special_tokens_that_are_no_tokens() -> None:
    for none in (-1, 2**32 - 1, 10**6):
        tokenizer = gguf_tokenizer(gguf_metadata(padding_token_id=none, unknown_token_id=none, seperator_token_id=none))
        assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert gguf_tokenizer(gguf_metadata(bos_token_id=2**32 - 1)).bos_id is None


def test_special_tokens_that_older_gguf_files_leave_out(loaded: dict[str, Tokenizer]) -> None:
    model = parse_sentencepiece((GOLDEN / "sentencepiece_bpe.model").read_bytes(), "bpe")
    values = {"model": "llama", "tokens": model.pieces, "scores": model.scores}
    for types in (model.types, None):
        named = values | ({"token_type": types} if types else {})
        tokenizer = gguf_tokenizer({f"tokenizer.ggml.{key}": value for key, value in named.items()})
        assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos) == (1, {2}, True)
    # Of byte-level vocabularies llama.cpp takes 11, which is an ordinary token of most.
    assert gguf_tokenizer(gguf_metadata(bos_token_id=None, eos_token_id=None)).bos_id is None


def test_of_two_equal_tokens_both_say_their_text() -> None:
    metadata = retyped({"Ġdup": 1, "<|x|>": 3})
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "Ġdup", "<|x|>"]
    metadata["tokenizer.ggml.token_type"] += [1, 3]
    tokenizer = gguf_tokenizer(metadata)
    size = tokenizer.vocab_size
    assert tokenizer.decode(range(size - 4, size)) == " dup<|x|> dup<|x|>"
    assert {size - 3, size - 1} <= tokenizer.special_ids


def test_gguf_sentencepiece_vocabulary_encodes_as_the_model_it_was_made_from(loaded: dict[str, Tokenizer]) -> None:
    model = parse_sentencepiece((GOLDEN / "sentencepiece_bpe.model").read_bytes(), "bpe")
    values = {"model": "llama", "tokens": model.pieces, "scores": model.scores, "token_type": model.types}
    values |= {"bos_token_id": 1, "eos_token_id": 2}
    tokenizer = gguf_tokenizer({f"tokenizer.ggml.{key}": value for key, value in values.items()})
    assert tokenizer.add_bos and tokenizer.bos_id == 1 and tokenizer.eos_ids == {2}
    golden = json.loads((GOLDEN / "sentencepiece_bpe.json").read_text("utf-8"))
    assert [tokenizer.encode(text) for text in golden["texts"]] == golden["ids"]


def test_gguf_vocabulary_of_gemma_4_joins_by_its_merges() -> None:
    model = parse_sentencepiece((GOLDEN / "sentencepiece_bpe.model").read_bytes(), "bpe")
    plain = (PieceType.NORMAL, PieceType.USER_DEFINED)
    entries = zip(model.pieces, model.scores, model.types, strict=True)
    merges = [" ".join(pair) for pair in joins({piece: score for piece, score, kind in entries if kind in plain})]
    values = {"tokens": model.pieces, "token_type": model.types, "bos_token_id": 1, "eos_token_id": 2}
    by_scores = {"model": "llama", "scores": model.scores, "add_space_prefix": False}
    by_merges = {"model": "gemma4", "merges": merges, "scores": [-1000.0] * len(model.pieces), "add_bos_token": False}
    right, tokenizer = (
        gguf_tokenizer({f"tokenizer.ggml.{key}": value for key, value in (values | more).items()})
        for more in (by_scores, by_merges)
    )
    assert tokenizer.add_bos and tokenizer.bos_id == 1 and tokenizer.eos_ids == {2}
    for text in json.loads((GOLDEN / "sentencepiece_bpe.json").read_text("utf-8"))["texts"]:
        assert tokenizer.encode(text) == right.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == right.decode(right.encode(text))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": "gemma4", "merges": None}, r"no tokenizer\.ggml\.merges"),
        ({"model": "t5"}, r"tokenizer\.ggml\.model is 't5'"),
        ({"model": 5}, r"tokenizer\.ggml\.model is '5', not a text"),
        ({"pre": ["x"]}, r"tokenizer\.ggml\.pre is .*, not a text"),
        ({"tokens": "abc"}, r"tokenizer\.ggml\.tokens is 'abc', not a list"),
        ({"token_type": ["3"]}, r"tokenizer\.ggml\.token_type is .*, not a list"),
        ({"token_type": 3}, r"tokenizer\.ggml\.token_type is '3', not a list"),
        ({"model": "llama", "scores": ["a"]}, r"tokenizer\.ggml\.scores is .*, not a list"),
        ({"model": "llama", "scores": [float("nan")]}, r"tokenizer\.ggml\.scores is 'nan'"),
        ({"add_bos_token": "no"}, r"tokenizer\.ggml\.add_bos_token is 'no', not true or false"),
        ({"eos_token_id": "2"}, r"tokenizer\.ggml\.eos_token_id is '2', not a whole number"),
        ({"eos_token_id": 2.0}, r"tokenizer\.ggml\.eos_token_id is '2\.0', not a whole number"),
        ({"eos_token_id": True}, r"tokenizer\.ggml\.eos_token_id is 'True', not a whole number"),
        ({"eos_token_id": -7}, r"tokenizer\.ggml\.eos_token_id is -7"),
        ({"eos_token_ids": [2, "3"]}, r"tokenizer\.ggml\.eos_token_ids is .*, not a whole number"),
        ({"bos_token_id": [2]}, r"tokenizer\.ggml\.bos_token_id is '\[2\]', not a whole number"),
        ({"pre": "unheard-of"}, r"tokenizer\.ggml\.pre is 'unheard-of'.*its safetensors"),
        ({"tokens": None}, r"no tokenizer\.ggml\.tokens"),
        ({"merges": None}, r"no tokenizer\.ggml\.merges"),
        ({"merges": ["abc"]}, "'abc', which is not two tokens"),
        ({"merges": ["Ġ 木"]}, "do not fit together"),
        ({"token_type": [1]}, r"token_type has 1 entries"),
        ({"eos_token_id": 10**6}, r"eos_token_id is 1000000"),
        ({"model": "llama", "scores": [0.0]}, r"scores has 1 entries"),
    ],
)
def test_bad_gguf_vocabularies_are_refused_by_their_key(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        gguf_tokenizer(gguf_metadata(**changes))
