"""Opening a video autoencoder, of a file or of ComfyUI's, and the one way to build its network on a device."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from ..weights.files.checkpoint import Checkpoint, CheckpointError, TensorInfo
from ..weights.files.dimensions import check_sizes
from ..weights.files.kinds import file_kind
from ..weights.files.open import open_checkpoint
from ..weights.files.read_ahead import read_ahead
from ..weights.linear.dialects import plain_dialect, with_plain_parts
from ..weights.linear.fitting import fit_tensors
from .checks import NamedConfig, check_tensors
from .layouts import runs_channels_last, to_channels_last

PREFIXES = ("", "vae.", "first_stage_model.", "model.")
NUM_READERS, AHEAD_BYTES = 4, 16 << 20  # threads, and what is read before the device wants it: two large tensors

C = TypeVar("C", bound=NamedConfig)
V = TypeVar("V", bound=nn.Module)

Half = Literal["decoder", "encoder"]


def own_names(names: Iterable[str]) -> dict[str, str]:
    """A VaeFormat's `rename` of files whose names are the network's own."""
    return {name: name for name in names}


@dataclass(frozen=True)
class VaeFormat(Generic[C, V]):
    """How one family's autoencoder is known by its tensors, under any layout's names.

    All names of one of `markers` tell it; `rename` gives `{name: ours}`, `infer_config` the dimensions of a checkpoint
    with our names, `network` the module with them. Decoding takes only the tensors whose names begin with one of
    `decoder`, encoding only those with one of `encoder`. `title` has its article, `advice` says which file to choose.
    """

    title: str
    advice: str
    markers: tuple[tuple[str, ...], ...]
    rename: Callable[[Iterable[str]], Mapping[str, str]]
    infer_config: Callable[[Checkpoint], C]
    network: Callable[..., V]  # (config, device=..., dtype=...)
    decoder: tuple[str, ...]
    encoder: tuple[str, ...] = ("",)

    def open_file(self, path: str | Path) -> OpenVae[C, V]:
        """A file in any layout, with or without a prefix ("vae.", "first_stage_model."); reads the header only.

        Raises CheckpointError, saying what the file is where that can be told, unless it is a complete VAE.
        """
        return self.opened(open_checkpoint(path))

    def opened(self, checkpoint: Checkpoint) -> OpenVae[C, V]:
        """`open_file` of an opened file."""
        checkpoint = with_plain_parts(checkpoint)
        prefix = self._prefix(checkpoint.tensors)
        if prefix is None:
            raise CheckpointError(
                f"{checkpoint.path} is {file_kind(checkpoint.tensors).title}; expected {self.title}. {self.advice}"
            )
        bare = {name: name.removeprefix(prefix) for name in checkpoint.tensors if name.startswith(prefix)}
        ours = self.rename(bare.values())
        # What is outside the prefix belongs to another model of a merged file: None drops it.
        names = {name: ours[bare[name]] if name in bare else None for name in checkpoint.tensors}
        return self._fitted(plain_dialect(checkpoint.renamed(names), names))

    def open_tensors(
        self, stored: Mapping[str, Tensor], when_read: Callable[[Tensor], None] | None = None
    ) -> OpenVae[C, V] | None:
        """The state dict of another program's VAE, whose tensors are read where they lie; None for another family's.

        `when_read` is told of each tensor that has just been read.
        """
        if self._prefix(stored) != "":
            return None
        tensors = {ours: stored[name] for name, ours in self.rename(stored).items()}
        infos = {
            name: TensorInfo(name, tensor.dtype, tuple(tensor.shape), Path(), 0, tensor.nbytes)
            for name, tensor in tensors.items()
        }
        opened = self._fitted(Checkpoint(Path("the connected VAE"), infos, {}), tensors)
        return replace(opened, when_read=when_read)

    def _prefix(self, names: Iterable[str]) -> str | None:
        """What stands before the VAE's names, or None where there is none."""
        names = set(names)
        for prefix in PREFIXES:
            if any(all(prefix + name in names for name in marker) for marker in self.markers):
                return prefix
        return None

    def _fitted(self, renamed: Checkpoint, tensors: Mapping[str, Tensor] | None = None) -> OpenVae[C, V]:
        """CheckpointError where a tensor is missing or of another shape than the network's."""
        check_sizes(renamed)
        config = self.infer_config(renamed)
        network = self.network(config, device="meta")
        checkpoint = fit_tensors(network, renamed)
        shapes = {name: tuple(each.shape) for name, each in network.state_dict().items()}
        check_tensors(checkpoint, config, shapes)
        return OpenVae(self, config, checkpoint, tuple(shapes), tensors)


@dataclass(frozen=True)
class OpenVae(Generic[C, V]):
    """An autoencoder whose tensors are known, under our names, and are read when it is built.

    `names` are those of the network's. They are in the file of `checkpoint` or, where given, `tensors`.
    """

    format: VaeFormat[C, V]
    config: C
    checkpoint: Checkpoint
    names: tuple[str, ...]
    tensors: Mapping[str, Tensor] | None = None
    when_read: Callable[[Tensor], None] | None = None

    def build(self, dtype: torch.dtype, device: torch.device, only: Half | None = None) -> V:
        """The network in `dtype` on `device`, in the layout that is fastest there.

        Tensors are converted one at a time, while the next few are read, so that they are never in memory twice. What
        the wanted half does not need stays on meta.
        """
        vae = self.format.network(self.config, device="meta", dtype=dtype)
        channels_last = runs_channels_last(device, dtype)
        weights, names = {}, self._wanted(only)
        with closing(self._stored(names)) as tensors:  # also where the device has no room: what failed may be kept
            for name, stored in zip(names, tensors, strict=True):
                weight = stored.to(device=device, dtype=dtype)
                weights[name] = to_channels_last(weight) if channels_last else weight
                if self.when_read is not None:
                    self.when_read(stored)
        vae.load_state_dict(weights, strict=only is None, assign=True)
        return vae.requires_grad_(False)

    def weight_bytes(self, dtype: torch.dtype, only: Half | None = None) -> int:
        """What `build` takes on the device."""
        return sum(math.prod(self.checkpoint.tensors[name].shape) for name in self._wanted(only)) * dtype.itemsize

    def _stored(self, names: Iterable[str]) -> Generator[Tensor]:
        """Tensors as they are stored, in the network's shapes."""
        infos = self.checkpoint.tensors
        if self.tensors is not None:
            yield from (self.tensors[name].view(infos[name].shape) for name in names)
            return
        with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="vae-reader") as readers:
            jobs = ((infos[name].nbytes, partial(self.checkpoint.read, name)) for name in names)
            yield from read_ahead(jobs, readers, AHEAD_BYTES)

    def _wanted(self, only: Half | None) -> list[str]:
        begins = {None: ("",), "decoder": self.format.decoder, "encoder": self.format.encoder}[only]
        return [name for name in self.names if name.startswith(begins)]
