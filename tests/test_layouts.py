"""Every layout of model files in docs/layouts.md: a tiny file of each, against another program's model in fp32."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from lowvram_video.weights.files.checkpoint import CheckpointError
from torch import Tensor

from .layout_files import Made
from .layout_models import MODELS, reference
from .layout_rows import PAGE, ROWS, in_page

MOST = 1e-4


def as_reference(model: str, made: Made) -> Tensor:
    """What another program makes of the plain numbers of a file."""
    about, theirs = MODELS[model], reference(model)  # which all tests share: it gets its own numbers back
    own = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    try:
        missing = theirs.load_state_dict(
            {
                name: made.truth[about.names(name)].view(tensor.shape)
                for name, tensor in own.items()
                if about.names(name) in made.truth
            },
            strict=False,
        ).missing_keys
        assert all("embed_tokens" in name or "position_ids" in name for name in missing)
        return about.run(theirs)
    finally:
        theirs.load_state_dict(own)


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.abs().max())


def loads(model: str, made: Made) -> None:
    got = (made.load or MODELS[model].load)(made.path)
    differs = error(got, as_reference(model, made))
    print(f"{differs:.1e}")
    assert differs < MOST


@pytest.mark.parametrize("title", [title for title, row in ROWS.items() if not row.refusal])
def test_a_layout_loads_as_in_another_program(title: str, tmp_path: Path) -> None:
    row = ROWS[title]
    loads(row.model, row.make(row.model, tmp_path))


@pytest.mark.parametrize("title", [title for title, row in ROWS.items() if row.refusal])
def test_a_refused_layout_is_named_and_its_way_out_works(title: str, tmp_path: Path) -> None:
    row = ROWS[title]
    (tmp_path / "refused").mkdir()
    made = row.make(row.model, tmp_path / "refused")
    with pytest.raises(CheckpointError) as caught:
        MODELS[row.model].load(made.path)
    print(caught.value)
    assert re.search(row.refusal, str(caught.value)) and "\n" not in str(caught.value)
    assert row.way_out is not None
    loads(row.model, row.way_out(row.model, tmp_path))


def test_the_page_shows_the_table() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert in_page(page) == page, "run `python -m tests.layout_rows` and commit what it writes"
    assert len(ROWS) >= 60


def test_truth_is_not_what_any_weights_give() -> None:
    """The bound tells one model's weights from another's."""
    theirs = reference("t2v")
    other = copy.deepcopy(theirs)
    with torch.no_grad():
        other.blocks[0].ffn.net[2].weight.mul_(1.02)
    assert error(MODELS["t2v"].run(other), MODELS["t2v"].run(theirs)) > MOST
