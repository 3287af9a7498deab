"""ComfyUI servers as a batch sees them, by one that is a script: refusals, lost connections, forgotten prompts."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from lowvram_video.batch import comfyui_crew
from lowvram_video.batch.workflow import check_prompt, make_prompt
from lowvram_video.cli.batch_comfyui import WorkflowReader
from lowvram_video.cli.batch_crew import crew_for
from lowvram_video.cli.main import main, make_parser

FILM = b"a film" * 1000
OBJECT_INFO = {
    "CLIPTextEncode": {"input": {"required": {"text": ["STRING", {}]}}},
    "KSampler": {
        "input": {"required": {"seed": ["INT", {"min": 0, "max": 99, "control_after_generate": True}]}, "optional": {}}
    },
    "LoadImage": {"input": {"required": {"image": [["there.png"], {"image_upload": True}]}}},
}
WORKFLOW = {
    "1": {"class_type": "CLIPTextEncode", "inputs": {"text": "?"}, "_meta": {"title": "Prompt"}},
    "2": {"class_type": "KSampler", "inputs": {"seed": 0}},
    "3": {"class_type": "LoadImage", "inputs": {"image": "there.png"}},
}


class FakeServer(ThreadingHTTPServer):
    """Answers as ComfyUI does; `on_prompt` says what becomes of a prompt: a history entry, or None: it is forgotten."""

    daemon_threads = True

    def __init__(self, on_prompt: Callable[[FakeServer, dict[str, Any]], dict[str, Any] | None]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.on_prompt = on_prompt
        self.prompts: list[dict[str, Any]] = []
        self.history: dict[str, Any] = {}
        self.uploads: list[bytes] = []
        self.cut_downloads = 0  # how many end early
        self.films_are_gone = False  # until another is made
        self.refusal: dict[str, Any] | None = None
        self.answers: dict[str, tuple[int, Any, dict[str, str]]] = {}  # by path: status, body, headers
        self.num_answers: int | None = None  # how often those are given; None: always
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, *_: object) -> None:
        return

    def answered(self) -> bool:
        """Whether it gave an answer that a test has set."""
        server, path = self.server, urlsplit(self.path).path
        if path not in server.answers or server.num_answers == 0:
            return False
        if server.num_answers is not None:
            server.num_answers -= 1
        status, body, headers = server.answers[path]
        self.answer(body, status, headers=headers)
        return True

    def answer(self, body: Any, status: int = 200, cut: int = 0, headers: Mapping[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) - cut])

    def do_GET(self) -> None:
        path, server = urlsplit(self.path).path, self.server
        if self.answered():
            return
        if path == "/queue":
            self.answer({"queue_running": [], "queue_pending": []})
        elif path == "/object_info":
            self.answer(OBJECT_INFO)
        elif path.startswith("/history/"):
            prompt_id = path.removeprefix("/history/")
            self.answer({prompt_id: server.history[prompt_id]} if prompt_id in server.history else {})
        elif server.films_are_gone:
            self.answer({"error": "not found"}, 404)
        elif server.cut_downloads:
            server.cut_downloads -= 1
            self.answer(FILM, cut=100)
        else:
            self.answer(FILM)

    def do_POST(self) -> None:
        body, server = self.rfile.read(int(self.headers["Content-Length"])), self.server
        if self.answered():
            return
        if self.path == "/upload/image":
            server.uploads.append(body)
            self.answer({"name": "sent.png", "subfolder": "lowvram-batch", "type": "input"})
        elif self.path == "/prompt" and server.refusal is not None:
            self.answer(server.refusal, 400)
        elif self.path == "/prompt":
            prompt = json.loads(body)
            server.prompts.append(prompt)
            server.films_are_gone = False
            entry = server.on_prompt(server, prompt)
            if entry is not None:
                server.history[prompt["prompt_id"]] = entry
            self.answer({"prompt_id": prompt["prompt_id"]})
        else:
            self.answer(b"")


def succeeds(server: FakeServer, prompt: dict[str, Any]) -> dict[str, Any]:
    film = {"filename": "a.mp4", "subfolder": "", "type": "output"}
    return {"status": {"status_str": "success"}, "outputs": {"9": {"images": [film]}}}


def fails(server: FakeServer, prompt: dict[str, Any]) -> dict[str, Any]:
    error = ["execution_error", {"node_type": "KSampler", "exception_message": "no room\nat all"}]
    return {"status": {"status_str": "error", "messages": [error]}, "outputs": {}}


def is_forgotten_once(server: FakeServer, prompt: dict[str, Any]) -> dict[str, Any] | None:
    return None if len(server.prompts) == 1 else succeeds(server, prompt)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfyui_crew, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(comfyui_crew, "LOST_SECONDS", 0.2)


@pytest.fixture
def serve() -> Iterator[Callable[[Any], FakeServer]]:
    servers: list[FakeServer] = []

    def start(on_prompt: Any) -> FakeServer:
        servers.append(FakeServer(on_prompt))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def batch(folder: Path, server: FakeServer, *jobs: dict[str, Any], flags: tuple[str, ...] = ()) -> int:
    workflow = folder / "workflow.json"
    workflow.write_text(json.dumps(WORKFLOW))
    path = folder / "jobs.jsonl"
    path.write_text("\n".join(json.dumps({"output": str(folder / f"{n}.mp4"), **job}) for n, job in enumerate(jobs)))
    return main(["batch", str(path), "--comfyui", server.url, "--workflow", str(workflow), *flags])


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "jobs.results.jsonl").read_text().splitlines()]


def test_values_are_filled_in_and_the_film_is_brought(tmp_path: Path, serve: Callable[[Any], FakeServer]) -> None:
    server, picture = serve(succeeds), tmp_path / "mine.png"
    picture.write_bytes(b"a picture")
    assert (
        batch(tmp_path, server, {"prompt": "a cat", "seed": 7, "nodes": {"LoadImage": {}}, "image": str(picture)}) == 0
    )
    graph = server.prompts[0]["prompt"]
    assert graph["1"]["inputs"] == {"text": "a cat"} and graph["2"]["inputs"] == {"seed": 7}
    assert graph["3"]["inputs"] == {"image": "lowvram-batch/sent.png"} and b"a picture" in server.uploads[0]
    assert (tmp_path / "0.mp4").read_bytes() == FILM
    assert (
        batch(tmp_path, server, {"prompt": "a cat", "seed": 7, "nodes": {"LoadImage": {}}, "image": str(picture)}) == 0
    )
    assert len(server.prompts) == 1, "made before"


def test_a_prompt_that_a_server_forgot_is_queued_again(tmp_path: Path, serve: Callable[[Any], FakeServer]) -> None:
    server = serve(is_forgotten_once)
    assert batch(tmp_path, server, {"seed": 1}) == 0
    assert len(server.prompts) == 2 and (tmp_path / "0.mp4").read_bytes() == FILM


def test_a_prompt_that_is_there_is_not_queued_twice(tmp_path: Path, serve: Callable[[Any], FakeServer]) -> None:
    server = serve(succeeds)
    assert batch(tmp_path, server, {"seed": 1}) == 0
    (tmp_path / "0.mp4").unlink()
    (tmp_path / "jobs.results.jsonl").unlink()  # the batch was killed before it had the film
    assert batch(tmp_path, server, {"seed": 1}) == 0
    assert len(server.prompts) == 1 and (tmp_path / "0.mp4").read_bytes() == FILM


def test_a_film_that_was_removed_there_is_made_again(tmp_path: Path, serve: Callable[[Any], FakeServer]) -> None:
    server = serve(succeeds)
    assert batch(tmp_path, server, {"seed": 1}) == 0
    (tmp_path / "0.mp4").unlink()
    server.films_are_gone = True
    assert batch(tmp_path, server, {"seed": 1}) == 0
    assert len(server.prompts) == 2 and (tmp_path / "0.mp4").read_bytes() == FILM


def test_another_picture_of_the_same_name_makes_another_film(
    tmp_path: Path, serve: Callable[[Any], FakeServer]
) -> None:
    server, picture = serve(succeeds), tmp_path / "mine.png"
    for contents in (b"a", b"b"):
        picture.write_bytes(contents)
        assert batch(tmp_path, server, {"image": str(picture), "overwrite": True}) == 0
    assert len({prompt["prompt_id"] for prompt in server.prompts}) == 2


def test_half_a_film_is_none(tmp_path: Path, serve: Callable[[Any], FakeServer]) -> None:
    server = serve(succeeds)
    server.cut_downloads = 1
    assert batch(tmp_path, server, {"seed": 1}) == 0
    assert (tmp_path / "0.mp4").read_bytes() == FILM
    assert [each["status"] for each in results(tmp_path)] == ["begun", "lost", "begun", "made"]
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_failures_and_refusals_are_told_in_the_servers_words(
    tmp_path: Path, serve: Callable[[Any], FakeServer], capsys: pytest.CaptureFixture[str]
) -> None:
    assert batch(tmp_path, serve(fails), {"seed": 1}) == 1
    assert results(tmp_path)[-1]["error"] == "KSampler: no room at all"
    (tmp_path / "jobs.results.jsonl").unlink()
    server = serve(succeeds)
    error = {"message": "Value not in list", "details": "seed: 1"}
    server.refusal = {
        "error": {"message": "Prompt outputs failed"},
        "node_errors": {"2": {"class_type": "KSampler", "errors": [error]}},
    }
    assert batch(tmp_path, server, {"seed": 1}) == 1
    assert "KSampler 2: Value not in list: seed: 1" in results(tmp_path)[-1]["error"]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"seed": 100}, "expected 0 to 99"),
        ({"shift": 3}, "shift: this workflow has no place for it"),
        ({"nodes": {"Nobody": {"a": 1}}}, "none that is called 'Nobody'"),
        ({"colour": "red"}, "'colour' is no value of a workflow"),
        ({"image": "none.png"}, "none.png: no such file"),
        ({"nodes": {"3": {"image": "other.png"}}}, "the server has no 'other.png'"),
        ({"workflow": "nothing"}, "nothing: no such workflow"),
    ],
)
def test_what_cannot_be_made_is_refused_before_the_start(
    tmp_path: Path, serve: Callable[[Any], FakeServer], capsys: pytest.CaptureFixture[str], values: Any, reason: str
) -> None:
    server = serve(succeeds)
    assert batch(tmp_path, server, {"seed": 1}, values) == 2
    told = capsys.readouterr().err
    assert any("line 2: " in line and reason in line for line in told.splitlines()), told
    assert not server.prompts


def test_no_server_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(comfyui_crew.ComfyUICrew, "patience", 0.3)
    server = FakeServer(succeeds)
    server.shutdown()
    server.server_close()
    assert batch(tmp_path, server, {"seed": 1}) == 2
    assert "no worker was ready" in capsys.readouterr().err


def test_bypassed_nodes_pass_on_what_they_are_given() -> None:
    nodes = [
        {"id": 1, "type": "CLIPTextEncode", "mode": 0, "widgets_values": ["a"], "inputs": []},
        {
            "id": 2,
            "type": "KSampler",
            "mode": 4,
            "widgets_values": [1, "fixed"],
            "inputs": [{"name": "x", "type": "T", "link": 1}],
        },
        {
            "id": 3,
            "type": "KSampler",
            "mode": 0,
            "widgets_values": [5, "fixed"],
            "inputs": [{"name": "x", "type": "T", "link": 2}],
        },
        {"id": 4, "type": "Note", "mode": 0, "widgets_values": ["hello"]},
    ]
    workflow = {"nodes": nodes, "links": [[1, 1, 0, 2, 0, "T"], [2, 2, 0, 3, 0, "T"]]}
    prompt = make_prompt(workflow, OBJECT_INFO)
    assert prompt.graph == {
        "1": {"class_type": "CLIPTextEncode", "inputs": {"text": "a"}},
        "3": {"class_type": "KSampler", "inputs": {"seed": 5, "x": ["1", 0]}},
    }
    check_prompt(prompt, OBJECT_INFO, set())
    unnamed = {"nodes": [], "links": [], "definitions": {"subgraphs": [{}]}}
    inner = {"id": "S", "nodes": [{"id": 1, "type": "S"}], "links": [], "inputs": [], "outputs": []}
    endless = {"nodes": [{"id": 1, "type": "S"}], "links": [], "definitions": {"subgraphs": [inner]}}
    for broken in ({}, {"nodes": []}, unnamed, endless):
        with pytest.raises(ValueError, match=r"workflow|subgraphs"):
            make_prompt(broken, OBJECT_INFO)


def test_subgraphs_in_each_other_are_unfolded_as_the_page_does() -> None:
    def link(number: int, origin: int, slot: int, target: int, to: int) -> dict[str, Any]:
        keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        return dict(zip(keys, (number, origin, slot, target, to, "T"), strict=True))

    sampler = {
        "id": 7, "type": "KSampler", "title": "Inner", "widgets_values": [5, "fixed"],
        "inputs": [{"name": "x", "type": "T", "link": 1}, {"name": "seed", "type": "INT", "link": 2}],
    }  # fmt: skip
    deep = {
        "id": "deep", "nodes": [sampler], "inputs": [{"name": "x"}, {"name": "seed"}], "outputs": [{"name": "out"}],
        "links": [link(1, -10, 0, 7, 0), link(2, -10, 1, 7, 1), link(3, 7, 0, -20, 0)],
    }  # fmt: skip
    host = {
        "id": 4, "type": "deep", "widgets_values": [9],
        "inputs": [{"name": "x", "link": 1}, {"name": "seed", "link": 2, "widget": {"name": "seed"}}],
    }  # fmt: skip
    middle = {
        "id": "middle", "nodes": [host], "inputs": [{"name": "x"}, {"name": "my seed"}], "outputs": [{"name": "out"}],
        "links": [link(1, -10, 0, 4, 0), link(2, -10, 1, 4, 1), link(3, 4, 0, -20, 0)],
    }  # fmt: skip
    nodes = [
        {"id": 1, "type": "CLIPTextEncode", "widgets_values": ["a"]},
        {
            "id": 2, "type": "middle", "widgets_values": [11], "properties": {"proxyWidgets": [["-1", "my seed"]]},
            "inputs": [{"name": "x", "link": 1}, {"name": "my seed", "link": None, "widget": {"name": "my seed"}}],
        },
        {"id": 3, "type": "KSampler", "widgets_values": [6], "inputs": [{"name": "x", "type": "T", "link": 2}]},
    ]  # fmt: skip
    workflow = {
        "nodes": nodes, "links": [[1, 1, 0, 2, 0, "T"], [2, 2, 0, 3, 0, "T"]],
        "definitions": {"subgraphs": [middle, deep]},
    }  # fmt: skip
    prompt = make_prompt(workflow, OBJECT_INFO)
    assert prompt.graph == {
        "1": {"class_type": "CLIPTextEncode", "inputs": {"text": "a"}},
        "2:4:7": {"class_type": "KSampler", "inputs": {"seed": 11, "x": ["1", 0]}},
        "3": {"class_type": "KSampler", "inputs": {"seed": 6, "x": ["2:4:7", 0]}},
    }
    assert prompt.titles["2:4:7"] == "Inner"


# --- servers that answer what no ComfyUI does ----------------------------------------------------------------


def says_nothing(server: FakeServer, prompt: dict[str, Any]) -> dict[str, Any]:
    return {"status": "odd", "outputs": [1]}


def has_odd_outputs(server: FakeServer, prompt: dict[str, Any]) -> dict[str, Any]:
    return {"status": {"status_str": "success"}, "outputs": {"1": [], "2": {"images": [3]}}}


@pytest.mark.parametrize(
    ("on_prompt", "reason"),
    [(says_nothing, "the server says that it failed, and not why"), (has_odd_outputs, "the workflow made no file")],
)
def test_an_odd_history_is_told(
    tmp_path: Path, serve: Callable[[Any], FakeServer], on_prompt: Any, reason: str
) -> None:
    assert batch(tmp_path, serve(on_prompt), {"seed": 1}) == 1
    assert reason in results(tmp_path)[-1]["error"]


@pytest.mark.parametrize("said", [{}, [], {"prompt_id": 3}, "text"])
def test_an_odd_answer_to_a_prompt_is_told(tmp_path: Path, serve: Callable[[Any], FakeServer], said: Any) -> None:
    server = serve(succeeds)
    server.answers["/prompt"] = (200, said, {})
    assert batch(tmp_path, server, {"seed": 1}) == 1
    assert "answers what no ComfyUI does to a prompt" in results(tmp_path)[-1]["error"]


def test_an_odd_answer_to_a_picture_is_told(tmp_path: Path, serve: Callable[[Any], FakeServer]) -> None:
    server, picture = serve(succeeds), tmp_path / "mine.png"
    picture.write_bytes(b"a picture")
    server.answers["/upload/image"] = (200, ["mine.png"], {})
    assert batch(tmp_path, server, {"image": str(picture)}) == 1
    assert "answers what no ComfyUI does to a file" in results(tmp_path)[-1]["error"]


def test_a_prompt_is_not_made_a_question_by_a_redirect(tmp_path: Path, serve: Callable[[Any], FakeServer]) -> None:
    server = serve(succeeds)
    server.answers["/prompt"] = (301, {}, {"Location": f"{server.url}/queue"})
    assert batch(tmp_path, server, {"seed": 1}) == 1
    assert f"it has moved to {server.url}/queue: give that address" in results(tmp_path)[-1]["error"]


def test_a_proxy_whose_server_is_away_has_lost_it_for_a_moment(
    tmp_path: Path, serve: Callable[[Any], FakeServer], capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(succeeds)
    server.answers["/prompt"] = (502, b"Bad Gateway", {})
    server.num_answers = 1
    assert batch(tmp_path, server, {"seed": 1}) == 0
    assert [each["status"] for each in results(tmp_path)] == ["begun", "lost", "begun", "made"]
    (told,) = (line for line in capsys.readouterr().err.splitlines() if "does not answer" in line)
    assert told.count(server.url) == 1, told


BROKEN = ('{"1": {"class_type": "KSampler"}}', '{"nodes": [{"id": 1}], "links": []}', '{"1": {}}')
DEEP = ('{"1": ' * 500 + "1" + "}" * 500, "[" * 10**5)


@pytest.mark.parametrize("broken", [*BROKEN, *DEEP], ids=["inputs", "type", "nothing", "deep", "deeper"])
def test_a_broken_workflow_is_refused_before_the_start(
    tmp_path: Path, serve: Callable[[Any], FakeServer], capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    (tmp_path / "broken.json").write_text(broken)
    server = serve(succeeds)
    assert batch(tmp_path, server, {"workflow": str(tmp_path / "broken.json")}) == 2
    assert "line 1: " in capsys.readouterr().err and not server.prompts


def test_a_workflow_with_the_largest_seed_is_taken(tmp_path: Path) -> None:
    workflow = {"1": {"class_type": "KSampler", "inputs": {"seed": 2**64 - 1}}}
    (tmp_path / "w.json").write_text(json.dumps(workflow))
    read = WorkflowReader(str(tmp_path / "w.json"))(1, {"output": str(tmp_path / "a.mp4")})
    assert read.job.request["workflow"] == workflow


def test_why_a_server_is_not_there_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Callable[[Any], FakeServer],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(comfyui_crew.ComfyUICrew, "patience", 0.3)
    server = serve(succeeds)
    server.answers["/object_info"] = (403, {"error": {"message": "log in first"}}, {})
    assert batch(tmp_path, server, {"seed": 1}) == 2
    assert "log in first" in capsys.readouterr().err


# --- files here ----------------------------------------------------------------------------------------------


def test_what_somebody_made_here_meanwhile_is_not_replaced(tmp_path: Path, serve: Callable[[Any], FakeServer]) -> None:
    def makes_the_next_too(server: FakeServer, prompt: dict[str, Any]) -> dict[str, Any]:
        (tmp_path / "1.mp4").write_bytes(b"precious")
        return succeeds(server, prompt)

    server = serve(makes_the_next_too)
    for _ in range(2):  # nor does the batch take it for its own then
        assert batch(tmp_path, server, {"seed": 1}, {"seed": 2}, flags=("--keep-going",)) == 1
        assert (tmp_path / "1.mp4").read_bytes() == b"precious" and len(server.prompts) == 1


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"output": "a\0.mp4"}, "expected a path"),
        ({"output": "a\ud800.mp4"}, "half a character"),
        ({"output": "film"}, "give a name that ends as what the workflow saves"),
        ({"image": "a\0.png"}, "expected a path"),
        ({"seed": True}, "seed is true or false"),
    ],
)
def test_names_that_are_none_are_refused_by_line(
    tmp_path: Path, serve: Callable[[Any], FakeServer], capsys: pytest.CaptureFixture[str], values: Any, reason: str
) -> None:
    assert batch(tmp_path, serve(succeeds), {"seed": 1}, values) == 2
    told = capsys.readouterr().err
    assert any("line 2: " in line and reason in line for line in told.splitlines()), told


@pytest.mark.parametrize(
    "url", ["http://me:secret@127.0.0.1:1", "http://127.0.0.1:1?token=secret", "http://127.0.0.1:secret", "http://[::1"]
)
def test_an_address_has_no_secrets(tmp_path: Path, capsys: pytest.CaptureFixture[str], url: str) -> None:
    path = tmp_path / "jobs.jsonl"
    path.write_text(json.dumps({"workflow": "demo", "output": "a.mp4"}))
    assert main(["batch", str(path), "--comfyui", url]) == 2
    told = capsys.readouterr().err
    assert "address" in told and ("secret" not in told or url.endswith(":secret"))


def test_a_server_that_is_named_twice_is_one(tmp_path: Path, serve: Callable[[Any], FakeServer]) -> None:
    server = serve(succeeds)
    urls = ["--comfyui", server.url, f"{server.url}/"]
    assert crew_for(make_parser().parse_args(["batch", "jobs.jsonl", *urls]), []).size == 1
