"""What a model answered, call by call, on the disk: a run that was stopped goes on from its last whole step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ..system.atomic_files import write_file
from ..system.content_key import run_key
from ..system.run_lock import RunLock
from ..weights.files.records import read_record
from .host_copies import BackgroundWriter, HostCopy
from .kept_runs import end_run, give_up, is_given_up, open_run

logger = logging.getLogger(__name__)

FINISHED = "finished.safetensors"
FORMAT = 1  # of the files: another number is another run


class StepRecord:
    """The answers of one run's model, in `root/<first 16 letters of the key>`; a context manager that holds its lock.

    A solver asks for the same answers in the same order whenever it starts anew, so it gets those that are recorded
    (`answers`) and rebuilds its history and its noise by itself: every solver goes on bit for bit, without the model.
    Each answer is one file that is there whole or not at all, with what was asked: one that is damaged, or was given
    to another question, ends them there, and so does one that is no finite numbers. A thread writes them; where it
    cannot, the run goes on without.
    """

    def __init__(self, folder: Path, key: str, lock: RunLock) -> None:
        """Use `open`."""
        self.folder, self.key = folder, key
        self._lock = lock
        self._writer = BackgroundWriter()
        self._asked = 0  # calls of this process so far
        self._step_ends: list[int] = []  # calls when a step was done
        self._sound = True  # what was answered so far; the writer's alone, but while nothing is pending
        for leftover in folder.glob("*.partial"):  # of a process that was killed
            with suppress(OSError):
                leftover.unlink()
        self._known = self._count()  # answers that may still be on the disk

    @classmethod
    def open(cls, root: Path, settings: Mapping[str, Any]) -> StepRecord:
        """The run with these settings: JSON values and tensors, all that the model's answers depend on.

        What other runs left long ago is removed (`kept_runs`). ValueError where the folder cannot be written, where a
        setting has no stable form, and where another process works on the run.
        """
        key = run_key({"format": FORMAT, "settings": settings})
        folder, lock = open_run(root, key)
        return cls(folder, key, lock)

    @property
    def num_kept(self) -> int:
        """How many answers are on the disk, from the first on."""
        self._writer.flush()
        return self._count()

    @property
    def is_finished(self) -> bool:
        return (self.folder / FINISHED).exists()

    @property
    def is_unsound(self) -> bool:
        """Whether the run was given up for one on the safe path."""
        return is_given_up(self.folder)

    def answers(self, question: Mapping[str, Tensor], compute: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        """The recorded answer to the next call, on the device of the question; else that of `compute`, recorded."""
        index, self._asked = self._asked, self._asked + 1
        if index < self._known:
            try:
                return self._recall(index, question)
            except (OSError, ValueError, KeyError) as error:
                logger.warning("%s: %s: the run goes on from call %d", self._path(index), error, index)
                self._forget_from(index)
        made = list(compute())
        asked = HostCopy(question)
        copy = HostCopy({f"answer_{number}": tensor for number, tensor in enumerate(made)})
        self._writer.submit(lambda: self._store(index, asked.wait(), copy.wait()))
        return made

    def end_step(self) -> None:
        """The solver has done another step, with the answers so far."""
        self._step_ends.append(self._asked)

    def rewind(self) -> None:
        """The solver begins anew: what was answered so far answers it again."""
        self._known = self.num_kept
        self._sound = True
        self._asked, self._step_ends = 0, []

    def forget_step(self, step: int) -> None:
        """As `rewind`, but the answers to this step, counted from 0, and to later ones are no use and go."""
        first = self._step_ends[step - 1] if 0 < step <= len(self._step_ends) else 0
        self.rewind()
        self._forget_from(min(first, self._known))

    def give_up(self, reason: str) -> None:
        """Another run takes this one's place, now and whenever it is begun again: none of its answers is kept."""
        self.forget_step(0)
        give_up(self.folder, reason)

    def finished(self) -> dict[str, Tensor] | None:
        """What `finish` kept, in host memory; None where the run is not finished."""
        path = self.folder / FINISHED
        if not path.exists():
            return None
        try:
            return self._read(path, "finished")[0]
        except (OSError, ValueError, KeyError) as error:
            logger.warning("%s: %s: it is made again", path, error)
            return None

    def finish(self, **latents: Tensor) -> None:
        """The run's latents are there: they are kept in place of the answers, until `remove`."""
        copy = HostCopy(latents)
        self._writer.submit(lambda: self._keep_finished(copy.wait()))
        self._writer.flush()

    def remove(self) -> None:
        """What was wanted is whole and in its place: nothing of the run need be kept."""
        self._writer.close()
        if not self.folder.exists():  # nothing could be kept, so `close` left nothing
            self._lock.release()
            return
        end_run(self.folder, self._lock)

    def close(self) -> None:
        """Write what is still to be written, and let others open the run; nothing is left of one without a step."""
        try:
            self._writer.close()
            if self.folder.exists() and not (self.num_kept or self.is_finished or self.is_unsound):
                self.remove()
        finally:
            self._lock.release()

    def __enter__(self) -> StepRecord:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _path(self, index: int) -> Path:
        return self.folder / f"step_{index:04d}.safetensors"

    def _count(self) -> int:
        count = 0
        while self._path(count).exists():
            count += 1
        return count

    def _forget_from(self, index: int) -> None:
        for later in range(index, self._known):
            with suppress(OSError):  # in use, on Windows: it is written over, or answers another question again
                self._path(later).unlink(missing_ok=True)
        self._known = index

    def _recall(self, index: int, question: Mapping[str, Tensor]) -> list[Tensor]:
        tensors, metadata = self._read(self._path(index), str(index))
        if metadata.get("question") != run_key(question):
            raise ValueError("it answers another question than is asked now")
        device = next(iter(question.values())).device
        return [tensors[f"answer_{number}"].to(device) for number in range(len(tensors))]

    def _read(self, path: Path, part: str) -> tuple[dict[str, Tensor], Mapping[str, str]]:
        """A file's tensors and texts; ValueError where it is another run's, or damaged."""
        tensors, metadata = read_record(path)
        if metadata.get("key") != self.key or metadata.get("part") != part:
            raise ValueError("it is of another run")
        if metadata.get("checksum") != run_key(tensors):
            raise ValueError("it is damaged")
        if not are_numbers(tensors):
            raise ValueError("it holds NaN or infinite numbers")
        return tensors, metadata

    def _store(self, index: int, question: Mapping[str, Tensor], answers: Mapping[str, Tensor]) -> None:
        self._sound = self._sound and are_numbers(answers)
        if not self._sound:  # nor is what follows from it
            return
        self._write(self._path(index), str(index), answers, {"question": run_key(question)})

    def _keep_finished(self, latents: Mapping[str, Tensor]) -> None:
        if not are_numbers(latents):
            return
        self._write(self.folder / FINISHED, "finished", latents, {})
        for path in self.folder.glob("step_*.safetensors"):
            with suppress(OSError):  # the rule of `kept_runs` removes it
                path.unlink()

    def _write(self, path: Path, part: str, tensors: Mapping[str, Tensor], more: Mapping[str, str]) -> None:
        metadata = {"key": self.key, "part": part, "checksum": run_key(tensors), **more}
        write_file(path, save(dict(tensors), metadata))


def are_numbers(tensors: Mapping[str, Tensor]) -> bool:
    """Whether all of them are finite."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())
