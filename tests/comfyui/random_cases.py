"""Random graphs of model nodes, LoRA stacks, shifts and Block Swap, with our loader of a model or with core's."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .server import Graph

MODELS = ("random_a.safetensors", "random_b.safetensors")
LORAS = ("random_peft.safetensors", "random_kohya.safetensors", "random_diff.safetensors")
SAMPLERS = (
    "euler", "euler_ancestral", "heun", "dpm_2", "lms", "dpmpp_2s_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "ddim",
    "uni_pc", "uni_pc_bh2", "deis", "ipndm", "lcm", "res_multistep", "gradient_estimation", "euler_cfg_pp", "er_sde",
)  # fmt: skip
SCHEDULERS = ("simple", "normal", "beta", "sgm_uniform", "ddim_uniform", "linear_quadratic", "kl_optimal")

PROMPTS = ("", "", "", "range", "combine", "average", "mask", "set strength", "area", "zero")
GUIDERS = ("", "", "", "CFGGuider", "BasicGuider", "DualCFGGuider", "DualModelGuider", "PerpNegGuider")

Draw = Callable[[random.Random], Any]


def number(low: float, high: float) -> Draw:
    return lambda rng: round(rng.uniform(low, high), 3)


def one_of(*values: Any) -> Draw:
    return lambda rng: rng.choice(values)


# Nodes that take a MODEL and give one; what is not drawn keeps its default. Those of the tables that work with Wan.
MODEL_NODES: Mapping[str, Mapping[str, Draw]] = {
    "APG": {"eta": number(0, 1), "norm_threshold": number(1, 20), "momentum": number(-0.5, 0.5)},
    "CFGNorm": {"strength": number(0.3, 1)},
    "CFGZeroStar": {},
    "ContextWindowsManual": {
        "context_length": one_of(2, 3), "context_overlap": one_of(0, 1), "dim": one_of(2),
        "context_schedule": one_of("standard_static", "standard_uniform", "batched"),
        "fuse_method": one_of("pyramid", "relative", "overlap-linear", "flat"), "freenoise": one_of(True, False),
    },
    "DifferentialDiffusion": {"strength": number(0.2, 1)},
    "EasyCache": {"reuse_threshold": one_of(0.05, 3.0), "start_percent": one_of(0.0, 0.2)},
    "Epsilon Scaling": {"scaling_factor": number(0.95, 1.1)},
    "FreSca": {"scale_low": number(0.7, 1.3), "scale_high": number(0.7, 1.6), "freq_cutoff": one_of(1, 3)},
    "LazyCache": {"reuse_threshold": one_of(0.05, 3.0), "start_percent": one_of(0.0, 0.2)},
    "Mahiro": {},
    "ModelNoiseScale": {"noise_scale": number(0.8, 1.2)},
    "ModelSamplingAuraFlow": {"shift": number(0.5, 10)},
    "ModelSamplingFlux": {"max_shift": number(0.6, 1.5), "base_shift": number(0.3, 0.6)},
    "ModelSamplingLTXV": {"max_shift": number(1.5, 2.5), "base_shift": number(0.5, 1)},
    "ModelSamplingSD3": {"shift": number(0.5, 12)},
    "RescaleCFG": {"multiplier": number(0, 1)},
    "ScaleROPE": {
        "scale_x": number(0.5, 1.5), "shift_x": number(0, 3), "scale_y": number(0.5, 1.5), "scale_t": number(0.5, 1.5),
    },
    "SkipLayerGuidanceDiT": {
        "scale": number(1, 4), "double_layers": one_of("1", "0, 2", "3"), "single_layers": one_of(""),
        "start_percent": one_of(0.0, 0.3), "end_percent": one_of(0.7, 1.0), "rescaling_scale": one_of(0.0, 0.5),
    },
    "SkipLayerGuidanceDiTSimple": {
        "double_layers": one_of("1", "2, 3"), "single_layers": one_of(""), "start_percent": one_of(0.0, 0.3),
    },
    "TCFG": {},
    "TemporalScoreRescaling": {"tsr_k": number(0.8, 1.1), "tsr_sigma": number(0.5, 2)},
    "VideoLinearCFGGuidance": {"min_cfg": number(0, 3)},
    "VideoTriangleCFGGuidance": {"min_cfg": number(0, 3)},
}  # fmt: skip


@dataclass
class Case:
    """A graph without its loaders: `chains` are nodes between a loader and the samplers, in order."""

    seed: int
    chains: list[list[tuple[str, dict[str, Any]]]] = field(default_factory=list)
    swaps: list[tuple[int, dict[str, Any]]] = field(default_factory=list)  # (place, settings) of Block Swap in each
    prompts: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    size: dict[str, int] = field(default_factory=dict)
    mask: bool = False
    interrupt: float | None = None  # seconds after which a longer run of the same graph is stopped before
    free: dict[str, bool] | None = None


def drawn(seed: int) -> Case:
    """The case of a seed."""
    rng, case = random.Random(seed), Case(seed)
    num_models = 2 if rng.random() < 0.3 else 1
    for _ in range(num_models):
        chain: list[tuple[str, dict[str, Any]]] = [_drawn_node(rng) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4)))]
        chain += [
            ("LoraLoaderModelOnly", {"lora_name": rng.choice(LORAS), "strength_model": round(rng.uniform(-1, 1.5), 2)})
            for _ in range(rng.choice((0, 0, 1, 2, 3)))
        ]
        rng.shuffle(chain)
        case.chains.append(chain)
        settings = {"blocks_to_swap": rng.choice((-1, 0, 1, 3, 4)), "prefetch": rng.choice((0, 1, 2))}
        settings |= {"ram_budget_gb": rng.choice((0.0, 0.0, 1.51)), "pinned_memory": rng.random() < 0.8}
        case.swaps.append((rng.randint(0, len(chain)), settings if rng.random() < 0.7 else {}))
    case.sampling = {
        "seed": rng.randint(0, 2**32), "steps": rng.randint(2, 5), "cfg": rng.choice((1.0, 2.5, 4.0)),
        "sampler_name": rng.choice(SAMPLERS), "scheduler": rng.choice(SCHEDULERS),
        "denoise": rng.choice((1.0, 1.0, 0.6)),
    }  # fmt: skip
    case.size = {
        "width": rng.choice((64, 96, 112)), "height": rng.choice((64, 80)), "length": rng.choice((5, 9, 17)),
        "batch_size": rng.choice((1, 1, 1, 2)),
    }  # fmt: skip
    case.prompts = {"kind": rng.choice(PROMPTS)}
    case.prompts |= {"share": round(rng.uniform(0.2, 0.8), 2)}
    case.sampling["guider"] = rng.choice(GUIDERS)
    case.mask = rng.random() < 0.15
    case.interrupt = round(rng.uniform(0.02, 0.5), 2) if rng.random() < 0.3 else None
    case.free = {"unload_models": True, "free_memory": rng.random() < 0.5} if rng.random() < 0.2 else None
    return case


def _drawn_node(rng: random.Random) -> tuple[str, dict[str, Any]]:
    name = rng.choice(list(MODEL_NODES))
    return name, {key: draw(rng) for key, draw in MODEL_NODES[name].items()}


# --- graphs ----------------------------------------------------------------------------------------------


class Builder:
    """Graphs of a server's nodes, what is not given with its default."""

    def __init__(self, object_info: Mapping[str, Any]):
        self._info = object_info

    def graph(self, case: Case, ours: bool) -> Graph:
        """In API format, of our loader or core's."""
        graph: Graph = {}
        models = [self._model(graph, case, index, ours) for index in range(len(case.chains))]
        positive, negative = self._prompts(graph, case)
        latent = self._add(graph, "latent", "EmptyHunyuanLatentVideo", **case.size)
        if case.mask:
            mask = self._add(
                graph, "mask", "SolidMask", value=0.5, width=case.size["width"], height=case.size["height"]
            )
            latent = self._add(graph, "masked", "SetLatentNoiseMask", samples=latent, mask=mask)
        for index, sampled in enumerate(self._sampled(graph, case, models, positive, negative, latent)):
            self._add(graph, f"save {index}", "SaveLatent", samples=sampled, filename_prefix="random/latent")
        return graph

    def _model(self, graph: Graph, case: Case, index: int, ours: bool) -> list[Any]:
        file = MODELS[index]
        if ours:
            given = {"model_name": file, "compute_dtype": "fp32", "attention_mode": "sdpa", "quantization": "none"}
            model = self._add(graph, f"loader {index}", "LowVRAMLoadWanModel", **given)
        else:
            model = self._add(graph, f"loader {index}", "UNETLoader", unet_name=file, weight_dtype="default")
        place, settings = case.swaps[index]
        for number, (name, inputs) in enumerate([*case.chains[index], ("", {})]):
            if ours and settings and number == place:
                model = self._add(graph, f"swap {index}", "LowVRAMBlockSwap", model=model, **settings)
            if name:
                model = self._add(graph, f"{index} {number}", name, model=model, **inputs)
        return model

    def _prompts(self, graph: Graph, case: Case) -> tuple[list[Any], list[Any]]:
        good, other, bad = (self._add(graph, f"prompt {seed}", "TestConditioning", seed=seed) for seed in (1, 2, 3))
        kind, share = case.prompts["kind"], case.prompts["share"]
        if kind == "average":
            good = self._add(graph, "average", "ConditioningAverage", conditioning_to=good, conditioning_from=other,
                             conditioning_to_strength=share)  # fmt: skip
        elif kind == "combine":
            good = self._add(graph, "combine", "ConditioningCombine", conditioning_1=good, conditioning_2=other)
        elif kind == "range":
            first = self._add(graph, "first", "ConditioningSetTimestepRange", conditioning=good, start=0.0, end=share)
            then = self._add(graph, "then", "ConditioningSetTimestepRange", conditioning=other, start=share, end=1.0)
            good = self._add(graph, "combine", "ConditioningCombine", conditioning_1=first, conditioning_2=then)
        elif kind == "mask":
            size = {"width": case.size["width"], "height": case.size["height"]}
            mask = self._add(graph, "half", "SolidMask", value=share, **size)
            good = self._add(graph, "place", "ConditioningSetMask", conditioning=good, mask=mask, strength=1.0,
                             set_cond_area="default")  # fmt: skip
        elif kind == "area":
            part = self._add(graph, "part", "ConditioningSetAreaPercentageVideo", conditioning=other, width=share,
                             height=0.5, temporal=0.5, x=0.25, y=0.25, z=0.0, strength=1.0)  # fmt: skip
            good = self._add(graph, "combine", "ConditioningCombine", conditioning_1=good, conditioning_2=part)
        elif kind == "zero":
            bad = self._add(graph, "zero", "ConditioningZeroOut", conditioning=bad)
        elif kind == "set strength":
            part = self._add(graph, "part", "ConditioningSetAreaStrength", conditioning=other, strength=share)
            good = self._add(graph, "combine", "ConditioningCombine", conditioning_1=good, conditioning_2=part)
        return good, bad

    def _sampled(
        self, graph: Graph, case: Case, models: list[Any], positive: Any, negative: Any, latent: Any
    ) -> list[list[Any]]:
        own = {key: value for key, value in case.sampling.items() if key != "guider"}
        if len(models) == 2:
            return [self._experts(graph, own, models, positive, negative, latent)]
        if not case.sampling["guider"]:
            given = {"positive": positive, "negative": negative, "latent_image": latent}
            return [self._add(graph, "sampler", "KSampler", model=models[0], **given, **own)]
        return [self._guided(graph, case, models[0], positive, negative, latent)]

    def _experts(
        self, graph: Graph, own: dict[str, Any], models: list[Any], positive: Any, negative: Any, latent: Any
    ) -> list[Any]:
        settings = {key: own[key] for key in ("steps", "cfg", "sampler_name", "scheduler")}
        settings |= {"noise_seed": own["seed"], "positive": positive, "negative": negative}
        half = own["steps"] // 2
        high = self._add(
            graph, "high", "KSamplerAdvanced", model=models[0], latent_image=latent, add_noise="enable",
            start_at_step=0, end_at_step=half, return_with_leftover_noise="enable", **settings,
        )  # fmt: skip
        return self._add(
            graph, "low", "KSamplerAdvanced", model=models[1], latent_image=high, add_noise="disable",
            start_at_step=half, end_at_step=10000, return_with_leftover_noise="disable", **settings,
        )  # fmt: skip

    def _guided(self, graph: Graph, case: Case, model: Any, positive: Any, negative: Any, latent: Any) -> list[Any]:
        own, name = case.sampling, case.sampling["guider"]
        if name == "BasicGuider":
            guider = self._add(graph, "guider", name, model=model, conditioning=positive)
        elif name == "CFGGuider":
            guider = self._add(graph, "guider", name, model=model, positive=positive, negative=negative, cfg=own["cfg"])
        elif name == "DualModelGuider":
            plain = self._add(graph, "plain", "UNETLoader", unet_name=MODELS[1], weight_dtype="default")
            guider = self._add(
                graph, "guider", name, model=model, positive=positive, model_negative=plain, negative=negative,
                cfg=own["cfg"],
            )  # fmt: skip
        elif name == "PerpNegGuider":
            guider = self._add(
                graph, "guider", name, model=model, positive=positive, negative=negative,
                empty_conditioning=["prompt 2", 0], cfg=own["cfg"], neg_scale=0.8,
            )  # fmt: skip
        else:
            guider = self._add(
                graph, "guider", name, model=model, cond1=positive, cond2=["prompt 2", 0], negative=negative,
                cfg_conds=own["cfg"], cfg_cond2_negative=1.5,
            )  # fmt: skip
        sigmas = self._add(
            graph, "sigmas", "BasicScheduler", model=model, scheduler=own["scheduler"], steps=own["steps"],
            denoise=own["denoise"],
        )  # fmt: skip
        return self._add(
            graph, "sampler", "SamplerCustomAdvanced", guider=guider, sigmas=sigmas, latent_image=latent,
            noise=self._add(graph, "noise", "RandomNoise", noise_seed=own["seed"]),
            sampler=self._add(graph, "solver", "KSamplerSelect", sampler_name=own["sampler_name"]),
        )  # fmt: skip

    def _add(self, graph: Graph, key: str, name: str, **given: Any) -> list[Any]:
        inputs = {}
        for part in ("required", "optional"):
            for entry, spec in self._info[name]["input"].get(part, {}).items():
                if entry in given:
                    inputs[entry] = given[entry]
                elif part == "required" or (len(spec) > 1 and "default" in spec[1]):
                    inputs[entry] = _default(spec)
        graph[key] = {"class_type": name, "inputs": inputs}
        return [key, 0]


def _default(spec: Any) -> Any:
    options = spec[1] if len(spec) > 1 else {}
    if "default" in options:
        return options["default"]
    return spec[0][0] if isinstance(spec[0], list) else options.get("options", [""])[0]
