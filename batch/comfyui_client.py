"""A ComfyUI server, asked over HTTP. Source of the routes: ComfyUI's `server.py`."""

from __future__ import annotations

import http.client
import json
import secrets
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from ..system.atomic_files import partial_name, replace_file

TIMEOUT = 30.0
MOST_BYTES = 256 * 2**20  # of an answer that is no file
UPLOADS = "lowvram-batch"  # a folder of the server's inputs
GATEWAY = (502, 503, 504)  # what a proxy answers whose server is away


class ServerLost(OSError):
    """The server does not answer, or answers what no ComfyUI does; in words that follow its address."""


class ServerRefused(ValueError):
    """The server answers that it will not, in its own words."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """What is sent would become a question without it on the way; and a server is who it was said to be."""

    def redirect_request(self, *_: Any) -> None:
        return None


class ComfyUIServer:
    """`url` such as http://192.168.1.20:8188. All methods raise ServerLost and ServerRefused."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._opener = urllib.request.build_opener(_NoRedirects)

    def get(self, path: str) -> Any:
        """An answer that is JSON."""
        return self._json(urllib.request.Request(f"{self.url}{path}"))

    def post(self, path: str, values: Mapping[str, Any]) -> Any:
        """The same for what is sent as JSON."""
        headers = {"Content-Type": "application/json"}
        return self._json(urllib.request.Request(f"{self.url}{path}", json.dumps(values).encode("ascii"), headers))

    def queued(self, parts: Sequence[str] = ("queue_running", "queue_pending")) -> list[str]:
        """The prompts that run or wait there, by their ids."""
        queue = self.get("/queue")
        try:
            return [str(item[1]) for part in parts for item in queue[part]]
        except (LookupError, TypeError) as error:
            raise ServerLost("answers what is no queue of ComfyUI's") from error

    def queue(self, prompt: Mapping[str, Any], prompt_id: str) -> str:
        """Have it make a prompt; the id that it knows it by, which older servers choose."""
        said = self.post("/prompt", {"prompt": prompt, "prompt_id": prompt_id, "client_id": "lowvram-batch"})
        if not isinstance(said, dict) or not isinstance(said.get("prompt_id"), str):
            raise ServerLost("answers what no ComfyUI does to a prompt")
        return str(said["prompt_id"])

    def object_info(self) -> Mapping[str, Any]:
        """What it says of its nodes."""
        said = self.get("/object_info")
        if not isinstance(said, dict):
            raise ServerLost("answers what is no list of nodes")
        return said

    def history(self, prompt_id: str) -> Mapping[str, Any] | None:
        """What became of a prompt; None where it has not ended, or was never there."""
        found = self.get(f"/history/{quote(prompt_id)}")
        entry = found.get(prompt_id) if isinstance(found, dict) else None
        return entry if isinstance(entry, dict) else None

    def cancel(self, prompt_id: str) -> None:
        """Take a prompt from the queue, or interrupt it where it runs."""
        self.post("/queue", {"delete": [prompt_id]})
        if prompt_id in self.queued(["queue_running"]):  # else older servers interrupt somebody else's
            self.post("/interrupt", {"prompt_id": prompt_id})

    def upload(self, path: Path, name: str) -> str:
        """Send a picture or a video to the server's inputs, as `name`; what loaders there call it."""
        boundary = secrets.token_hex(16)
        fields = {"type": "input", "subfolder": UPLOADS, "overwrite": "true"}
        parts = [
            f'--{boundary}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode()
            for key, value in fields.items()
        ]
        head = f'Content-Disposition: form-data; name="image"; filename="{name}"'
        kind = "Content-Type: application/octet-stream"
        parts += [f"--{boundary}\r\n{head}\r\n{kind}\r\n\r\n".encode(), path.read_bytes(), b"\r\n"]
        body = b"".join([*parts, f"--{boundary}--\r\n".encode()])
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        said = self._json(urllib.request.Request(f"{self.url}/upload/image", body, headers))
        if not isinstance(said, dict) or not said.get("name"):
            raise ServerLost("answers what no ComfyUI does to a file")
        return f"{said['subfolder']}/{said['name']}" if said.get("subfolder") else str(said["name"])

    def download(self, file: Mapping[str, Any], target: Path) -> None:
        """A file of a prompt's outputs, whole at `target` or not at all. OSError as the system's."""
        wanted = {key: str(file.get(key, "")) for key in ("filename", "subfolder", "type")}
        partial = partial_name(target, target.suffix)
        try:
            with self._open(urllib.request.Request(f"{self.url}/view?{urlencode(wanted)}")) as answer:
                left = answer.length  # None where the server does not say
                with partial.open("xb") as out:
                    while block := _read(answer, 2**20):
                        out.write(block)
                        left = None if left is None else left - len(block)
            if left:
                raise ServerLost(f"ended amid {wanted['filename']}")
            replace_file(partial, target)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def _json(self, request: urllib.request.Request) -> Any:
        with self._open(request) as answer:
            text = _read(answer, MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ServerLost(f"answers more than {MOST_BYTES} bytes")
        try:
            return json.loads(text) if text else None
        except (ValueError, RecursionError) as error:
            raise ServerLost("answers what is no JSON: is it a ComfyUI server?") from error

    def _open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        try:
            answer: http.client.HTTPResponse = self._opener.open(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            with error:
                if error.code in GATEWAY:
                    raise ServerLost(f"does not answer ({_reason(error)})") from error
                raise ServerRefused(_reason(error)) from error
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            raise ServerLost(f"does not answer ({getattr(error, 'reason', error)})") from error
        return answer


def _read(answer: http.client.HTTPResponse, most: int) -> bytes:
    try:
        return answer.read(most)
    except (OSError, http.client.HTTPException) as error:
        raise ServerLost(f"does not answer ({error})") from error


def _reason(error: urllib.error.HTTPError) -> str:
    """What a server says of a prompt that it refuses, in one line."""
    text = ""
    if error.headers.get("Location"):
        return f"HTTP {error.code}, it has moved to {error.headers['Location'][:200]}: give that address"
    with suppress(OSError, http.client.HTTPException):
        text = error.read(2**20).decode("utf-8", errors="replace")
    try:
        said = json.loads(text)
        details = [
            f"{node.get('class_type')} {number}: {each.get('message')}: {each.get('details')}"
            for number, node in (said.get("node_errors") or {}).items()
            for each in node.get("errors", [])
        ]
        return "; ".join(details) or str(said["error"].get("message", said["error"]))
    except (ValueError, RecursionError, LookupError, AttributeError, TypeError):
        return f"HTTP {error.code} {' '.join(text.split())[:200]}"
