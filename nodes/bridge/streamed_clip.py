"""Wan's text encoder as a native CLIP whose blocks stay in their file: core's prompts, weights of words and batches."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import comfy.sd
import folder_paths
import torch
from comfy import sd1_clip
from comfy.text_encoders.wan import WanT5Tokenizer
from torch import Tensor, nn

from ...vae.retries import empty_cache, once_more
from ...wanvideo.text.encoder import TextEncoder
from . import host


def make_wan_clip(encoder: TextEncoder) -> comfy.sd.CLIP:
    """ComfyUI's CLIP of an encoder, which reads its weights itself: ComfyUI finds none to load, move or keep."""

    # as core's `UMT5XXlModel`, around our encoder
    inner = partial(
        sd1_clip.SDClipModel,
        textmodel_json_config={},
        model_class=lambda *_: StreamedTransformer(encoder),
        special_tokens={"end": encoder.tokenizer.eos_id, "pad": encoder.tokenizer.pad_id},
        enable_attention_masks=True,
        zero_out_masked=True,
    )

    class Model(sd1_clip.SD1ClipModel):
        """Core's wrapper, which ModelPatcher holds."""

        disable_offload = True  # nothing here for core's dynamic VRAM to page

        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None):
            super().__init__(device, None, model_options or {}, name="umt5xxl", clip_model=inner)

    spiece = torch.frombuffer(bytearray(encoder.tokenizer.processor.serialized_model_proto()), dtype=torch.uint8)
    return comfy.sd.CLIP(
        SimpleNamespace(params={}, clip=Model, tokenizer=WanT5Tokenizer),
        folder_paths.get_folder_paths("embeddings"),
        tokenizer_data={"spiece_model": spiece},
        model_options={"load_device": encoder.device, "offload_device": host.CPU},
    )


class StreamedTransformer(nn.Module):
    """What core's `SDClipModel` asks of its transformer. It has no parameters: blocks come from the file in turn."""

    def __init__(self, encoder: TextEncoder):
        super().__init__()
        self.text_encoder = encoder
        self.num_layers = encoder.model.config.num_layers
        self.dtype = torch.float32
        read = encoder.model.stream

        def stream(blocks: Any) -> Iterator[nn.Module]:
            for block in read(blocks):
                host.stop_if_interrupted()
                yield block

        encoder.model.stream = stream

    def get_input_embeddings(self) -> Any:
        """A function of tokens, which core calls as it does a module."""
        return self._embed

    def forward(
        self,
        input_ids: None,
        attention_mask: Tensor,
        embeds: Tensor,
        intermediate_output: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """The last hidden state, or that after the block that CLIP Set Last Layer names; the last norm follows both."""
        num_layers = None if intermediate_output is None else intermediate_output % self.num_layers + 1

        def encode() -> Tensor:
            return self.text_encoder.hidden_states(embeds, attention_mask, num_layers)

        hidden = once_more(encode, "encoding the prompt", self._evict_idle)
        return hidden, hidden

    def _evict_idle(self) -> None:
        """Have all other models leave the device, which had no memory left."""
        empty_cache()
        host.make_room(int(host.EVERYTHING), self.text_encoder.device)

    def _embed(self, tokens: Tensor, out_dtype: torch.dtype = torch.float32) -> Tensor:
        return self.text_encoder.embed(tokens).to(tokens.device, out_dtype)
