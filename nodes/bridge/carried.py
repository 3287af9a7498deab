"""All that a MODEL of ComfyUI can carry beside its weights, and what becomes of it here.

A `Carry` is one thing that a node gave the MODEL. What stands in `HEARD` is done by ComfyUI's own samplers around the
network, or by our networks; every other is refused by name, so that nothing is left out without a word. Families
refuse more (`Refusals`): a sentence for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
from comfy.patcher_extension import CallbacksMP, WrappersMP


@dataclass(frozen=True)
class Carry:
    """What a node gave a MODEL: `kind` is how ComfyUI carries it, `name` its key there."""

    kind: str
    name: str

    def __str__(self) -> str:
        return f"the {self.kind} {self.name!r}"


Refusals = Mapping[Carry, str]  # a sentence for each

OPTION, TRANSFORMER, PATCH, REPLACEMENT = "model option", "transformer option", "patch", "replaced part"
WRAPPER, CALLBACK, OBJECT, INJECTION = "wrapper", "callback", "object patch", "injection"
WEIGHT_WRAPPER, HOOK, ADDITIONAL, ATTACHMENT = "weight wrapper", "hook", "additional model", "attachment"

OWN = "lowvram"  # how our own wrappers and options begin
INSIDE = "diffusion_model"  # of an object patch: in the network


def _all_of(table: type) -> set[str]:
    return {value for name, value in vars(table).items() if not name.startswith("_") and isinstance(value, str)}


HEARD: Mapping[str, frozenset[str]] = {
    OPTION: frozenset({
        "transformer_options", "sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function",
        "sampler_calc_cond_batch_function", "model_function_wrapper", "denoise_mask_function", "context_handler",
        "disable_cfg1_optimization", "torch_compile_kwargs", "registered_hooks", "to_load_options",
    }),
    TRANSFORMER: frozenset({
        "patches", "patches_replace", "wrappers", "callbacks", "rope_options", "optimized_attention_override",
        "easycache", "sample_sigmas", "sigmas", "cond_or_uncond", "uuids", "context_window", "free_noise",
    }),
    PATCH: frozenset({"double_block", "attn1_patch", "attn2_patch"}),
    REPLACEMENT: frozenset({"dit"}),
    WRAPPER: frozenset({
        WrappersMP.OUTER_SAMPLE, WrappersMP.PREPARE_SAMPLING, WrappersMP.SAMPLER_SAMPLE, WrappersMP.PREDICT_NOISE,
        WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL,
    }),
    CALLBACK: frozenset(_all_of(CallbacksMP)),
    ADDITIONAL: frozenset(),
    ATTACHMENT: frozenset(),
    OBJECT: frozenset(),
    INJECTION: frozenset(),
    WEIGHT_WRAPPER: frozenset(),
    HOOK: frozenset(),
}  # fmt: skip
# Data that only the code of its own node looks at: heard where the MODEL carries such code as well.
WITH_CODE = {OPTION, TRANSFORMER}
# ComfyUI keeps the first two for the node that put them there, and does nothing with them by itself. An object patch is
# of its own part of the model, as its schedule is, or seen to in `inside`.
KEPT = {ATTACHMENT, ADDITIONAL, OBJECT}

BYPASS = (
    "a LoRA in bypass mode (Load LoRA (Bypass)) is not supported by the LowVRAM loader: load it with Load LoRA, which "
    "changes no stored weight here either"
)
HOOKED = (
    "a LoRA that is hooked to a prompt (Create Hook LoRA) is not supported by the LowVRAM loader: load it with Load "
    "LoRA, or use ComfyUI's own diffusion model loader"
)
MULTIGPU = (
    "work for several GPUs (MultiGPU CFG Split) is for ComfyUI's own models: take that node out, and use Several GPUs "
    "(Low VRAM) with a model of the LowVRAM loader"
)
ALWAYS_REFUSED: Refusals = {
    Carry(HOOK, "weights"): HOOKED,
    Carry(INJECTION, "bypass_lora"): BYPASS,
    Carry(OPTION, "multigpu_options"): MULTIGPU,
    Carry(ADDITIONAL, "multigpu"): MULTIGPU,
}


def carried(patcher: comfy.model_patcher.ModelPatcher) -> Iterator[Carry]:
    """All that this MODEL carries beside weight patches, our own things left out."""
    options = patcher.model_options
    transformer = options.get("transformer_options", {})
    by_kind: dict[str, Mapping[str, Any]] = {
        OPTION: options,
        TRANSFORMER: transformer,
        PATCH: transformer.get("patches") or {},
        REPLACEMENT: transformer.get("patches_replace") or {},
        WRAPPER: _filled(patcher.wrappers) | _filled(transformer.get("wrappers") or {}),
        CALLBACK: _filled(patcher.callbacks) | _filled(transformer.get("callbacks") or {}),
        OBJECT: patcher.object_patches,
        INJECTION: patcher.injections,
        WEIGHT_WRAPPER: getattr(patcher, "weight_wrapper_patches", {}),
        ADDITIONAL: patcher.additional_models,
        ATTACHMENT: patcher.attachments,
    }
    for kind, found in by_kind.items():
        for name, value in found.items():
            if _is_something(value) and not str(name).startswith(OWN):
                yield Carry(kind, str(name))
    if any(patcher.hook_patches.values()):
        yield Carry(HOOK, "weights")


def check_carried(patcher: comfy.model_patcher.ModelPatcher, refusals: Refusals) -> None:
    """ValueError, in a sentence, for the first thing that would be left out."""
    has_code = carries_code(patcher)
    for carry in carried(patcher):
        sentence = refusals.get(carry) or ALWAYS_REFUSED.get(carry)
        if sentence is not None:
            raise ValueError(sentence)
        if carry.kind in KEPT or (has_code and carry.kind in WITH_CODE) or carry.name in HEARD[carry.kind]:
            continue
        raise ValueError(unknown(carry))


def carries_code(patcher: comfy.model_patcher.ModelPatcher) -> bool:
    """Whether nodes gave the MODEL functions that may read what else they gave it."""
    code = {WRAPPER, CALLBACK, PATCH, REPLACEMENT}
    names = {name for name in HEARD[OPTION] if name.endswith(("function", "wrapper", "handler"))}
    names.add("optimized_attention_override")
    return any(carry.kind in code or carry.name in names for carry in carried(patcher))


def unknown(carry: Carry) -> str:
    """What is said of a thing that no table knows."""
    if carry.kind in (PATCH, REPLACEMENT):
        return (
            f"a node patches this model with {carry.name}, which is not supported by the LowVRAM loader (what is: "
            f"{', '.join(sorted(HEARD[PATCH]))} and whole blocks): take that node out, or load the file with ComfyUI's "
            "own loader"
        )
    return (
        f"a node gives this model {carry}, which is not supported by the LowVRAM loader: take that node out, or load "
        "the file with ComfyUI's own loader"
    )


def without_own(by_kind: Mapping[str, Mapping[Any, Any]]) -> dict[str, dict[Any, Any]]:
    """Wrappers by type and key, without ours."""
    return {
        kind: {key: each for key, each in keyed.items() if not str(key).startswith(OWN)}
        for kind, keyed in by_kind.items()
    }


def _filled(by_key: Mapping[str, Mapping[Any, Any]]) -> dict[str, Any]:
    """Of wrappers or callbacks by type and key, the types that have some of others."""
    return {
        kind: functions
        for kind, keyed in by_key.items()
        if (functions := [each for key, each in keyed.items() if each and not str(key).startswith(OWN)])
    }


def _is_something(value: Any) -> bool:
    return value is not None and not (isinstance(value, (dict, list, tuple, set)) and not value)
