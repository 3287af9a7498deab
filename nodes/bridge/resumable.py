"""ComfyUI's samplers over a model whose answers are recorded: a run that was stopped goes on when queued again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from comfy.patcher_extension import WrapperExecutor, WrappersMP, add_wrapper_with_key
from torch import Tensor

from ...runtime.latent_watch import BadLatents
from ...runtime.recalled_calls import RecalledCalls
from ...runtime.step_record import StepRecord
from ...runtime.streamed import StreamedModel
from ...weights.files.fingerprint import fingerprint
from . import host
from .carried import without_own
from .identity import identity
from .patcher import StreamedModelPatcher
from .patches import patch_identity
from .step_cache import EASYCACHE

logger = logging.getLogger(__name__)

KEY = "lowvram_resumable"
FOLDER = "wan"  # in the output folder, as on the command line
OF_THE_RUN = ("model_patcher", "model_options", "original_conds", "conds", "inner_model", "loaded_models")


def make_resumable(patcher: StreamedModelPatcher) -> StreamedModelPatcher:
    """A clone whose runs are recorded."""
    copy = patcher.clone()
    if not copy.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
        copy.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, sample_recorded)
    return copy


def sample_recorded(
    executor: WrapperExecutor,
    noise: Tensor,
    latent_image: Tensor,
    sampler: Any,
    sigmas: Tensor,
    denoise_mask: Tensor | None = None,
    callback: Callable[..., None] | None = None,
    disable_pbar: bool = False,
    seed: int | None = None,
    **more: Any,
) -> Tensor:
    """Core's `CFGGuider.outer_sample`, with what the model answers recorded below guidance and samplers.

    They run as ever and are only handed the answers, so that their history, noise and functions are as they were.
    """
    guider = executor.class_obj
    patcher: StreamedModelPatcher = guider.model_patcher
    patcher.configure()  # a run is known by how the engine computes: as this MODEL says, not the one before
    patcher.engine.choose_attention(noise.shape)
    asked = [noise, latent_image, sampler, sigmas, denoise_mask, seed]
    try:
        record = _open_record(guider, asked)
    except _NotRecorded as error:
        logger.warning("Resumable Sampling: this run is not recorded: %s", error)
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **more)
    shown = _Shown(record, callback)
    with record:
        kept = record.finished()
        if kept is not None:
            shown.again(kept, len(sigmas) - 1)
            return kept["samples"]
        _tell(record, guider)
        options = guider.model_options  # this run's alone
        add_wrapper_with_key(
            WrappersMP.CALC_COND_BATCH, KEY, _answering(record, patcher.engine.streamed), options, is_model_options=True
        )
        try:
            samples = executor(noise, latent_image, sampler, sigmas, denoise_mask, shown, disable_pbar, seed, **more)
        except BadLatents as error:
            _keep_sound(record, error, has_safer_path=not guider.model_patcher.engine.streamed.on_safe_path)
            raise
        except BaseException as error:  # an interrupt is no Exception
            if host.is_interrupt(error):
                host.leave_device()
                logger.info("paused: %d steps are kept in %s; queue again to go on", record.num_kept, record.folder)
            raise
        finally:  # on the safe path these options are sampled with once more, into a record of its own
            options["transformer_options"]["wrappers"][WrappersMP.CALC_COND_BATCH].pop(KEY)
        record.finish(samples=samples, **shown.last)
        return samples


class _NotRecorded(ValueError):
    """A run has no stable form to be told by."""


def _open_record(guider: Any, asked: Any) -> StepRecord:
    """The run's; where its latents were no use before, that of the safe path, on which the model is from now on."""
    root, streamed = host.output_folder(FOLDER), guider.model_patcher.engine.streamed
    while True:
        try:
            settings = run_settings(guider, asked)
        except ValueError as error:
            raise _NotRecorded(str(error)) from error
        record = StepRecord.open(root, settings)
        if not record.is_unsound or not streamed.take_safe_path():
            return record
        record.close()


def _keep_sound(record: StepRecord, error: BadLatents, has_safer_path: bool) -> None:
    """Of a run whose latents are no use keep the steps before; nothing where it is sampled on a safer path."""
    if has_safer_path:
        record.give_up(str(error))
        return
    record.forget_step(error.step)
    error.num_kept = record.num_kept


def run_settings(guider: Any, asked: Any) -> dict[str, Any]:
    """All that the model's answers depend on, as JSON values and tensors. ValueError for what has no such form."""
    patcher: StreamedModelPatcher = guider.model_patcher
    own = {name: value for name, value in vars(guider).items() if name not in OF_THE_RUN}
    module = getattr(patcher.engine.streamed, "vace_module", None)
    return {
        "family": "comfyui",
        "model": {
            "fingerprint": fingerprint(patcher.engine.streamed.checkpoint.path),
            **({} if module is None else {"vace_module": fingerprint(module)}),
            "arithmetic": patcher.engine.streamed.arithmetic,
            "patches": patch_identity(patcher.patches),
            "objects": identity(patcher.object_patches),
            "compile": identity(patcher.options.compile),
            **({} if patcher.options.sparse is None else {"sparse": identity(patcher.options.sparse)}),
            **({} if patcher.options.step_cache is None else {"step_cache": identity(patcher.options.step_cache)}),
        },
        "guider": [type(guider).__qualname__, identity(own)],
        "conditions": identity(guider.original_conds),
        "options": identity(_without_ours(guider.model_options)),
        "asked": identity(asked),
    }


@dataclass
class _Shown:
    """Core's callback of a step, and what it was last told: nodes have their preview latents from it."""

    record: StepRecord
    callback: Callable[..., None] | None
    last: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, step: int, denoised: Tensor, latent: Tensor, num_steps: int) -> None:
        self.record.end_step()
        if isinstance(denoised, Tensor) and isinstance(latent, Tensor):
            self.last = {"denoised": denoised, "latent": latent}
        if self.callback is not None:
            self.callback(step, denoised, latent, num_steps)

    def again(self, kept: dict[str, Tensor], num_steps: int) -> None:
        """The last step, of a run whose latents are there."""
        if self.callback is not None and "denoised" in kept:
            self.callback(num_steps - 1, kept["denoised"], kept["latent"], num_steps)


def _answering(record: StepRecord, streamed: StreamedModel[Any]) -> Callable[..., list[Tensor]]:
    """Core's `calc_cond_batch` with recorded answers: one for each conditioning, before guidance mixes them."""

    recalled = RecalledCalls([streamed])

    def answer(
        executor: WrapperExecutor, model: Any, conds: Any, x: Tensor, timestep: Tensor, model_options: Any
    ) -> list[Tensor]:
        return recalled.answers(record, x, timestep, lambda x: executor(model, conds, x, timestep, model_options))

    return answer


def _tell(record: StepRecord, guider: Any) -> None:
    if not record.num_kept:
        return
    logger.info("%d steps are there: the run goes on from %s", record.num_kept, record.folder)
    if EASYCACHE in guider.model_options.get("transformer_options", {}):
        logger.warning(
            "Resumable Sampling: EasyCache begins anew where the run goes on, so the video may differ slightly from "
            "one that was not stopped"
        )


def _without_ours(options: dict[str, Any]) -> dict[str, Any]:
    """A run's options without this wrapper and what core keeps of its own in them."""
    transformer = dict(options.get("transformer_options", {}))
    wrappers = without_own(transformer.get("wrappers", {}))
    transformer["wrappers"] = {kind: found for kind, found in wrappers.items() if any(found.values())}
    return {**options, "transformer_options": transformer}
