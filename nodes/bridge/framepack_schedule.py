"""The shift of the noise levels that a node before FramePack Sampler sets."""

from __future__ import annotations

import math

import comfy.model_sampling

from .patcher import StreamedModelPatcher


def given_shift(patcher: StreamedModelPatcher, widget: float) -> float:
    """The shift of a node such as ModelSamplingSD3, or the widget's (0: by the size).

    A `ModelSamplingFlux` counts by its logarithm. ValueError for a schedule that is no flow's, and for two shifts.
    """
    given = patcher.object_patches.get("model_sampling")
    # the model's own: once it has run with a patch, that is in its place
    own = patcher.object_patches_backup.get("model_sampling", patcher.model.model_sampling)
    if given is None or type(given) is type(own):  # the same with another noise scale
        return widget
    shift = getattr(given, "shift", None)
    if shift is None or not isinstance(given, comfy.model_sampling.CONST):
        raise ValueError(
            "a node (ModelSampling…) gives the model a schedule that is no flow's, and FramePack's is one: use "
            "ModelSamplingSD3, or FramePack Sampler's own shift, and take that node out"
        )
    if isinstance(given, comfy.model_sampling.ModelSamplingFlux):
        shift = math.exp(shift)
    if widget and not math.isclose(widget, shift, rel_tol=1e-6):
        raise ValueError(
            f"a node gives the model a shift of {shift:g}, and FramePack Sampler's own is {widget:g}: set that to 0, "
            "or take the node out"
        )
    return float(shift)
