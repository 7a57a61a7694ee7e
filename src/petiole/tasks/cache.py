"""A split as pixels, decoded once where they fit into memory."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ..errors import TaskError
from .images import reason
from .task import Split
from .transform import Transform

Progress = Callable[[int, int], object]


class Pixels:
    """The transformed images of a split and their labels, on the CPU.

    They are decoded once, now, when all of them fit into the limit (150,528 bytes an image at 224x224); otherwise
    each batch decodes its own, in threads.

    Args:
        split: Images and labels.
        transform: How an image becomes pixels.
        limit_mib: Memory the decoded split may take [MiB]; 0 never caches.
        progress: Called with the number of images done and in all, while the cache is filled.

    Raises:
        TaskError: An image cannot be decoded; names it and gives the reason. Without a cache, `batch` raises it.
    """

    def __init__(
        self, split: Split, transform: Transform, limit_mib: float = 2048, progress: Progress | None = None
    ) -> None:
        self.split, self.transform = split, transform
        self.labels = torch.from_numpy(split.labels)
        _, height, width = transform.input_size
        fits = len(split) * 3 * height * width <= limit_mib * 2**20
        self._cache = self._decode(range(len(split)), progress) if fits else None

    def __len__(self) -> int:
        return len(self.split)

    @property
    def is_cached(self) -> bool:
        """Whether every image is decoded already."""
        return self._cache is not None

    def batch(self, indices: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns pixels, uint8 `[B, 3, H, W]`, and labels, int64 `[B]`, of the images at these positions."""
        rows = torch.as_tensor(indices, dtype=torch.int64, device="cpu")
        pixels = self._decode(rows.tolist()) if self._cache is None else self._cache[rows]
        return pixels, self.labels[rows]

    def _decode(self, indices: Sequence[int], progress: Progress | None = None) -> Tensor:
        pixels = torch.empty(len(indices), *self.transform.input_size, dtype=torch.uint8)

        def decode(row: int) -> None:
            pixels[row] = self._one(indices[row])

        # decoders release the GIL; a pool per call costs little beside decoding and leaves the object picklable
        pool = ThreadPoolExecutor(num_threads())
        try:
            for done, _ in enumerate(pool.map(decode, range(len(indices))), start=1):
                if progress is not None:
                    progress(done, len(indices))
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, the images that nobody will see
        return pixels

    def _one(self, index: int) -> Tensor:
        try:
            return self.transform.pixels(self.split.images[index])
        except Exception as error:  # decoders raise almost anything on damaged data
            raise unreadable(self.split, index, error) from error


def num_threads() -> int:
    """Returns how many images are decoded at a time."""
    return min(16, os.cpu_count() or 1)


def unreadable(split: Split, index: int, error: Exception) -> TaskError:
    """Returns the error for an image that cannot be decoded: its name and the reason."""
    return TaskError(f"{split.images.describe(index)} cannot be read as an image: {reason(error)}")
