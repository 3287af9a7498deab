"""The tokenizer of Wan's text encoder: a sentencepiece model, `</s>` at the end, padding to a fixed length."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from ...system.regular_files import read_regular

MOST_BYTES = 1 << 26  # of a spiece.model; umt5's has 4.5 MB


class Tokenizer:
    """Turns prompts into token ids `[B, num_tokens]`.

    The ids of `</s>` and of the padding are read from the model. umt5 has <pad> 0, </s> 1, <s> 2, <unk> 3 and 256000
    pieces with a fallback to bytes. Its <extra_id_N> are not pieces but rows past the end of the vocabulary, so such
    text in a prompt is spelled out like any other, as ComfyUI does too.
    """

    def __init__(self, processor: SentencePieceProcessor, num_tokens: int = 512):
        if processor.eos_id() < 0:
            raise ValueError("the sentencepiece model has no </s> token: expected the spiece.model of google/umt5-xxl")
        self.processor = processor
        self.num_tokens = num_tokens
        self.eos_id: int = processor.eos_id()
        self.pad_id: int = max(processor.pad_id(), 0)  # -1 where the model names none: T5 pads with 0

    @property
    def vocab_size(self) -> int:
        return self.processor.get_piece_size()

    @classmethod
    def from_bytes(cls, spiece: bytes, num_tokens: int = 512) -> Tokenizer:
        """Read the bytes of a `spiece.model`. ValueError if they are not a sentencepiece model."""
        try:
            processor = SentencePieceProcessor(model_proto=spiece)
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"{len(spiece)} bytes are not a sentencepiece model: expected the spiece.model of google/umt5-xxl"
            ) from error
        return cls(processor, num_tokens)

    @classmethod
    def from_file(cls, path: str | Path, num_tokens: int = 512) -> Tokenizer:
        """Read a `spiece.model`. ValueError if it is another kind of file."""
        # Read here, because sentencepiece itself cannot open non-ASCII paths on Windows.
        try:
            return cls.from_bytes(read_regular(Path(path), MOST_BYTES), num_tokens)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids `[B, num_tokens]` int64 and mask `[B, num_tokens]` bool, True for a prompt's own tokens and its `</s>`.

        Prompts are cleaned first (`clean_prompt`); one that is too long loses its tail and keeps its `</s>`.
        """
        ids = torch.full((len(prompts), self.num_tokens), self.pad_id, dtype=torch.int64)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            pieces = self.processor.encode(clean_prompt(prompt), add_bos=False, add_eos=False)
            pieces = [*pieces[: self.num_tokens - 1], self.eos_id]
            ids[row, : len(pieces)] = torch.tensor(pieces)
            mask[row, : len(pieces)] = True
        return ids, mask


def clean_prompt(text: str) -> str:
    """Repair, unescape HTML twice, strip, and make every run of white space one space.

    Source: Wan-Video/Wan2.1 `wan/modules/tokenizers.py`. Its first step, `ftfy.fix_text`, runs only where ftfy is
    installed: it mends mis-decoded text ("âœ”" for "✔"), straightens curly quotes and narrows full-width characters,
    so a prompt with any of these may get other ids without it. ComfyUI's own text encoding does none of this.
    """
    text = html.unescape(html.unescape(_fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def _fix_text(text: str) -> str:
    try:
        from ftfy import fix_text
    except ImportError:
        return text
    return fix_text(text)
