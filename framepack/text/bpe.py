"""Byte-level BPE tokenizers, from the `tokenizer.json` of Hugging Face or from a vocabulary and its merges.

Sources: Sennrich et al. 2016, https://arxiv.org/abs/1508.07909 (the merges); openai/gpt-2 `src/encoder.py` (bytes as
characters); huggingface/tokenizers (the file format, and what each part of it does).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from heapq import heapify, heappop, heappush

Normalize = Callable[[str], str]


@dataclass(frozen=True)
class Split:
    """How a text falls into the pieces in which tokens are merged; what matches nothing is a piece or is dropped."""

    pattern: re.Pattern[str]
    keeps_gaps: bool = True

    def __call__(self, text: str) -> Iterator[str]:
        position = 0
        for match in self.pattern.finditer(text):
            if self.keeps_gaps and match.start() > position:
                yield text[position : match.start()]
            if match[0]:
                yield match[0]
            position = match.end()
        if self.keeps_gaps and position < len(text):
            yield text[position:]


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in the text before anything else; `normalized` ones in the normalised text."""

    content: str
    token_id: int
    normalized: bool = False


@dataclass(frozen=True)
class Merges:
    """The BPE model: `ranks` has the rank of each merge by its two sides with a space between, lowest first.

    `end_of_word` ends the last character of a piece. With `whole_words` a piece that is a token is not taken apart.
    """

    vocab: Mapping[str, int]
    ranks: Mapping[str, int]
    end_of_word: str = ""
    whole_words: bool = False
    unknown: int | None = None

    def tokens(self, piece: str) -> Iterator[int]:
        """The ids of one piece, given as characters that stand for its bytes."""
        if self.whole_words and piece in self.vocab:
            yield self.vocab[piece]
            return
        for symbol in merge([*piece[:-1], piece[-1] + self.end_of_word], self.ranks):
            token_id = self.vocab.get(symbol, self.unknown)
            if token_id is not None:
                yield token_id


@dataclass(frozen=True)
class BytePairTokenizer:
    """Turns a text into ids: added tokens, normalisation, pieces, bytes, merges; `first` and `last` ids around them."""

    merges: Merges
    splits: Sequence[Split]
    normalize: Normalize = str
    added: Sequence[AddedToken] = ()
    first: tuple[int, ...] = ()
    last: tuple[int, ...] = ()
    max_id: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "max_id", max([*self.merges.vocab.values(), *(token.token_id for token in self.added)])
        )

    def encode(self, text: str, max_tokens: int | None = None) -> list[int]:
        """Ids with those around them; of a text that has more than `max_tokens` the end is left out, not they."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate is no character
        ids: list[int] = []
        for token, raw in _around(text, [token for token in self.added if not token.normalized]):
            if token is not None:
                ids.append(token.token_id)
            else:
                ids.extend(self._plain(self.normalize(raw)))
        if max_tokens is not None:
            ids = ids[: max(0, max_tokens - len(self.first) - len(self.last))]
        return [*self.first, *ids, *self.last]

    def token_id(self, content: str) -> int | None:
        """The id of an added token; None where the tokenizer has no such one."""
        return next((token.token_id for token in self.added if token.content == content), None)

    def _plain(self, text: str) -> Iterator[int]:
        characters = byte_characters()
        for token, plain in _around(text, [token for token in self.added if token.normalized], self.normalize):
            if token is not None:
                yield token.token_id
                continue
            pieces: Iterable[str] = [plain]
            for split in self.splits:
                pieces = [part for piece in pieces for part in split(piece)]
            for piece in pieces:
                yield from self.merges.tokens("".join(characters[byte] for byte in piece.encode("utf-8")))


def _around(
    text: str, tokens: Sequence[AddedToken], normalize: Normalize = str
) -> Iterator[tuple[AddedToken | None, str]]:
    """The text in order: added tokens, the leftmost and of those the longest first, and what lies between them."""
    by_content = {normalize(token.content): token for token in tokens}
    longest_first = sorted(by_content, key=len, reverse=True)
    position = 0
    if by_content:
        for match in re.finditer("|".join(re.escape(content) for content in longest_first), text):
            if match.start() > position:
                yield None, text[position : match.start()]
            yield by_content[match[0]], match[0]
            position = match.end()
    if position < len(text):
        yield None, text[position:]


def merge(symbols: list[str], ranks: Mapping[str, int]) -> list[str]:
    """Merge neighbours until no pair has a rank: the lowest rank first, and of equal ones the leftmost."""
    num = len(symbols)
    after, before = list(range(1, num + 1)), list(range(-1, num - 1))
    queue: list[tuple[int, int, str]] = []

    def pair(left: int) -> tuple[int, int, str] | None:
        if left < 0 or after[left] >= num:
            return None
        names = f"{symbols[left]} {symbols[after[left]]}"
        rank = ranks.get(names)
        return None if rank is None else (rank, left, names)

    queue = [found for left in range(num - 1) if (found := pair(left)) is not None]
    heapify(queue)
    while queue:
        entry = heappop(queue)
        left = entry[1]
        if not symbols[left] or pair(left) != entry:
            continue  # one of the two was merged meanwhile
        right = after[left]
        symbols[left] += symbols[right]
        symbols[right] = ""
        after[left] = after[right]
        if after[left] < num:
            before[after[left]] = left
        for neighbour in (before[left], left):
            if (found := pair(neighbour)) is not None:
                heappush(queue, found)
    return [symbol for symbol in symbols if symbol]


@cache
def byte_characters() -> tuple[str, ...]:
    """The character that stands for each byte: itself where it shows, else one from U+0100 on."""
    shown = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return tuple(chr(byte if byte in shown else 256 + hidden.index(byte)) for byte in range(256))
