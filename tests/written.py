"""Whether a command says where it wrote."""

from pathlib import Path


def unnamed(folder: Path, said: str) -> list[str]:
    """The files below a folder whose path, or that of a folder below it that they are in, a command did not print."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return [str(path) for path in files if not any(str(place) in said for place in _places(path, folder))]


def _places(path: Path, folder: Path) -> list[Path]:
    """The file, and the folders around it; a file's own folder counts only where it is one of many runs'."""
    around = [place for place in path.parents if folder in place.parents]
    return [path, *(place for place in around if len(place.relative_to(folder).parts) > 1)]
