"""Text to token ids and back, from the files of a model folder or a GGUF vocabulary.

All become one `tokenizers.Tokenizer`, which encodes. Decoding is done here, byte by byte: streaming then
is the same thing as decoding, and a character whose bytes lie in several tokens is never cut.
"""

import codecs
import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from numoe.engine.text.folder_vocabulary import read_folder
from numoe.engine.text.folder_vocabulary import require_tokenizer as require_tokenizer
from numoe.engine.text.gguf_vocabulary import read_metadata
from numoe.engine.text.library import library
from numoe.engine.text.vocabulary import BYTE_OF, SPACE
from numoe.quant.errors import InputError

_HIGHEST_ID = 1 << 24  # the largest vocabularies have a million tokens; tables are made as long as this says


class Tokenizer:
    """A vocabulary and the rules that go with it.

    bos_id: the id that begins a sequence, None if the vocabulary has none.
    add_bos: whether the model expects it before a text that does not begin with it already.
    eos_ids: every id that ends an answer. special_ids: the ids that the vocabulary marks as special.
    special_tokens: the texts of bos_token, eos_token, unk_token and pad_token, as chat templates name them.
    chat_template: the model's Jinja template, None if it ships none.
    notes: sentences for whoever runs the model, on what had to be guessed.
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
        pieces: Sequence[str] | None = None,
        notes: Iterable[str] = (),
    ) -> None:
        """pieces: the spelling of every id, where the file lists them: some list one twice, and both ids say it."""
        self._backend = backend
        self._added = backend.get_added_tokens_decoder()
        self._pieces = pieces
        self._byte_level, self._strips_space = _decoding(backend)
        self._bytes: dict[int, bytes] = {}
        self.bos_id = bos_id
        self.eos_ids = frozenset(eos_ids)
        self.add_bos = add_bos and bos_id is not None
        self.special_ids = self._spelled_like(token.content for token in self._added.values() if token.special)
        self.special_tokens = dict(special_tokens)
        self.chat_template = chat_template
        self.notes = tuple(notes)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest token id. A model may have more rows than this: padding.

        Raises InputError when the ids leave gaps that no model has.
        """
        if self._pieces is not None:
            return len(self._pieces)
        highest: int = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)
        if highest >= _HIGHEST_ID:
            raise InputError(f"the vocabulary has a token with the id {highest}; fetch the tokenizer files again")
        return highest + 1

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
        with library("the text cannot be cut into tokens", "use the model's original tokenizer files"):
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
            # A marker that the text spells has its id among these; the second tokenizer takes a second to build.
            if not special and not self._marker_ids.isdisjoint(ids):
                ids = self._markerless.encode(text, add_special_tokens=False).ids
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
        token = self._piece(token_id)
        if token is None:
            raise InputError(f"There is no token {token_id}; ids go from 0 to {self.vocab_size - 1}.")
        return token

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one id stands for, b"" outside the vocabulary."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spelled(token_id)
        return known

    def _piece(self, token_id: int) -> str | None:
        if self._pieces is not None:
            return self._pieces[token_id] if 0 <= token_id < len(self._pieces) else None
        token: str | None = self._backend.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        return token

    def _spelled_like(self, texts: Iterable[str]) -> frozenset[int]:
        """The ids of added tokens with these texts."""
        wanted = frozenset(texts)
        if self._pieces is not None:
            return frozenset(i for i, piece in enumerate(self._pieces) if piece in wanted)
        return frozenset(i for i, token in self._added.items() if token.content in wanted)

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return self._spelled_like(token.content for token in self._added.values())

    def _spelled(self, token_id: int) -> bytes:
        token = self._piece(token_id)
        if token is None:
            return b""
        if self._byte_level:
            if token_id in self._added_ids or not BYTE_OF.keys() >= set(token):
                return token.encode("utf-8")
            return bytes(BYTE_OF[character] for character in token)
        if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
            return bytes.fromhex(byte[1])
        return token.replace(SPACE, " ").encode("utf-8")

    @cached_property
    def marker_spellings(self) -> frozenset[str]:
        """The texts of special tokens and chat markers, none of which `special=False` turns into its id.

        Markers are what the chat template spells, as in transformers (`_get_control_tokens`): other added tokens are
        ordinary text, such as HTML's tags in Gemma's vocabulary. Without a template what looks like one counts.
        """
        return frozenset(t.content for t in self._added.values() if t.special or self._marks(t.content))

    def _marks(self, text: str) -> bool:
        if self.chat_template and not self.chat_template.isspace():
            return text in self.chat_template and not text.isspace()
        return text.startswith(("<", "[")) or re.search("[|｜]", text) is not None

    def marker_variants(self, text: str) -> frozenset[str]:
        """What in a text is no marker's spelling, and is turned into one all the same: `＜think＞` by NFKC."""
        markers = self.marker_spellings
        normalized = any(token.normalized and token.content in markers for token in self._added.values())
        if self._backend.normalizer is None or not normalized:
            return frozenset()
        with library("the prompt cannot be cut into tokens", "use the model's original tokenizer files"):
            found = self._backend.encode(text, add_special_tokens=False)
        spans = (span for i, span in zip(found.ids, found.offsets, strict=True) if i in self._marker_ids)
        return frozenset(text[slice(*span)].strip() for span in spans) - markers

    @cached_property
    def _marker_ids(self) -> frozenset[int]:
        return self._spelled_like(self.marker_spellings)

    @cached_property
    def _markerless(self) -> tokenizers.Tokenizer:
        """The same vocabulary, with every special token and chat marker deaf to text."""
        self.vocab_size  # noqa: B018  refuses ids with gaps, which would all be written
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
        with library(
            "the vocabulary has markers that it cannot do without", "use the model's original tokenizer files"
        ):
            backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
        backend.encode_special_tokens = True
        return backend


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


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder. Raises InputError naming the file that is missing or malformed."""
    return Tokenizer(**vars(read_folder(folder)))


def gguf_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata. Raises InputError naming the key that is missing or malformed."""
    return Tokenizer(**vars(read_metadata(metadata)))
