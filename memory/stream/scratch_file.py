"""Tensors that are made as they are read, put into a file so that they can be streamed from the disk."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ...system.atomic_files import naming
from ...system.direct_reads import PAGE
from ...system.scratch_folders import remove_left_behind, scratch_folder
from ...system.sizes import in_gib
from .layout import SMALL_BYTES, BlockLayout, TensorInfo, TensorSource, align

logger = logging.getLogger(__name__)


class ScratchFile:
    """A source whose every large tensor lies in a file; those that lay in none are in a temporary one until `close`.

    It is put into `home` where that has room and can be written to, else to temporary files, which are often memory.
    ValueError where no disk has room for them. `check` is called before every tensor is made, and may raise to give up;
    a bar on the terminal tells how far it is.
    """

    def __init__(
        self,
        source: TensorSource,
        layouts: Sequence[BlockLayout],
        home: Path | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        self._source, self._check = source, check
        self.tensors: Mapping[str, TensorInfo] = source.tensors
        names = [f"{layout.prefix}.{place.name}" for layout in layouts for place in layout.places]
        large = [name for name in names if source.tensors[name].nbytes >= SMALL_BYTES]
        exist = {file: file.is_file() for file in {source.tensors[name].file for name in large}}
        made = [name for name in large if not exist[source.tensors[name].file]]
        self._folder = ExitStack()  # a temporary one, once there is one
        self.num_bytes = sum(align(source.tensors[name].nbytes, PAGE) for name in made)
        if made:
            folder = self._make_folder(home)
            try:
                self.tensors = {**source.tensors, **self._write(made, folder / "weights")}
            except BaseException:
                self.close()
                raise

    def read_into(self, name: str, out: Tensor) -> None:
        """The tensor's bytes, from where they were before."""
        self._source.read_into(name, out)

    def close(self) -> None:
        """Delete the temporary file; calling it again does nothing. What reads from it must be closed first."""
        self._folder.close()

    def _make_folder(self, home: Path | None) -> Path:
        places = [Path(tempfile.gettempdir())] if home is None else [home, Path(tempfile.gettempdir())]
        refusals = []
        for place in places:
            remove_left_behind(place)
            free = shutil.disk_usage(place).free
            if free < self.num_bytes:
                refusals.append(f"{place} has {in_gib(free)} free")
                continue
            try:
                return self._folder.enter_context(scratch_folder(place))
            except OSError as error:
                refusals.append(f"{place} cannot be written to ({error.strerror})")
        raise ValueError(
            f"{in_gib(self.num_bytes)} of weights are made as they are read and must be put on the disk to be "
            f"streamed from there, but {' and '.join(refusals)}: make room, set TMPDIR (TEMP on Windows) to another "
            "disk, or give a larger RAM budget"
        )

    def _write(self, names: Sequence[str], path: Path) -> dict[str, TensorInfo]:
        infos: dict[str, TensorInfo] = {}
        logger.warning("%s of weights are made for streaming and put into %s", in_gib(self.num_bytes), path.parent)
        with (
            naming(path),
            open(path, "wb") as file,
            # `disable` of None: where stderr is no terminal
            tqdm(desc="weights", total=self.num_bytes, unit="B", unit_scale=True, leave=False, disable=None) as bar,
        ):
            for name in names:
                if self._check is not None:
                    self._check()
                info: Any = self._source.tensors[name]
                raw = torch.zeros(align(info.nbytes, PAGE), dtype=torch.uint8)
                self._source.read_into(name, raw[: info.nbytes])
                infos[name] = replace(info, file=path, offset=file.tell())
                file.write(raw.numpy().data)
                bar.update(raw.numel())
        return infos
