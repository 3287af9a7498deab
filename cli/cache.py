"""`lowvram-video cache`: what torch.compile and Triton have kept on the disk, and deleting it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..compilation.folders import delete, file_bytes, files_in
from ..compilation.inductor_cache import InductorCache
from ..compilation.saved_code import ENDING, LAST_ENDING, MOST_BYTES, code_folder
from ..compilation.triton_cache import TritonCache
from ..system.sizes import in_gib


def add_cache(parser: argparse.ArgumentParser) -> None:
    """The flags of `cache`."""
    parser.add_argument(
        "--clear", action="store_true",
        help="delete compiled code, what inductor keeps in the temporary folder (of other programs too), and kernels "
        "that another version of Triton made: all is made anew when wanted",
    )  # fmt: skip
    parser.set_defaults(command=cache)


def cache(options: argparse.Namespace) -> None:
    """Print what there is, or delete it. ValueError where something could not be deleted."""
    folder, inductor, triton = code_folder(), InductorCache.here(), TritonCache.here()
    code, stale = files_in(folder, ENDING), triton.stale()
    if not options.clear:
        kept = in_gib(sum(map(file_bytes, code)))
        print(f"compiled code: {len(code)} files, {kept} of at most {in_gib(MOST_BYTES)}, in {folder}")
        print(f"inductor's cache: {in_gib(inductor.nbytes())}, in {inductor.folder}")
        print(f"Triton's kernels: {in_gib(triton.nbytes())}, {len(stale)} of another version, in {triton.folder}")
        return
    from_code, failed = _delete_files([*code, *files_in(folder, LAST_ENDING)])
    parts = inductor.parts()
    from_inductor, from_stale = sum(map(delete, parts)), sum(map(delete, stale))
    failed += [f"{path}: it is in use" for path in [*parts, *stale] if path.exists()]
    print(
        f"deleted: {len(code)} files of compiled code, {in_gib(from_code)}; inductor's cache, {in_gib(from_inductor)}; "
        f"{len(stale)} kernels of another Triton, {in_gib(from_stale)}"
    )
    if failed:
        raise ValueError(f"{failed[0]}: could not be deleted; end what runs with it, and try again")


def _delete_files(paths: Sequence[Path]) -> tuple[int, list[str]]:
    """The bytes that are gone, and words on what could not be deleted."""
    freed, failed = 0, []
    for path in paths:
        size = file_bytes(path)
        try:
            path.unlink(missing_ok=True)
            freed += size
        except OSError as error:
            failed.append(f"{path}: {error.strerror}")
    return freed, failed
