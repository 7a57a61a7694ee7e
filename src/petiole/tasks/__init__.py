"""Tasks: readers of labelled images, the transform, the cache.

open_task("digits")                 built in: digits, position, orientation, counting
open_task("photos/")                image folder: <class>/*, or train|val|test/<class>/*
open_task("vtab/caltech101")        file lists: train800.txt, val200.txt, test.txt
open_task("pets.npz")               image pack
open_task("hf:owner/name:config")   Hugging Face dataset, or one that was saved to disk
"""

import difflib
from collections.abc import Callable
from pathlib import Path

from ..errors import TaskError
from .cache import Pixels
from .images import load_images, open_image
from .task import Images, Split, Task
from .transform import Transform
from .unlabelled import open_images

__all__ = [
    "BUILT_IN",
    "Images",
    "Pixels",
    "Split",
    "Task",
    "Transform",
    "load_images",
    "open_image",
    "open_images",
    "open_task",
]


def _digits(seed: int) -> Task:
    from .digits import read_digits

    return read_digits(seed)


def _rendered(name: str) -> Callable[[int], Task]:
    def render(seed: int) -> Task:
        from .rendered import render_task

        return render_task(name, seed)

    return render


# name -> how it is made from a seed
BUILT_IN: dict[str, Callable[[int], Task]] = {
    "digits": _digits,
    **{name: _rendered(name) for name in ("position", "orientation", "counting")},
}


def open_task(source: str | Path, *, seed: int = 0) -> Task:
    """Returns the task that a name, a file, a folder or an `hf:` address means.

    Where a source has no val part, a stratified fifth of train becomes val; where it has no parts at all, a stratified
    fifth becomes test first. A class with a single image keeps it for training.

    Args:
        source: A built-in name (digits, position, orientation, counting), a `.npz` pack, a folder with VTAB-1k's lists,
            a folder of images, `hf:owner/name`, `hf:owner/name:config` or `hf:` and a folder written by `save_to_disk`.
            A built-in name goes before a file of that name: write `./digits` or pass a `Path` for the file.
        seed: Which images are cut off, and what the rendered tasks show.

    Raises:
        TaskError: Nothing of this kind is there, or it does not make a task.

    Example:
        >>> open_task("counting").classes
        ('1', '2', '3', '4', '5', '6', '7', '8')
    """
    if isinstance(source, str):
        if source in BUILT_IN:
            return BUILT_IN[source](seed)
        if source.startswith("hf:"):
            from .hub import read_hub

            return read_hub(source.removeprefix("hf:"), seed)
    path = Path(source).expanduser()
    if path.is_dir():
        return _open_folder(path, seed)
    if path.is_file() and path.suffix == ".npz":
        from .packs import read_pack

        return read_pack(path, seed)
    raise TaskError(_unknown(str(source), path))


def _open_folder(path: Path, seed: int) -> Task:
    from .folders import read_folder
    from .vtab import TRAIN_LISTS, read_vtab

    is_vtab = any((path / name).is_file() for name in TRAIN_LISTS)
    return read_vtab(path, seed) if is_vtab else read_folder(path, seed)


def _unknown(source: str, path: Path) -> str:
    near = difflib.get_close_matches(source, BUILT_IN, n=1)
    found = "a file that is no .npz pack" if path.exists() else "no file or folder of that name"
    return (
        f"no task is called {source!r}"
        + (f": did you mean {near[0]!r}? " if near else ". ")
        + f"Found {found}; looked "
        f"for a built-in task ({', '.join(BUILT_IN)}), a .npz pack, a folder with VTAB lists (train800.txt), a folder "
        "of images (<class>/<image> or train/<class>/<image>) and hf:owner/name"
    )
