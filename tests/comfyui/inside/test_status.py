"""What the page says of a node while it runs: on ComfyUI's channel, where there is one, and of the node that runs."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from comfy_execution.utils import CurrentNodeContext
from lowvram_pack.nodes.bridge import host
from lowvram_pack.nodes.bridge.status import Loading, teller


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What a server that has one page was asked to show: the node, and the text."""
    texts: list[tuple[str, str]] = []

    def send(text: str, node: str, client: str) -> None:
        assert client == "page"
        texts.append((node, text))

    server = SimpleNamespace(client_id="page", send_progress_text=send)
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=server)))
    return texts


def test_a_text_is_of_the_node_that_ran_when_it_began(said: list[tuple[str, str]]) -> None:
    teller()("nobody runs")
    with CurrentNodeContext("prompt", "5:3"):
        tell = teller()
    tell("decoding")
    assert said == [("5:3", "decoding")]


@pytest.mark.parametrize("lacks", [{"send_progress_text": None}, {"client_id": None}])
def test_without_the_channel_or_a_page_nothing_is_said(
    said: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, lacks: dict[str, Any]
) -> None:
    ((name, _),) = lacks.items()
    server = sys.modules["server"].PromptServer.instance
    if name == "send_progress_text":
        monkeypatch.delattr(server, name)
    else:
        monkeypatch.setattr(server, name, None)
    with CurrentNodeContext("prompt", "7"):
        teller()("decoding")
    monkeypatch.delitem(sys.modules, "server")
    with CurrentNodeContext("prompt", "7"):
        teller()("decoding")
    assert said == []


@pytest.mark.newest
def test_reading_tells_its_seconds_and_stops_when_asked(
    said: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    reading = Loading(lambda: now[0])
    with CurrentNodeContext("prompt", "7"):
        reading.expect("loading 2.00 GiB of weights")  # and nothing is read
        reading.expect("loading 1.00 GiB of weights")
        for now[0] in (0.4, 0.9, 1.5, 1.9, 2.6, 2.7):
            reading.check()
        reading.expect("")
        for now[0] in (3.0, 9.0):  # passes
            reading.check()
    assert [text for _, text in said] == [
        "loading 1.00 GiB of weights, 1 s",
        "loading 1.00 GiB of weights, 2 s",
    ]

    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(host, "stop_if_interrupted", stop)
    with pytest.raises(KeyboardInterrupt):
        reading.check()
