"""Backbones by name: the one that ships inside the package, and timm's."""

from importlib import resources
from typing import Any

from torch import nn

from ..errors import BackboneError

_MICRO = {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3}


def backbone(name: str, *, pretrained: bool = True) -> nn.Module:
    """Returns a backbone in eval mode: `micro`, or any model of timm.

    `micro` is a small ViT for 64x64 images that this project trained and ships (`petiole/assets/micro.md` says how);
    it needs no network. Every other name goes to timm, which may download weights.

    Args:
        name: `micro`, or a timm name with its tag, e.g. `vit_base_patch16_224.augreg_in21k`.
        pretrained: Whether to load the pretrained weights; otherwise they are random.

    Raises:
        BackboneError: timm does not know the name, or the weights cannot be fetched.

    Example:
        >>> import petiole as pt
        >>> vit = pt.backbone("micro")
    """
    return micro(pretrained=pretrained) if name == "micro" else _from_timm(name, pretrained)


def micro(*, pretrained: bool = True) -> nn.Module:
    """Returns the bundled ViT: 64x64 input, 8x8 patches, width 192, 6 blocks, no classifier."""
    from safetensors.torch import load
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(**_MICRO, num_classes=0)
    model.pretrained_cfg = model.default_cfg = {
        "architecture": "micro", "tag": "v1", "input_size": (3, 64, 64), "interpolation": "bicubic", "crop_pct": 1.0,
        "crop_mode": "squash", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "num_classes": 0, "classifier": "head",
        "first_conv": "patch_embed.proj", "license": "apache-2.0",
    }  # fmt: skip
    if pretrained:
        weights = load((resources.files("petiole") / "assets" / "micro.safetensors").read_bytes())
        model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model.eval()


def compensator() -> str:
    """Returns the file of the compensator that this project distilled for `micro`; `petiole/assets/` says how."""
    return str(resources.files("petiole") / "assets" / "micro_tocom.safetensors")


def _from_timm(name: str, pretrained: bool) -> nn.Module:
    import timm

    if not timm.is_model(name.removeprefix("timm/").split(".")[0]) and ":" not in name:
        near: list[Any] = timm.list_models(f"*{name.split('.')[0]}*")[:3]
        hint = f": did you mean {', '.join(near)}?" if near else ": `timm.list_models()` has the names"
        raise BackboneError(f"no backbone is called {name!r}{hint} The bundled one is `micro`.")
    try:
        return timm.create_model(name.removeprefix("timm/"), pretrained=pretrained).eval()
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BackboneError(f"{name} could not be built ({reason}): check the network, or use `micro`") from error
