"""Tokenizers from every kind of vocabulary, against the libraries that made them; streaming; bad files."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from numoe.engine.sentencepiece import parse_sentencepiece
from numoe.engine.tokenizer import Tokenizer, gguf_tokenizer, load_tokenizer
from numoe.quant.errors import InputError

GOLDEN = Path(__file__).parent / "golden"
SPECIALS = ["<s>", "</s>", "<|im_start|>"]
MARKERS = ["<think>", "｜DSML｜"]  # added to the vocabulary but not marked special, as DeepSeek's are
CORPUS = ["the quick brown fox jumps over the lazy dog", "It's 12 o'clock, 345 times", "你好 мир 🎉 the the the dog"]

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
byte_level_text = st.lists(st.one_of(texts, st.sampled_from([*SPECIALS, *MARKERS])), max_size=8).map("".join)


def byte_level_backend() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKERS])
    return backend


BACKEND = byte_level_backend()


def plain(backend: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(backend, bos_id=None, eos_ids=[], add_bos=False, special_tokens={}, chat_template=None)


def write_folder(folder: Path, backend: tokenizers.Tokenizer = BACKEND, **files: Any) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), "utf-8")
    return folder


def sentencepiece_folder(folder: Path, kind: str) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes((GOLDEN / f"sentencepiece_{kind}.model").read_bytes())
    return load_tokenizer(folder)


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
    ],
)
def test_text_is_cut_into_words_as_the_vocabulary_was_trained(pre: str, words: list[str]) -> None:
    pre_tokenizer = gguf_tokenizer(gguf_metadata(pre))._backend.pre_tokenizer
    tokenizer = plain(BACKEND)
    alphabet = {character: BACKEND.token_to_id(character) for character in pre_tokenizers.ByteLevel.alphabet()}
    cut = [word for word, _ in pre_tokenizer.pre_tokenize_str("It's 1234 a   b\n\nXé")]
    assert [tokenizer.decode([alphabet[c] for c in word]) for word in cut] == words


def test_gguf_sentencepiece_vocabulary_encodes_as_the_model_it_was_made_from(loaded: dict[str, Tokenizer]) -> None:
    model = parse_sentencepiece((GOLDEN / "sentencepiece_bpe.model").read_bytes(), "bpe")
    values = {"model": "llama", "tokens": model.pieces, "scores": model.scores, "token_type": model.types}
    values |= {"bos_token_id": 1, "eos_token_id": 2}
    tokenizer = gguf_tokenizer({f"tokenizer.ggml.{key}": value for key, value in values.items()})
    assert tokenizer.add_bos and tokenizer.bos_id == 1 and tokenizer.eos_ids == {2}
    golden = json.loads((GOLDEN / "sentencepiece_bpe.json").read_text("utf-8"))
    assert [tokenizer.encode(text) for text in golden["texts"]] == golden["ids"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": "t5"}, r"tokenizer\.ggml\.model is 't5'"),
        ({"pre": "unheard-of"}, r"tokenizer\.ggml\.pre is 'unheard-of'"),
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
