"""Prompts as FramePack takes them: LLaMA's hidden states of each token and CLIP's vector of the whole.

Source: lllyasviel/FramePack (`diffusers_helper/hunyuan.py`, `encode_prompt_conds`) and diffusers'
`HunyuanVideoFramepackPipeline`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...runtime.layer_reading import LayerReader, TokenTable
from ...weights.files.checkpoint import CheckpointError
from ...weights.linear.adopt import load_tensors
from ..network.model import Prompt
from .bpe import BytePairTokenizer
from .checkpoint import open_clip, open_llama
from .llama_gguf import gguf_tokenizer
from .tokenizer_files import CLIP_TOKENIZER, LLAMA_TOKENIZER, find_tokenizer

logger = logging.getLogger(__name__)

MAX_TOKENS = 256  # of a prompt, its end token included
# LLaMA reads a prompt as an instruction; what it makes of the words before the prompt is left out: 95 tokens.
BEFORE_PROMPT = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n"
)
AFTER_PROMPT = "<|eot_id|>"


class PromptEncoder:
    """The two text encoders of FramePack with their tokenizers.

    Opening reads headers and tokenizers: `tokenizers` is the folder that holds `tokenizer/` and `tokenizer_2/`, or
    None for those beside each encoder's file or in a GGUF file. Weights are read for each `encode`, LLaMA's layer by
    layer, so that the device holds one of them and host memory little; they compute in `dtype`. Raises CheckpointError.
    """

    def __init__(self, llama: Path, clip: Path, tokenizers: Path | None, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = torch.device(device), dtype
        self._llama, self._clip = open_llama(llama), open_clip(clip)
        # Built once here, so that a file that does not fit is refused before anything runs.
        self._decoder, _ = self._llama.build(), self._clip.build()
        inside = gguf_tokenizer(self._llama.checkpoint.path) if tokenizers is None else None
        self._llama_tokenizer = inside or find_tokenizer(LLAMA_TOKENIZER, tokenizers or llama, llama)
        self._clip_tokenizer = find_tokenizer(CLIP_TOKENIZER, tokenizers or clip, clip)
        _check_size(self._llama.table, self._llama_tokenizer)
        _check_size(self._clip.table, self._clip_tokenizer)
        self._num_before = len(self._llama_tokenizer.encode(BEFORE_PROMPT))
        self._decoder.stream = LayerReader(self._llama.checkpoint, "layers", self.device)

    @property
    def text_dim(self) -> int:
        """Width of `Prompt.text`; 4096 for LLaMA 3 8B."""
        return self._llama.config.dim

    @property
    def pooled_dim(self) -> int:
        """Width of `Prompt.pooled`; 768 for CLIP-L."""
        return self._clip.config.dim

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> list[Prompt]:
        """One `Prompt` for each text, fp32 on the CPU: `text [1, n, text_dim]`, `pooled [1, pooled_dim]`.

        An empty text is allowed and is its end token. Of a long one LLaMA reads 256 tokens, as a warning
        says, and CLIP 77. All texts go through each layer together. ValueError for no texts or a bare string.
        """
        if isinstance(texts, str) or not texts:
            raise ValueError(f"texts: expected a list of at least one string, got {texts!r}")
        hidden, pooled = self._hidden_states(texts), self._pooled(texts)
        return [Prompt(text, vector[None]) for text, vector in zip(hidden, pooled, strict=True)]

    def _hidden_states(self, texts: Sequence[str]) -> list[Tensor]:
        """Of each text `[1, n, text_dim]`: its own tokens alone."""
        max_tokens = self._num_before + MAX_TOKENS
        ids = [self._llama_tokenizer.encode(f"{BEFORE_PROMPT}{text}{AFTER_PROMPT}") for text in texts]
        for text, tokens in zip(texts, ids, strict=True):
            if len(tokens) > max_tokens:
                logger.warning(
                    "The prompt %r... has %d tokens; the first %d are read.",
                    text[:40],
                    len(tokens) - self._num_before,
                    MAX_TOKENS,
                )
        ids = [tokens[:max_tokens] for tokens in ids]
        hidden = self._decoder(self._llama.table.rows(_padded(ids)).to(self.device), self.dtype)
        return [row[None, self._num_before : len(tokens)].cpu() for row, tokens in zip(hidden, ids, strict=True)]

    def _pooled(self, texts: Sequence[str]) -> Tensor:
        """`[B, pooled_dim]`, at the first end token of each text."""
        end = self._clip_tokenizer.last[0]
        ids = [self._clip_tokenizer.encode(text, self._clip.config.num_positions) for text in texts]
        ends = torch.tensor([tokens.index(end) for tokens in ids])
        embeddings = self._clip.table.rows(_padded(ids))
        model = load_tensors(self._clip.build(), self._clip.checkpoint, self.device)
        return model(embeddings.to(self.device), ends.to(self.device), self.dtype).cpu()


def _padded(ids: Sequence[Sequence[int]]) -> Tensor:
    """`[B, longest]`, filled up with zeros at the end: attention is causal, so no token of a text sees them."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(tokens) for tokens in ids], batch_first=True)


def _check_size(table: TokenTable, tokenizer: BytePairTokenizer) -> None:
    if tokenizer.max_id >= table.num_rows:
        raise CheckpointError(
            f"{table.checkpoint.path}: has {table.num_rows} token embeddings and a tokenizer with ids up to "
            f"{tokenizer.max_id}; expected the two of one model; choose the encoder and the tokenizer of HunyuanVideo"
        )
