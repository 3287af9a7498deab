"""`lowvram-video cache`: what torch.compile and Triton have kept on the disk, and deleting it."""

from __future__ import annotations

import argparse
from contextlib import suppress

from ..compilation.saved_code import ENDING, LAST_ENDING, MOST_BYTES, code_folder
from ..compilation.triton_cache import TritonCache, delete
from ..system.sizes import in_gb, in_gib


def add_cache(parser: argparse.ArgumentParser) -> None:
    """The flags of `cache`."""
    parser.add_argument(
        "--clear", action="store_true",
        help="delete compiled code, and kernels that another version of Triton made: they are made anew when wanted",
    )  # fmt: skip
    parser.set_defaults(command=cache)


def cache(options: argparse.Namespace) -> None:
    """Print what there is, or delete it. ValueError where something could not be deleted."""
    folder, triton = code_folder(), TritonCache.here()
    files = sorted(folder.glob(f"*{ENDING}"))
    stale = triton.stale()
    if not options.clear:
        size = sum(path.stat().st_size for path in files)
        print(f"compiled code: {len(files)} files, {_size(size)} of at most {in_gib(MOST_BYTES)}, in {folder}")
        print(f"Triton's kernels: {_size(triton.nbytes())}, {len(stale)} of another version, in {triton.folder}")
        return
    freed, failed = 0, []
    for path in [*files, *folder.glob(f"*{LAST_ENDING}")]:
        size = 0
        with suppress(OSError):
            size = path.stat().st_size
        try:
            path.unlink(missing_ok=True)
            freed += size
        except OSError as error:
            failed.append(f"{path}: {error.strerror}")
    freed += sum(delete(kernels) for kernels in stale)
    failed += [f"{kernels}: it is in use" for kernels in stale if kernels.exists()]
    print(f"deleted: {len(files)} files of compiled code, {len(stale)} kernels of another Triton, {_size(freed)}")
    if failed:
        raise ValueError(f"{failed[0]}: could not be deleted; end what runs with it, and try again")


def _size(nbytes: int) -> str:
    return in_gb(nbytes, decimals=3)
