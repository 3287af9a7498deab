"""Reading large runs of a file without filling the page cache with them."""

import errno
import logging
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

PAGE = max(mmap.PAGESIZE, 4096)  # offset, length and address granularity of direct reads


class WeightReadError(OSError):
    """A weight file could not be read where a tensor should be."""

    __module__ = "lowvram_video"  # what ComfyUI shows of it, instead of the folder that the pack is in


class RawFile:
    """One file open for page-aligned reads from many threads.

    Reads bypass the page cache where the system allows (O_DIRECT), else they drop what they leave in it
    (POSIX), else they are plain. A model larger than RAM would otherwise push everything else out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._lock = threading.Lock()
        self.direct = False
        if hasattr(os, "preadv"):
            self._descriptor = self._open_direct()

    def read(self, buffer: memoryview, offset: int, needed: int) -> None:
        """Read at least `needed` bytes at `offset`; both buffer and offset are page-aligned.

        Only the file's last page may come up short of the buffer. Raises WeightReadError naming the file.
        """
        try:
            done = self._fill(buffer, offset, needed)
        except OSError as error:
            raise WeightReadError(error.errno, f"reading weights failed: {error.strerror}", str(self.path)) from error
        if done < needed:
            raise WeightReadError(
                errno.EIO,
                f"the file ends at byte {offset + done}, but tensors reach to byte {offset + needed}; "
                f"it was cut off or replaced: download it again",
                str(self.path),
            )

    def is_cached(self, offset: int) -> bool:
        """Whether the page cache holds the byte at `offset`; True where the system cannot tell."""
        if not hasattr(os, "RWF_NOWAIT"):
            return True
        try:
            with open(self.path, "rb", buffering=0) as file:
                os.preadv(file.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return False
        except OSError as error:
            logger.debug("%s: cannot tell what is cached (%s)", self.path, error)
        return True

    def close(self) -> None:
        """Close the file; calling it again does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            self.close()

    def _open_direct(self) -> int:
        flag = getattr(os, "O_DIRECT", 0)
        if flag:
            try:
                descriptor = os.open(self.path, os.O_RDONLY | flag)
            except OSError as error:
                logger.debug("%s: no direct reads (%s)", self.path, error)
            else:
                self.direct = True
                return descriptor
        return os.open(self.path, os.O_RDONLY)

    def _give_up_direct(self) -> None:
        # Other threads may be reading through the descriptor, so it keeps its number and only changes what
        # it refers to.
        with self._lock:
            if self.direct and self._descriptor is not None:
                cached = os.open(self.path, os.O_RDONLY)
                os.dup2(cached, self._descriptor)
                os.close(cached)
                self.direct = False

    def _fill(self, buffer: memoryview, offset: int, needed: int) -> int:
        if self._descriptor is None:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(offset)
                return _read_all(lambda view, _: file.readinto(view) or 0, buffer, 0, needed, 1)
        if self.direct:
            try:
                return _read_all(self._pread, buffer, offset, needed, PAGE)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # Some file systems accept the flag and then refuse the reads.
                logger.debug("%s: no direct reads (%s)", self.path, error)
                self._give_up_direct()
        done = _read_all(self._pread, buffer, offset, needed, 1)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset, len(buffer), os.POSIX_FADV_DONTNEED)
        return done

    def _pread(self, view: memoryview, offset: int) -> int:
        assert self._descriptor is not None
        return os.preadv(self._descriptor, [view], offset)


def _read_all(
    read: Callable[[memoryview, int], int], buffer: memoryview, offset: int, needed: int, granularity: int
) -> int:
    done = 0
    while done < needed:
        start = done // granularity * granularity  # a direct read must go on from an aligned byte
        count = read(buffer[start:], offset + start)
        if start + count <= done:
            break
        done = start + count
    return done
