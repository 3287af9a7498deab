"""Byte-level BPE tokenizers of the kinds that LLaMA 3 and CLIP have, run by huggingface/tokenizers.

Files say what the library does with a text, regular expressions among it, so that only what those two do is let
through; all else is refused by its name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from ...system.plain_text import short, shown

Part = Mapping[str, Any]

LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CLIP_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
MARKED_CLIP_SPLIT = rf"<\|startoftext\|>|<\|endoftext\|>|{CLIP_SPLIT}"  # as transformers writes it
SPLITS = (LLAMA_SPLIT, CLIP_SPLIT, MARKED_CLIP_SPLIT)
WHITE_SPACE = r"\s+"
MOST_IDS = 1 << 24
MOST_PARTS = 8


class BytePairTokenizer:
    """Turns a text into ids, with the ids `first` and `last` around them.

    `model`, `added_tokens`, `pre_tokenizer` and `normalizer` are as in a `tokenizer.json`. ValueError, which names the
    part, where one is neither LLaMA 3's nor CLIP's or they do not fit together.
    """

    def __init__(
        self,
        model: Part,
        added_tokens: Sequence[Part],
        pre_tokenizer: Part | None,
        normalizer: Part | None = None,
        first: Sequence[int] = (),
        last: Sequence[int] = (),
    ):
        try:
            _check_model(model)
            _check_parts(_flat(pre_tokenizer, "pretokenizers"), "pre_tokenizer", _check_pre_tokenizer)
            _check_parts(_flat(normalizer, "normalizers"), "normalizer", _check_normalizer)
            if pre_tokenizer is None:
                raise refused("pre_tokenizer", None, "Split and ByteLevel")
            added = [_added(entry) for entry in added_tokens]
            parts = {"added_tokens": added, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
            self._tokenizer = _built({"version": "1.0", **parts, "model": {**model, "type": "BPE"}})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it is incomplete ({short(repr(error))})") from error
        self._added = {entry["content"]: entry["id"] for entry in added}
        self.first, self.last = tuple(first), tuple(last)
        self.max_id = max(self._tokenizer.get_vocab().values(), default=-1)
        self._check_ids()

    def encode(self, text: str, max_tokens: int | None = None) -> list[int]:
        """Ids with those around them; of a text that has more than `max_tokens` the end is left out, not they."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate is no character
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if max_tokens is not None:
            ids = ids[: max(0, max_tokens - len(self.first) - len(self.last))]
        return [*self.first, *ids, *self.last]

    def token_id(self, content: str) -> int | None:
        """The id of an added token; None where the tokenizer has no such one."""
        return self._added.get(content)

    def _check_ids(self) -> None:
        for content, token_id in self._added.items():
            if self._tokenizer.token_to_id(content) != token_id:
                raise ValueError(f"its added token {shown(content)} is not the id {token_id!r} of its vocabulary")
        for token_id in (*self.first, *self.last):
            if not (_is_id(token_id) and token_id <= self.max_id):
                raise ValueError(f"it puts the id {shown(token_id)} around a text; expected one up to {self.max_id}")


def refused(part: str, given: object, expected: str) -> ValueError:
    """The error for a part that neither LLaMA 3 nor CLIP has."""
    return ValueError(f"its {part} is {shown(given)}; expected {expected}, as LLaMA 3 and CLIP have")


def _built(parts: Part) -> Tokenizer:
    try:
        return Tokenizer.from_str(json.dumps(parts))
    except BaseException as error:  # the library raises nothing narrower, and what is no Exception where it panics
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise ValueError(f"its parts do not fit together ({short(str(error))})") from error


def _check_model(model: Part) -> None:
    beyond = ("continuing_subword_prefix", "byte_fallback", "dropout")
    if model.get("type", "BPE") != "BPE" or any(model.get(name) for name in beyond):
        raise refused("model", model.get("type"), "byte-level BPE")
    vocab, merges = model["vocab"], model["merges"]
    if not isinstance(vocab, dict) or not all(_is_id(number) for number in vocab.values()):
        raise refused("vocabulary", vocab, "an object that gives each token its number")
    if not isinstance(merges, list) or not all(_is_merge(merge) for merge in merges):
        raise refused("merges", merges, "a list of pairs of tokens")
    unknown = model.get("unk_token")
    if unknown is not None and not (isinstance(unknown, str) and unknown in vocab):
        raise refused("unknown token", unknown, "one of the vocabulary")


def _is_id(number: object) -> bool:
    return type(number) is int and 0 <= number < MOST_IDS


def _is_merge(merge: object) -> bool:
    if isinstance(merge, list):
        return len(merge) == 2 and all(isinstance(token, str) for token in merge)
    return isinstance(merge, str)


def _added(entry: Part) -> dict[str, Any]:
    aside = ("single_word", "lstrip", "rstrip")
    if any(entry.get(name) for name in aside):
        raise refused("added token", entry["content"], "tokens that leave the text around them as it is")
    if not isinstance(entry["content"], str) or not _is_id(entry["id"]):
        raise refused("added token", entry, "a text and its number")
    normalized = bool(entry.get("normalized"))
    token = {"id": entry["id"], "content": entry["content"], "normalized": normalized, "special": True}
    return token | dict.fromkeys(aside, False)


def _flat(part: Part | None, inner: str) -> list[Part]:
    """A part's own parts where it is a sequence of some, in order."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [each for below in part[inner] for each in _flat(below, inner)]


def _check_parts(parts: list[Part], name: str, check: Callable[[Part], None]) -> None:
    """Each by itself, and that they are few and different: each pass over a text may make it longer."""
    for part in parts:
        check(part)
    forms = [json.dumps(part, sort_keys=True) for part in parts]
    if len(parts) > MOST_PARTS or len(set(forms)) < len(forms):
        raise refused(name, [part["type"] for part in parts], f"at most {MOST_PARTS} parts, no two alike")
    if sum(part["type"] == "ByteLevel" for part in parts) > 1:
        raise refused(name, [part["type"] for part in parts], "one ByteLevel")


def _check_pre_tokenizer(part: Part) -> None:
    if part["type"] == "Split":
        behavior, pattern = (part["behavior"], bool(part.get("invert"))), part["pattern"].get("Regex")
        if behavior not in (("Isolated", False), ("Removed", True)):
            raise refused("split", behavior[0], "Isolated, or Removed and inverted")
        if pattern not in SPLITS:
            raise refused("split pattern", pattern, "that of either")
    elif part["type"] != "ByteLevel" or part.get("add_prefix_space"):
        raise refused("pre_tokenizer", part["type"], "Split and ByteLevel without a space in front")


def _check_normalizer(part: Part) -> None:
    if part["type"] == "Replace":
        if part["pattern"].get("Regex") != WHITE_SPACE or part["content"] != " ":
            raise refused("normalizer", part, f"Replace of {WHITE_SPACE} by a space")
    elif part["type"] not in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase"):
        raise refused("normalizer", part["type"], "NFC, Replace and Lowercase")
