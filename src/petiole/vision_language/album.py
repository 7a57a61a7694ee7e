"""The images that questions are about, as a language model's eyes want them, or seen once and for all."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..core.prove import eval_mode
from ..tasks.cache import Pixels, Progress
from ..tasks.question import Question
from ..tasks.task import Images, Split
from ..tasks.transform import Transform
from ..train.world import World
from .eyes import Eyes

# images per pass of the eyes where nothing is trained
_BATCH = 64


class Look(Protocol):
    """What gives a model the images of questions."""

    def of(self, questions: Sequence[Question]) -> dict[str, Tensor]:
        """Returns what `Sighted` takes for these questions: nothing where none of them has an image."""
        ...


class Album:
    """The images of some questions as pixels, which trained eyes see anew each time.

    Decoded once, now, where all of them fit into the limit, as `Pixels` does.

    Args:
        images: Among others, those of the questions.
        questions: Which images there have to be.
        transform: How an image becomes pixels.
        like: A tensor of the eyes, for device and dtype.
        limit_mib: Memory the decoded images may take [MiB]; 0 never keeps them.
        progress: Called with the number of images read and in all.

    Raises:
        TaskError: An image cannot be read.
    """

    def __init__(
        self,
        images: Images,
        questions: Iterable[Question],
        transform: Transform,
        like: Tensor,
        limit_mib: float = 2048,
        progress: Progress | None = None,
    ) -> None:
        self.like, self.transform = like, transform
        used = sorted({image for question in questions for image in question.images})
        self.rows = {image: row for row, image in enumerate(used)}
        split = Split(images, np.zeros(len(images), np.int64)).part(used) if used else None
        self.pixels = None if split is None else Pixels(split, transform, limit_mib, progress)

    def __len__(self) -> int:
        return len(self.rows)

    def of(self, questions: Sequence[Question]) -> dict[str, Tensor]:
        rows, indicator = self.places(questions)
        return {} if not rows.numel() else {"images": self.read(rows), "indicator": indicator.to(self.like.device)}

    def places(self, questions: Sequence[Question]) -> tuple[Tensor, Tensor]:
        """Returns which images questions have `[B, I]`, by row of the album, and where there is one."""
        most = max(len(question.images) for question in questions)
        rows = [[self.rows[image] for image in question.images] for question in questions]
        there = [[1] * len(row) + [0] * (most - len(row)) for row in rows]
        return torch.tensor([[*row, *[0] * (most - len(row))] for row in rows]), torch.tensor(there)

    def read(self, rows: Tensor) -> Tensor:
        """Returns what the eyes see of rows `[...]` of the album: `[..., 3, H, W]`."""
        assert self.pixels is not None
        pixels, _ = self.pixels.batch(rows.flatten())
        return self.transform.normalize(pixels.to(self.like.device)).to(self.like.dtype).unflatten(0, rows.shape)


class Seen:
    """The features of an album's images, of eyes that nothing changes: each image is seen once, now.

    Features beyond the limit are not kept, and such images are read and seen each time.

    Args:
        album: The images.
        eyes: What sees them, in eval mode.
        world: Precision.
        limit_mib: Memory the features may take [MiB].
        progress: Called with the number of images seen and in all.

    Raises:
        TaskError: An image cannot be read.
    """

    def __init__(
        self, album: Album, eyes: Eyes, world: World, limit_mib: float = 2048, progress: Progress | None = None
    ) -> None:
        self.album, self.eyes, self.world = album, eyes, world
        size = next(eyes.parameters()).element_size()
        most = int(limit_mib * 2**20) // (eyes.num_features * eyes.width * size)
        parts = []
        for start in range(0, min(most, len(album)), _BATCH):
            rows = torch.arange(start, min(start + _BATCH, most, len(album)))
            parts.append(self._see(rows).cpu())
            if progress is not None:
                progress(start + len(rows), len(album))
        self.kept = torch.cat(parts) if parts else torch.empty(0, eyes.num_features, eyes.width)

    def of(self, questions: Sequence[Question]) -> dict[str, Tensor]:
        rows, indicator = self.album.places(questions)
        if not rows.numel():
            return {}
        features = self.features(rows).flatten(1, 2)
        return {"features": features, "indicator": indicator.to(features.device)}

    def features(self, rows: Tensor) -> Tensor:
        """Returns the features of rows `[...]` of the album: `[..., n, d_image]`."""
        if int(rows.max()) < len(self.kept):
            return self.kept[rows].to(self.album.like.device)
        # each image once, however many questions are about it
        unique, where = rows.unique(return_inverse=True)
        known = unique < len(self.kept)
        found = torch.cat([self.kept[unique[known]].to(self.album.like.device), self._see(unique[~known])])
        return found[where.to(found.device)]

    @torch.no_grad()
    def _see(self, rows: Tensor) -> Tensor:
        with eval_mode(self.eyes), self.world.autocast():
            return self.eyes(self.album.read(rows))
