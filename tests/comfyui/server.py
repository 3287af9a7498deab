"""A real ComfyUI server for a test module: started once, isolated in a folder of its own, asked over HTTP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

PACK = Path(__file__).parents[2]
STAND_INS = Path(__file__).parent / "stand_ins"
PACK_FOLDER = "ComfyUI-LowVRAM-Video"
START_SECONDS, PROMPT_SECONDS = 180, 300

Graph = dict[str, dict[str, Any]]


class PromptError(Exception):
    """A prompt that the server refused, or that failed; `details` is what the user would see."""

    def __init__(self, details: Any):
        super().__init__(json.dumps(details)[:2000])
        self.details = details


class Server:
    """`with Server(folder of ComfyUI, its python, base) as server:`; models, outputs and the pack lie under `base`."""

    def __init__(self, comfyui: Path, python: Path, base: Path, flags: tuple[str, ...] = ("--cpu",)):
        self.comfyui, self.python, self.base, self.flags = comfyui, python, base, flags
        self.port = _free_port()
        self.log = base / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        nodes = self.base / "custom_nodes"
        nodes.mkdir(parents=True, exist_ok=True)
        for target, name in ((PACK, PACK_FOLDER), (STAND_INS, "stand_ins")):
            if not (nodes / name).exists():
                (nodes / name).symlink_to(target, target_is_directory=True)
        command = [
            str(self.python), "main.py", "--port", str(self.port), "--base-directory", str(self.base),
            "--database-url", "sqlite:///:memory:", "--disable-api-nodes", "--disable-auto-launch", *self.flags,
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, cwd=self.comfyui, env=environment, stdout=self.log.open("wb"), stderr=subprocess.STDOUT
        )
        self._wait_until_up()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(20)

    def kill(self) -> None:
        """End it as a crash would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(20)

    def process_ended(self, seconds: float) -> int | None:
        """Its exit code, if it ends within so many seconds."""
        assert self._process is not None
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def get(self, path: str) -> Any:
        return self._request(path)

    def post(self, path: str, values: dict[str, Any]) -> Any:
        return self._request(path, json.dumps(values).encode())

    def queue(self, graph: Graph, client: str = "test", extra: dict[str, Any] | None = None) -> str:
        """Submit an API-format graph for a client, such as a page; PromptError where it is refused.

        `extra` is what the page gives besides, such as its workflow.
        """
        return str(self.post("/prompt", {"prompt": graph, "client_id": client, "extra_data": extra or {}})["prompt_id"])

    def wait(self, prompt_id: str, seconds: float = PROMPT_SECONDS) -> dict[str, Any]:
        """The history entry of a prompt once it is done, however it ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return dict(history[prompt_id])
            time.sleep(0.1)
        raise TimeoutError(f"prompt {prompt_id} is not done after {seconds} s:\n{self.tail()}")

    def run(self, graph: Graph, client: str = "test", extra: dict[str, Any] | None = None) -> dict[str, Any]:
        """The outputs of a graph by node; PromptError, with the messages, where it fails."""
        entry = self.wait(self.queue(graph, client, extra))
        if entry["status"]["status_str"] != "success":
            raise PromptError(entry["status"]["messages"])
        return dict(entry["outputs"])

    def tail(self, num_lines: int = 40) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:])

    def _request(self, path: str, data: bytes | None = None) -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise PromptError(json.loads(error.read() or b"null")) from error
        return json.loads(text) if text else None

    def _wait_until_up(self) -> None:
        assert self._process is not None
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended with {self._process.returncode}:\n{self.tail()}")
            try:
                self.get("/system_stats")
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.3)
            else:
                return
        self.__exit__()
        raise TimeoutError(f"ComfyUI is not up after {START_SECONDS} s:\n{self.tail()}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
