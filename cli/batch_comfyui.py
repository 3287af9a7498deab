"""Jobs for ComfyUI servers: an example workflow, or any other, with values filled in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..batch.job import Job, kind_of
from ..batch.job_values import FILES, check_names
from ..system.bounded_json import parse_json
from ..system.content_key import run_key
from ..system.output_lock import file_sha256
from ..system.regular_files import read_regular
from .batch_jobs import NO_OUTPUT, ReadJob
from .job_flags import checked_path

EXAMPLES = Path(__file__).parents[1] / "example_workflows"
MOST_BYTES = 64 * 2**20
MOST_SEED = 2**64 - 1  # of ComfyUI's nodes
EXPECTED = "expected a workflow that ComfyUI's page has saved"
OWN = ("output", "workflow", "nodes", "overwrite")  # of a job; all others are values of the workflow


class WorkflowReader:
    """Reads lines such as {"prompt": "...", "seed": 1, "output": "a.mp4"}; `default` is what most of them fill in."""

    def __init__(self, default: str | None) -> None:
        self._default = default
        self._read: dict[str, Mapping[str, Any]] = {}

    def __call__(self, line: int, values: Mapping[str, Any]) -> ReadJob:
        """A job; ValueError where it is none."""
        values = {key: value for key, value in values.items() if value is not None}  # null is the same as left out
        output, name = values.get("output"), values.get("workflow", self._default)
        if not isinstance(output, str) or not output:
            raise ValueError(NO_OUTPUT)
        if not isinstance(name, str):
            raise ValueError("it has no workflow: give one, or --workflow for all jobs")
        nodes = values.get("nodes", {})
        if not isinstance(nodes, dict) or not all(isinstance(inputs, dict) for inputs in nodes.values()):
            raise ValueError(f"nodes is {kind_of(nodes)}: expected {{title: {{input: value}}}}")
        filled = {key: value for key, value in values.items() if key not in OWN}
        check_names(filled)
        for key in FILES:
            if key in filled:
                filled[key] = str(checked_path(key, filled[key]))
        workflow = self._workflow(name)
        path = checked_path("output", output)
        if not path.suffix:
            raise ValueError(f"output is {output}: give a name that ends as what the workflow saves, such as .mp4")
        read = [Path(filled[name]) for name in FILES if name in filled]
        contents = [file_sha256(file) if file.is_file() else "" for file in read]  # servers know jobs by their key
        key = run_key(
            {"workflow": workflow, "values": filled, "nodes": nodes, "output": str(path), "contents": contents}
        )
        request = {
            "workflow": workflow, "values": filled, "nodes": nodes, "output": str(path), "key": key,
            "overwrite": values.get("overwrite") is True,
        }  # fmt: skip
        return ReadJob(Job(line, Path(output), key, request, name), [path], read)

    def _workflow(self, name: str) -> Mapping[str, Any]:
        if name not in self._read:
            self._read[name] = _load(name)
        return self._read[name]


def _load(name: str) -> Mapping[str, Any]:
    """A workflow by its path, or by the name of an example. ValueError where there is none."""
    example = EXAMPLES / f"{Path(name).name.removesuffix('.json')}.json"
    path = Path(name) if Path(name).is_file() else example
    try:
        workflow = parse_json(read_regular(path, MOST_BYTES), MOST_BYTES, most_integer=MOST_SEED)
    except FileNotFoundError:
        known = ", ".join(sorted(file.stem for file in EXAMPLES.glob("*.json")))
        raise ValueError(f"{name}: no such workflow; give a file, or the name of an example: {known}") from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path} cannot be read ({why}): {EXPECTED}") from None
    if not isinstance(workflow, dict):
        raise ValueError(f"{path} is {kind_of(workflow)}: {EXPECTED}")
    return workflow
