"""All that we ask of ComfyUI as a host: folders, memory, interrupts, progress. Nothing else knows its internals."""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.utils
import comfyui_version
import folder_paths
import latent_preview
import torch
from comfy.cli_args import args
from comfy_api.latest import io, ui
from torch import Tensor

from ...compilation.profiles import VideoMemory
from ...memory.stream.pinned import default_pinned_cap
from ...system.host_memory import available_ram_bytes, return_freed_bytes
from ...system.sizes import GIB

CATEGORY = "LowVRAM Video"
MODEL_FOLDER = "diffusion_models"  # ComfyUI's models/unet is one of its places
TEXT_FOLDER = "text_encoders"  # models/clip too
LORA_FOLDER = "loras"
MODEL_SUFFIXES = (".safetensors", ".gguf")
EVERYTHING = 1e30  # bytes, as ComfyUI itself asks for all


def schema(**values: Any) -> io.Schema:
    """A node's schema; what this ComfyUI does not know yet (search aliases before 0.9) is left out."""
    known = {field.name for field in fields(io.Schema)}
    return io.Schema(category=CATEGORY, **{name: value for name, value in values.items() if name in known})


def fixed_seed() -> Any:
    """A seed's control that leaves it as it is; ComfyUIs that cannot say so begin with a random one."""
    control = getattr(io, "ControlAfterGenerate", None)
    return True if control is None else control.fixed


# --- files -----------------------------------------------------------------------------------------------


def model_files(folder: str = MODEL_FOLDER, suffixes: tuple[str, ...] = MODEL_SUFFIXES) -> list[str]:
    """Names of the model files in one of ComfyUI's kinds of folder, as its own loaders show them, GGUF too."""
    names = set()
    for root in folder_paths.get_folder_paths(folder):
        for place, _, files in os.walk(root, followlinks=True):
            relative = Path(place).relative_to(root)
            names |= {str(relative / file) for file in files if file.lower().endswith(suffixes)}
    return sorted(names)


def model_path(name: str, folder: str = MODEL_FOLDER) -> Path:
    """Where the model file of this name is; ValueError where it is gone."""
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        raise ValueError(
            f"{name} is in none of ComfyUI's {folder} folders: put it into models/{folder} and press R, "
            "or choose another file"
        )
    return Path(path)


def model_stamp(name: str | None, folder: str = MODEL_FOLDER) -> str:
    """Changes when the file does, so that a replaced file is loaded again; None: the name comes from another node."""
    if name is None:
        return "linked"
    try:
        stat = model_path(name, folder).stat()
    except ValueError:
        return "missing"
    return f"{stat.st_size} {stat.st_mtime_ns}"


def output_path(prefix: str, suffix: str) -> Path:
    """A new file in ComfyUI's output folder."""
    folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
    return Path(folder) / f"{name}_{counter:05}_{suffix}"


def output_names(prefix: str, suffix: str) -> Iterator[Path]:
    """Names in ComfyUI's output folder, by their numbers: the last that a file has, and then those that none has."""
    folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
    for number in itertools.count(max(1, counter - 1)):
        yield Path(folder) / f"{name}_{number:05}_{suffix}"


def output_folder(name: str) -> Path:
    """A folder in ComfyUI's output folder."""
    return Path(folder_paths.get_output_directory()) / name


def saved_result(path: Path) -> ui.SavedResult:
    """A file in the output folder as the frontend shows it."""
    place = path.parent.relative_to(folder_paths.get_output_directory())
    return ui.SavedResult(path.name, "" if place == Path() else place.as_posix(), io.FolderType.output)


def workflow_tags(hidden: io.HiddenHolder | None) -> dict[str, str]:
    """What ComfyUI's Save Video writes into a file, by which the page finds the workflow again: JSON by its name.

    `hidden` is what the node was given of it. Nothing under `--disable-metadata`.
    """
    if hidden is None or args.disable_metadata:
        return {}
    told = dict(hidden.extra_pnginfo or {})
    if hidden.prompt is not None:
        told["prompt"] = hidden.prompt
    return {str(name): json.dumps(value) for name, value in told.items()}


def temporary_folder() -> Path:
    """ComfyUI's temporary folder, which is emptied at each start."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def models_folder() -> Path:
    """The folder of ComfyUI's models."""
    return Path(folder_paths.models_dir)


def about_comfyui() -> tuple[str, dict[str, Any]]:
    """Its version ("" where it does not say) and the values of its command line by name."""
    return str(getattr(comfyui_version, "__version__", "")), dict(vars(args))


# --- devices and memory ----------------------------------------------------------------------------------


CPU = torch.device("cpu")  # where idle models are


def blocks_to_swap(num_blocks: int) -> int:
    """Blocks to stream by ComfyUI's command line: none under `--highvram`, all under `--lowvram` and `--novram`.

    -1: it leaves that to the plan.
    """
    if mm.vram_state == mm.VRAMState.HIGH_VRAM:
        return 0
    return num_blocks if mm.vram_state in (mm.VRAMState.LOW_VRAM, mm.VRAMState.NO_VRAM) else -1


def may_pin() -> bool:
    return mm.MAX_PINNED_MEMORY > 0


def registrar(device: torch.device) -> HostRegistrar | None:
    """What pins RAM that work on a device waits in, where ComfyUI may pin."""
    return HostRegistrar(device) if device.type == "cuda" and may_pin() else None


def compute_device() -> torch.device:
    """The device of `--cuda-device`, or the CPU under `--cpu`."""
    return mm.get_torch_device()


def text_encoder_device() -> torch.device:
    """Where ComfyUI encodes prompts."""
    return mm.text_encoder_device()


def free_vram(device: torch.device) -> int:
    """Bytes that may be used now beyond what is loaded: free ones and those that PyTorch holds unused."""
    return int(mm.get_free_memory(device))


def video_memory(device: torch.device) -> VideoMemory:
    """What of the card is free, or held by models that would leave it."""
    return VideoMemory(free_vram(device) + evictable_vram(None, device), int(mm.get_total_memory(device)))


def vram_without(preserved_gb: float, device: torch.device) -> float:
    """GiB of the card less what shall stay free. ValueError where nothing is left."""
    total = mm.get_total_memory(device) / GIB
    if preserved_gb >= total:
        raise ValueError(
            f"gpu_memory_preservation is {preserved_gb:g} GiB, but the device has {total:.1f} GiB in all: use less, or "
            "0 to plan from what is free"
        )
    return float(total - preserved_gb)


def reserved_vram() -> int:
    """Bytes that ComfyUI leaves to others: `--reserve-vram`, or its default."""
    return int(mm.extra_reserved_memory())


def free_ram() -> int:
    """Bytes of RAM that are free. ComfyUI sees the machine's also in a container that may take less."""
    return min(int(mm.get_free_memory(CPU)), available_ram_bytes())


def empty_cache() -> None:
    """Give freed VRAM and RAM back to the system."""
    return_freed_bytes()
    mm.soft_empty_cache()


def unmap_pages(weight: Tensor) -> None:
    """A weight of ComfyUI's has been read: the pages of its file that came with it are RAM of this process no more.

    ComfyUI lets them go once the node is done, and RAM is highest before: at a decoder's work, with all its pictures.
    """
    if hasattr(mm, "mark_mmap_dirty"):  # older ComfyUIs map no files
        mm.mark_mmap_dirty(weight.untyped_storage())
        for mapped in getattr(mm, "DIRTY_MMAPS", ()):
            mapped.bounce()


def leave_device() -> None:
    """Have every model leave the devices, and give all VRAM back: nothing runs for a while."""
    mm.unload_all_models()
    empty_cache()


def pinnable_bytes() -> int:
    """Bytes that ComfyUI would still pin, of what this machine or container may."""
    return max(0, int(min(mm.MAX_PINNED_MEMORY, default_pinned_cap()) - mm.TOTAL_PINNED_MEMORY))


class HostRegistrar:
    """Pins through ComfyUI, so that its own account of pinned memory holds ours too."""

    def __init__(self, device: torch.device):
        self._device = device
        # ComfyUI counts without a lock; our readers pin from several threads
        # again from within: what the collector frees while we pin may give pinned memory back
        self._lock = threading.RLock()

    def pin(self, extent: Tensor) -> bool:
        with self._lock:
            return bool(mm.pin_memory(extent))

    def unpin(self, extent: Tensor) -> None:
        # the driver does not wait for copies that still read these pages
        torch.cuda.synchronize(self._device)
        with self._lock:
            mm.unpin_memory(extent)


def make_room(bytes_needed: int, device: torch.device) -> None:
    """Have ComfyUI evict other models until so many bytes are free."""
    if device.type != "cpu":
        mm.free_memory(bytes_needed + reserved_vram(), device)


def unload_others(model: object, device: torch.device) -> None:
    """Have ComfyUI evict every model that does not run with this one: a budget by hand is for the whole process."""
    if device.type != "cpu":
        others = _others(model, device)
        keep = [loaded for loaded in mm.current_loaded_models if not any(loaded is other for other in others)]
        mm.free_memory(EVERYTHING, device, keep_loaded=keep)


def evictable_vram(model: object, device: torch.device) -> int:
    """Bytes of the device that ComfyUI frees when this model runs: those of all that does not run with it."""
    return sum(int(loaded.model_loaded_memory()) for loaded in _others(model, device))


def _others(model: object, device: torch.device) -> list[Any]:
    """ComfyUI's loaded models on the device, but for this one and those that its nodes run beside it."""
    all_loaded = [loaded for loaded in mm.current_loaded_models if loaded.model is not None]
    on_device = [loaded for loaded in all_loaded if loaded.device == device]
    kept = [each.model for each in all_loaded if model is not None and getattr(each.model, "model", None) is model]
    for patcher in tuple(kept):
        kept += [*patcher.get_nested_additional_models(), *patcher.model_patches_models()]
    return [loaded for loaded in on_device if not any(loaded.model.is_clone(patcher) for patcher in kept)]


def decode_device() -> torch.device:
    """Where ComfyUI decodes (`--cpu-vae`)."""
    return mm.vae_device()


# --- running ---------------------------------------------------------------------------------------------


def stop_if_interrupted() -> None:
    """Raises ComfyUI's InterruptProcessingException (a BaseException) once the user has asked for it."""
    mm.throw_exception_if_processing_interrupted()


def is_interrupt(error: BaseException) -> bool:
    """Whether the user stopped the run; in older ComfyUIs that is an Exception like any other."""
    return isinstance(error, (mm.InterruptProcessingException, KeyboardInterrupt))


def check_interrupt(done: int, total: int) -> None:
    stop_if_interrupted()


def load_model(patcher: Any) -> None:
    """Have ComfyUI count the model among those in use, on all its cards, and make it the one that runs."""
    mm.load_models_gpu([patcher, *patcher.get_nested_additional_models()])


class SamplingPreview:
    """ComfyUI's progress bar with its preview of the latents."""

    def __init__(self, patcher: Any, num_steps: int):
        self._show = latent_preview.prepare_callback(patcher, num_steps)
        self._num_steps, self._done = num_steps, 0

    def step(self, denoised: Tensor) -> None:
        """Another step is done."""
        self._show(min(self._done, self._num_steps - 1), denoised, denoised, self._num_steps)
        self._done += 1


class Progress:
    """ComfyUI's progress bar of the node that runs."""

    def __init__(self, total: int):
        self._bar = comfy.utils.ProgressBar(total)

    def update(self, done: int, total: int) -> None:
        stop_if_interrupted()
        self._bar.update_absolute(done, total)
