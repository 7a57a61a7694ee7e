"""The class token of an image as an input token of a decoder."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import PluginError


class ClassToken(nn.Module):
    """A trained linear map from the class token of an image to one embedding in front of a decoder's text.

    Source: Hao et al., 2024, "ADEM-VL: Adaptive and Embedded Fusion for Efficient Vision-Language Tuning", arXiv
    2410.17779.
    Parameters: (d_image + 1) * d.

    Args:
        language_model: What reads the token; stays as it is.
        d_image: Width of an image feature.
        generator: Draws the initial values.

    Raises:
        PluginError: The language model has an encoder, where text is not what the answer follows.
    """

    def __init__(self, language_model: Any, d_image: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if language_model.config.is_encoder_decoder:
            raise PluginError(
                f"a class token stands in front of a decoder's text, and {type(language_model).__name__} has an "
                "encoder: leave class_token out"
            )
        d = language_model.get_input_embeddings().embedding_dim
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(d, d_image), generator=generator))
        self.bias = nn.Parameter(torch.zeros(d))

    def forward(self, features: Tensor) -> Tensor:
        """Returns embeddings `[B, I, d]` of class tokens `[B, I, d_image]`, in the map's dtype."""
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features.to(self.weight), self.weight, self.bias)


def split_features(features: Tensor, num_images: int) -> tuple[Tensor, Tensor]:
    """Returns class tokens `[B, I, d_image]` and patches `[B, n, d_image]` of images side by side, each token first.

    Raises:
        PluginError: The images do not have equally many features.
    """
    if features.shape[1] % num_images:
        raise PluginError(
            f"{features.shape[1]} features are not those of {num_images} images: each image has its class token first, "
            "then as many patches as the others"
        )
    images = features.unflatten(1, (num_images, -1))
    return images[:, :, 0], images[:, :, 1:].flatten(1, 2)
