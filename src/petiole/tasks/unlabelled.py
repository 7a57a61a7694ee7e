"""Images without labels."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..errors import TaskError
from .images import Files, find_images
from .task import Images, Joined, Split


def open_images(sources: str | Path | Iterable[str | Path], *, seed: int = 0) -> Split:
    """Returns the images of folders, packs and tasks as one split whose labels are all 0.

    A folder gives every image below it, whatever its layout; anything else is what `open_task` takes, and gives its
    training images alone.

    Args:
        sources: One or several.
        seed: Which images of a task without parts are its training images, as in `open_task`.

    Raises:
        TaskError: A source is none, or holds no image.

    Example:
        >>> import petiole as pt
        >>> images = pt.open_images(["digits", "counting"])
    """
    named = [sources] if isinstance(sources, str | Path) else sources
    parts = [_images(source, seed) for source in named]
    if not parts:
        raise TaskError("no images were given: pass folders, packs or names of tasks")
    images = parts[0] if len(parts) == 1 else Joined(parts)
    return Split(images, np.zeros(len(images), np.int64))


def _images(source: str | Path, seed: int) -> Images:
    from . import BUILT_IN, open_task

    path = Path(source).expanduser()
    if not path.is_dir() or source in BUILT_IN:
        return open_task(source, seed=seed).train.images
    found = find_images(path)
    if not found:
        raise TaskError(f"{path} holds no image: looked at every file below it")
    return Files(found)
