"""Images from files, memory and arrays, and how any of them becomes RGB."""

import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from ..errors import TaskError

SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def decode(file: IO[bytes]) -> Image.Image:
    """Returns the decoded image (the first one of an animation).

    Raises:
        TaskError: Pillow has been told to fill truncated images with grey.
        Exception: What the decoder raises on damage; `reason` puts it into words.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise TaskError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on (another library may have set it), so that a truncated image "
            "would be half grey without a word: set it to False"
        )
    image = Image.open(file)
    image.load()
    return image


def reason(error: Exception) -> str:
    """Returns in plain words why an image could not be decoded."""
    if isinstance(error, UnidentifiedImageError):
        return "it is empty or no image of a known format"
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return str(error) or type(error).__name__


def open_image(path: str | Path) -> Image.Image:
    """Returns the image in a file, decoded, in its own mode.

    Raises:
        TaskError: The file is missing, truncated, damaged or no image; names it and gives the decoder's reason.
    """
    try:
        with open(path, "rb") as file:
            return decode(file)
    except Exception as error:  # decoders raise almost anything on damaged data
        raise TaskError(f"{path} cannot be read as an image: {reason(error)}") from error


def load_images(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """Returns the image files that are meant by files and folders, each once.

    Args:
        paths: Files, taken whatever their suffix, and folders, searched with all that is below them for files with an
            image suffix. The order is kept; a folder's files come sorted. Hidden files are left out.

    Raises:
        TaskError: A path does not exist, a folder holds no image, or nothing was asked for.
    """
    found: list[Path] = []
    for path in [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]:
        if path.is_dir():
            below = find_images(path)
            if not below:
                raise TaskError(f"{path} holds {contents(path)}; image files end in {' '.join(SUFFIXES)}")
            found += below
        elif path.exists():
            found.append(path)
        else:
            raise TaskError(f"there is no file or folder {path}")
    if not found:
        raise TaskError("no image was given: pass image files or folders")
    return list(dict.fromkeys(found))


def find_images(folder: Path) -> list[Path]:
    """Returns the files with an image suffix anywhere below a folder, sorted, without hidden ones."""
    found = []
    for where, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if is_visible(name)]
        found += [Path(where, name) for name in files if is_visible(name) and name.lower().endswith(SUFFIXES)]
    return sorted(found, key=Path.as_posix)


def is_visible(name: str) -> bool:
    """Whether a file or folder was put there by its user, not by the system (`.DS_Store`, `._photo.jpg`)."""
    return not name.startswith(".") and name != "__MACOSX"


def contents(folder: Path) -> str:
    """Returns what a folder without images holds, for messages."""
    count = sum(len(files) for _, _, files in os.walk(folder))
    return f"{count} files, none of them an image" if count else "no file"


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns an image of any mode as a person sees it: upright, on white where it is transparent, 8-bit RGB.

    16-bit grey is scaled to 8 bits, where Pillow's own conversion would clip everything above 255 to white. Mode `I`
    (32-bit) is 16-bit grey in most files; it is scaled alike unless no value exceeds 255.

    Raises:
        TaskError: A float image, or integers outside 16 bits: which value is white is not known.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey(image).convert("RGB")
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _deep_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F" or low < 0 or high > 65535:
        raise TaskError(
            f"the image is of mode {image.mode} with values from {low:g} to {high:g}, and which value is white is not "
            "known: save it with 8 or 16 bits a channel"
        )
    if image.mode == "I" and high <= 255:
        return Image.fromarray(values.astype(np.uint8))
    return Image.fromarray(np.round(values / 257).astype(np.uint8))  # 65535 / 257 = 255


class Files:
    """Images in files.

    Args:
        paths: The files.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int, /) -> Image.Image:
        with open(self.paths[index], "rb") as file:
            return decode(file)

    def describe(self, index: int) -> str:
        return str(self.paths[index])


class Packed:
    """Encoded images back to back in memory.

    Args:
        data: Their bytes, uint8.
        offsets: Where each begins and the last one ends, `[n + 1]`.
        name: What `describe` calls the whole.
    """

    def __init__(self, data: NDArray[np.uint8], offsets: NDArray[np.int64], name: str) -> None:
        self.data, self.offsets, self.name = data, offsets, name

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int, /) -> Image.Image:
        return decode(io.BytesIO(self.data[self.offsets[index] : self.offsets[index + 1]].tobytes()))

    def describe(self, index: int) -> str:
        return f"image {index} of {self.name}"


class Arrays:
    """Images that are pixels already.

    Args:
        pixels: uint8, `[n, H, W]` grey or `[n, H, W, 3]` RGB.
        name: What `describe` calls the whole.
    """

    def __init__(self, pixels: NDArray[np.uint8], name: str) -> None:
        self.pixels, self.name = pixels, name

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int, /) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def describe(self, index: int) -> str:
        return f"image {index} of {self.name}"
