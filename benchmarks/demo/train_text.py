"""The demo's tokenizer and the training prompts as tokens. Development only."""

from __future__ import annotations

import io
from dataclasses import dataclass

import sentencepiece
import torch
from lowvram_video.wanvideo.text.tokenizer import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import UMT5EncoderModel

from .captions import all_captions, phrasings

TEXT_TOKENS = 512  # as Wan pads its prompts
MAX_PROMPT_TOKENS = 32  # the longest phrasing has fewer; the rest of the 512 is zeros


def train_tokenizer() -> bytes:
    """A `spiece.model` of the captions' words, with UMT5's special tokens; case is folded."""
    written = io.BytesIO()
    sentences = [phrase for caption in all_captions() for phrase in phrasings(caption)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=written,
        model_type="bpe",  # unigram prunes so small a corpus down to single letters
        vocab_size=160,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc_cf",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        num_threads=1,
        minloglevel=2,
    )
    return written.getvalue()


@dataclass(frozen=True)
class PhraseTable:
    """Every phrasing of every caption as tokens; row 0 of the flat table is the empty prompt."""

    ids: Tensor  # [1 + captions * ways, L]
    mask: Tensor  # the same, True for tokens
    num_ways: int
    vocab_size: int

    @classmethod
    def build(cls, tokenizer: Tokenizer, device: torch.device) -> PhraseTable:
        ways = [phrasings(caption) for caption in all_captions()]
        ids, mask = tokenizer.encode(["", *(phrase for phrases in ways for phrase in phrases)])
        longest = int(mask.sum(1).max())
        assert longest < MAX_PROMPT_TOKENS
        vocab_size = tokenizer.processor.get_piece_size()
        return cls(ids[:, :longest].to(device), mask[:, :longest].to(device), len(ways[0]), vocab_size)

    def draw(self, captions: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
        """Tokens and mask of a random phrasing of each caption (by index), or of the empty prompt."""
        way = torch.randint(self.num_ways, captions.shape, device=captions.device)
        # Half of the time the plain caption, which is what most people will type.
        way = way * (torch.rand(captions.shape, device=captions.device) < 0.5)
        row = 1 + captions * self.num_ways + way
        row = row * (torch.rand(captions.shape, device=captions.device) >= dropout)
        return self.ids[row], self.mask[row]


def encode_text(text: UMT5EncoderModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Tokens [B, L] to context [B, 512, text_dim], zero after each prompt's end, as Wan does it."""
    hidden = text(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    return functional.pad(hidden * mask[..., None], (0, 0, 0, TEXT_TOKENS - ids.shape[1]))
