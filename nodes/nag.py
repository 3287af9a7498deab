"""The node that guides by a negative prompt where CFG is 1."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..transformer.nag import NagSettings
from .bridge import host
from .bridge.nag_options import NAG_KEY, NagOptions, check_negative
from .inputs import ADVANCED, model_input, streamed_model

TITLE = "Negative Guidance (NAG, Low VRAM)"


class NegativeGuidance(io.ComfyNode):
    """Guide a streamed model's attention away from a negative prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="LowVRAMNag",
            display_name=TITLE,
            description="Makes a negative prompt count where CFG is 1, as with 4-step LoRAs: attention "
            "to the prompt is pushed away from attention to the negative one, within bounds.",
            search_aliases=["nag", "negative prompt", "normalized attention guidance", "cfg 1", "lightx2v", "4 steps"],
            inputs=[
                model_input(),
                io.Conditioning.Input("negative", tooltip="What shall not be seen, by CLIP Text Encode."),
                io.Float.Input(
                    "nag_scale", default=5.0, min=0.0, max=100.0, step=0.1,
                    tooltip="How far attention is pushed away. 1 switches it off; 5 to 11 are usual.",
                ),
                io.Float.Input(
                    "nag_tau", default=2.5, min=0.0, max=100.0, step=0.1,
                    tooltip="How many times as long as before a token's result may become.", extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "nag_alpha", default=0.25, min=0.0, max=1.0, step=0.01,
                    tooltip="How much of the guided result is mixed in. 0 switches it off.", extra_dict=ADVANCED,
                ),
            ],
            outputs=[io.Model.Output()],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, negative: list[Any], nag_scale: float, nag_tau: float, nag_alpha: float
    ) -> io.NodeOutput:
        patcher = streamed_model(model, TITLE).clone()
        settings = NagSettings(nag_scale, nag_tau, nag_alpha)
        settings.check()
        if len(negative) != 1:
            raise ValueError(
                f"{TITLE} hears one negative prompt, and the conditioning has {len(negative)} entries: connect CLIP "
                "Text Encode directly"
            )
        text, options = negative[0]
        check_negative(options, TITLE)
        transformer = patcher.model_options["transformer_options"]
        transformer.pop(NAG_KEY, None)
        if settings.is_on:
            transformer[NAG_KEY] = NagOptions(text[:1], options, settings)
        return io.NodeOutput(patcher)
