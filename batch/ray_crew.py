"""Workers on a Ray cluster: an actor each, which has a process like those of this machine."""

from __future__ import annotations

import queue
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..system.atomic_files import write_file
from ..system.output_lock import file_sha256
from .job import check_output
from .process import ChildProcess, Command, sharing_ram
from .worker import Inbox, Message

LOCAL = "local"
KNOCK_SECONDS = 10.0
HEAR_SECONDS = 5.0
THREADS = 3  # of an actor: one says what it heard, one is told


def import_ray() -> ModuleType:
    """Ray. ValueError where it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            f'Ray is not installed here ({error}): pip install "ray>=2.9" on every machine of the cluster'
        ) from None
    module: ModuleType = ray
    return module


class RemoteProcess:
    """What an actor has: a worker's process on its machine, and that machine's files."""

    def __init__(self, words: Sequence[str], num_beside: int) -> None:
        """`words` follow Python's own; `num_beside` workers are on one machine."""
        self._said: queue.SimpleQueue[tuple[str, Mapping[str, Any]]] = queue.SimpleQueue()
        words = sharing_ram([sys.executable, *words], num_beside)
        self._child = ChildProcess(Command(words), lambda kind, values: self._said.put((kind, values)))

    def say(self, kind: str, request: Mapping[str, Any]) -> None:
        """Tell the process something."""
        self._child.say(kind, request)

    def heard(self, seconds: float) -> list[tuple[str, Mapping[str, Any]]]:
        """What it has said since the last call, waited for no longer than this."""
        heard: list[tuple[str, Mapping[str, Any]]] = []
        with suppress(queue.Empty):
            heard.append(self._said.get(timeout=seconds))
            while True:
                heard.append(self._said.get_nowait())
        return heard

    def read(self, path: str) -> bytes:
        """A file of this machine. OSError as the system's."""
        return Path(path).read_bytes()


class RayWorker:
    """See `Worker`: an actor, and a thread here that hears it."""

    load = 0  # nobody else gives it work

    def __init__(self, ray: ModuleType, name: str, actor: Any, inbox: Inbox) -> None:
        self.name = name
        self._ray, self._actor, self._inbox = ray, actor, inbox
        self._output = Path()  # of the job at hand
        threading.Thread(target=self._listen, daemon=True).start()

    def ask(self, kind: str, request: Mapping[str, Any]) -> None:
        self._output = Path(request["output"])
        try:
            check_output(kind, request)  # here, where the film comes to: the worker's machine may have other files
        except ValueError as error:
            self._inbox.put(Message(self, "failed", {"error": str(error)}))
            return
        self._actor.say.remote(kind, request)

    def stop(self) -> None:
        self._actor.say.remote("stop", {})

    def kill(self) -> None:
        with suppress(self._ray.exceptions.RayError, ValueError):  # one that is gone
            self._ray.kill(self._actor)

    def _listen(self) -> None:
        error = "a fault of this program: see what it printed"
        try:
            while True:
                for kind, values in self._ray.get(self._actor.heard.remote(HEAR_SECONDS)):
                    if kind == "ended":
                        raise _Ended(values["error"])
                    if kind == "made":
                        self._bring(values)
                    self._inbox.put(Message(self, kind, values))
        except (_Ended, self._ray.exceptions.RayError, OSError) as lost:
            error = " ".join(str(lost).split())[:300]
        finally:  # whatever ends this thread: its job is not waited for
            self.kill()
            self._inbox.put(Message(self, "ended", {"error": error}))

    def _bring(self, values: Mapping[str, Any]) -> None:
        """Have the file here where the folder is not one that both machines see."""
        if self._output.is_file() and file_sha256(self._output) == values["sha256"]:
            return
        data: bytes = self._ray.get(self._actor.read.remote(str(self._output)))
        self._output.parent.mkdir(parents=True, exist_ok=True)
        write_file(self._output, data)


class _Ended(Exception):
    """The process of an actor ended."""


@dataclass(frozen=True)
class RayPlan:
    """Where and what: `address` as `ray.init` has it, or "local"; `module` is what each worker runs.

    Each has a card of its own where `on_cards`; None: where the cluster has some. `size` None: one for each card, or
    for each machine of the cluster.
    """

    address: str
    module: str
    on_cards: bool | None
    size: int | None = None


class RayCrew:
    """See `Crew`: actors of a cluster, which is joined here and left in `close`."""

    patience = 1800.0  # a cluster may grow when it is asked for more

    def __init__(self, plan: RayPlan, most: int) -> None:
        """No more than `most` workers. ValueError where Ray is missing, or the cluster cannot be joined."""
        self._ray = import_ray()
        self._join(plan)
        resources: Mapping[str, float] = self._ray.cluster_resources()
        nodes = [node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        num_cards = int(resources.get("GPU", 0))
        on_cards = num_cards > 0 if plan.on_cards is None else plan.on_cards
        if on_cards and not num_cards:
            self.close()
            raise ValueError(f"the Ray cluster at {plan.address} has no GPU: give its jobs the device cpu")
        self.size = max(1, min(plan.size or (num_cards if on_cards else len(nodes)), most))
        self._words = ["-m", plan.module]
        self._beside = -(-self.size // max(1, len(nodes)))  # workers of a machine
        self._actor = self._ray.remote(
            num_gpus=int(on_cards), num_cpus=1, max_restarts=0, max_concurrency=THREADS, scheduling_strategy="SPREAD"
        )(RemoteProcess)

    def start(self, seat: int, inbox: Inbox) -> RayWorker:
        return RayWorker(self._ray, f"ray {seat + 1}", self._actor.remote(self._words, self._beside), inbox)

    def close(self) -> None:
        self._ray.shutdown()

    def _join(self, plan: RayPlan) -> None:
        own: dict[str, Any] = {}
        if plan.address == LOCAL:
            own = {"include_dashboard": False, "num_cpus": plan.size}
        terminated = signal.getsignal(signal.SIGTERM)
        try:
            _knock(plan.address)
            self._ray.init(plan.address, log_to_driver=False, logging_level="ERROR", **own)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"the Ray cluster at {plan.address} cannot be joined ({' '.join(str(error).split())[:200]}): start it "
                "with `ray start --head`, and give its address, or local"
            ) from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, terminated)  # Ray puts its own in its place


def _knock(address: str) -> None:
    """OSError where nobody listens at `host:port` or `ray://host:port`: Ray itself tries for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        with socket.create_connection((host.strip("[]"), int(port)), KNOCK_SECONDS):
            pass
