"""What people type into ComfyUI's search of nodes finds ours: words of what they look for, or of what went wrong.

The page's search reads name, display name and `search_aliases` of a schema; these are read from the nodes' own files.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# what is typed -> the nodes that must be found
SEARCHES = {
    "unet gguf": {"LowVRAMLoadWanModel", "LowVRAMLoadFramePackModel"},
    "out of memory": {"LowVRAMBlockSwap", "LowVRAMPlan", "LowVRAMLoadWanModel", "LowVRAMDoctor"},
    "sageattention": {"LowVRAMLoadWanModel", "LowVRAMLoadFramePackModel", "LowVRAMDoctor"},
    "extend video": {"LowVRAMFramePackSampler"},
    "block swap": {"LowVRAMBlockSwap"},
    "framepack": {"LowVRAMFramePackSampler", "LowVRAMLoadFramePackModel"},
    "triton": {"LowVRAMDoctor"},
    "video to video": {"LowVRAMEncodeVideo"},
    "multigpu": {"LowVRAMSeveralGPUs"},
    "raylight": {"LowVRAMSeveralGPUs"},
    "clip gguf": {"LowVRAMLoadClipGGUF"},
}


def found_by() -> dict[str, list[str]]:
    """Node id -> the texts by which it is found, in lower case."""
    found = {}
    for path in sorted((ROOT / "nodes").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {
            ast.unparse(each.targets[0]): each.value
            for each in tree.body
            if isinstance(each, ast.Assign) and isinstance(each.value, ast.Constant)
        }
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "host.schema":
                given = {word.arg: names.get(ast.unparse(word.value), word.value) for word in call.keywords}
                aliases = ast.literal_eval(given["search_aliases"]) if "search_aliases" in given else []
                texts = [ast.literal_eval(given["node_id"]), ast.literal_eval(given["display_name"]), *aliases]
                found[texts[0]] = [text.lower() for text in texts]
    return found


@pytest.mark.parametrize("typed", sorted(SEARCHES))
def test_a_search_finds_its_nodes(typed: str) -> None:
    found = {node for node, texts in found_by().items() if any(typed in text for text in texts)}
    assert SEARCHES[typed] <= found, f"add {typed!r} to search_aliases of {sorted(SEARCHES[typed] - found)}"


def test_every_node_has_words_of_its_own() -> None:
    bare = [node for node, texts in found_by().items() if len(texts) < 4]
    assert not bare, f"give these search_aliases, two or more: {bare}"
    twice = [node for node, texts in found_by().items() if len(set(texts)) < len(texts)]
    assert not twice, f"a word stands twice in the search_aliases of {twice}"
