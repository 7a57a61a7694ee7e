"""Training images that look different each time."""

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .cache import Progress, num_threads, unreadable
from .images import to_rgb
from .task import Split
from .transform import Transform


class Augmented:
    """The images of a split, augmented anew at every step, and their labels, on the CPU.

    Source: few-shot FGVC of Zhang et al., 2022, "Neural Prompt Search", arXiv 2206.04673, which Convpass and FacT
    follow: random resized crop, horizontal flip, RandAugment (magnitude 9 +- 0.5, two of 15 operations), colour jitter
    0.4; by timm. What an image looks like follows from seed, step and its number alone, whatever batch or process it
    is in. Decoded images are kept, as many as fit into the limit; the others are decoded each time.

    Differs from the paper: its code leaves colour jitter out beside RandAugment, as timm does unless told otherwise;
    here it is done, as the text says. No random erasing, mixup or cutmix.

    Args:
        split: Images and labels.
        transform: Size, interpolation and values of the input; its crop is not used.
        seed: Seed of the augmentation.
        limit_mib: Memory the decoded images may take [MiB].
        progress: Called with the number of images read and in all.

    Raises:
        TaskError: An image cannot be decoded; names it and gives the reason. `batch` raises it for images beyond the
            limit.
    """

    def __init__(
        self,
        split: Split,
        transform: Transform,
        seed: int,
        limit_mib: float = 2048,
        progress: Progress | None = None,
    ) -> None:
        from timm.data.transforms_factory import transforms_imagenet_train

        self.split, self.transform, self.seed = split, transform, seed
        self.labels = torch.from_numpy(split.labels)
        config = transform.config
        self._augment = transforms_imagenet_train(
            tuple(transform.input_size[1:]), color_jitter=0.4, force_color_jitter=True,
            auto_augment="rand-m9-mstd0.5-inc1", interpolation=config["interpolation"], mean=tuple(config["mean"]),
            use_prefetcher=True,
        )  # fmt: skip
        self._kept: list[Image.Image] = []
        self._keep(limit_mib * 2**20, progress)

    def __len__(self) -> int:
        return len(self.split)

    def batch(self, indices: Sequence[int], step: int) -> tuple[Tensor, Tensor]:
        """Returns pixels, uint8 `[B, 3, H, W]`, and labels, int64 `[B]`, of these images as they look at a step."""
        with ThreadPoolExecutor(num_threads()) as pool:
            images = list(pool.map(self._image, indices))
        # timm draws from the generators of Python and NumPy, torchvision from PyTorch's: all are left as they were
        states = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(devices=[]):
            try:
                pixels = [self._draw(image, i, step) for image, i in zip(images, indices, strict=True)]
            finally:
                random.setstate(states[0])
                np.random.set_state(states[1])
        return torch.stack(pixels), self.labels[list(indices)]

    def _draw(self, image: Image.Image, index: int, step: int) -> Tensor:
        # 1: another stream than that of dropout, which is seeded by seed, step and process
        seeds = np.random.SeedSequence((self.seed, step, index, 1)).generate_state(3)
        random.seed(int(seeds[0]))
        np.random.seed(seeds[1])
        torch.default_generator.manual_seed(int(seeds[2]))
        return self._augment(image)

    def _image(self, index: int) -> Image.Image:
        return self._kept[index] if index < len(self._kept) else self._read(index)

    def _read(self, index: int) -> Image.Image:
        try:
            return to_rgb(self.split.images[index])
        except Exception as error:  # decoders raise almost anything on damaged data
            raise unreadable(self.split, index, error) from error

    def _keep(self, limit: float, progress: Progress | None) -> None:
        """Decodes images in order until they no longer fit."""
        pool = ThreadPoolExecutor(num_threads())
        try:
            for image in pool.map(self._read, range(len(self))):
                limit -= 3 * image.width * image.height
                if limit < 0:
                    break
                self._kept.append(image)
                if progress is not None:
                    progress(len(self._kept), len(self))
        finally:
            pool.shutdown(cancel_futures=True)
