"""One tiny model per family and variant, with random weights that make every part show."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

WIDTH, HEADS, CLASSES = 32, 2, 5
PLAIN = {"embed_dim": WIDTH, "depth": 2, "num_heads": HEADS}
DROPS = {"proj_drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 0.3}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Returns the model in eval mode with seeded random weights: norms and LayerScale gains about 1, nothing zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            gains = ("gamma", "lambda1", "gamma_1", "gamma_2")
            if name.rsplit(".", 1)[-1] in gains:
                p.fill_(1.0)
            elif p.ndim == 1 and name.endswith("weight"):
                p.copy_(1 + 0.1 * noise)
            elif p.ndim >= 2 and not name.endswith(("token", "tokens", "table", "embed", "embeddings", "embedding")):
                p.copy_(noise * p[0].numel() ** -0.5)
            else:
                p.copy_(0.2 * noise)
    return model.eval()


def _timm(name: str, fused: bool = True, gated: bool = False, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        model = timm.create_model(name, **{"num_classes": CLASSES, **settings})
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
            if gated and hasattr(module, "gate"):
                module.gate = nn.Linear(WIDTH, WIDTH)
        return randomised(model)

    return make


def _vit(name: str = "vit_tiny_patch16_224", **settings: Any) -> Callable[[], nn.Module]:
    return _timm(name, **{**PLAIN, "img_size": 32, "patch_size": 8, **settings})


def _swin(**settings: Any) -> Callable[[], nn.Module]:
    stages = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "img_size": 32, "patch_size": 4}
    return _timm("swin_tiny_patch4_window7_224", **{**stages, "window_size": 4, **settings})


def _hf(cls: str, config: str, kernel: str = "sdpa", **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        plain = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "image_size": 32}
        made = getattr(transformers, config)(**{**plain, "patch_size": 8, "num_labels": CLASSES, **settings})
        return randomised(getattr(transformers, cls)._from_config(made, attn_implementation=kernel))

    return make


def _hf_vit(cls: str, **settings: Any) -> Callable[[], nn.Module]:
    return _hf(cls, "ViTConfig", intermediate_size=64, pooler_output_size=24, **settings)


def _hf_clip(cls: str, **settings: Any) -> Callable[[], nn.Module]:
    return _hf(cls, "CLIPVisionConfig", intermediate_size=64, projection_dim=24, **settings)


def _hf_clip_classifier() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    vision = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, num_labels=CLASSES)
    return randomised(transformers.CLIPForImageClassification(config))


def _hf_siglip(cls: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        vision = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": HEADS}
        vision |= {"image_size": 32, "patch_size": 8, **settings}
        config = transformers.SiglipVisionConfig(**vision)
        if cls == "SiglipForImageClassification":
            text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
            text |= {"bos_token_id": 0, "eos_token_id": 1}
            config = transformers.SiglipConfig(text_config=text, vision_config=vision, num_labels=CLASSES)
        return randomised(getattr(transformers, cls)(config))

    return make


def _torchvision(**settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from torchvision.models import VisionTransformer

        sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": HEADS, "hidden_dim": WIDTH}
        return randomised(VisionTransformer(**{**sizes, "mlp_dim": 64, "num_classes": CLASSES, **settings}))

    return make


def _open_clip(**settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformer = pytest.importorskip("open_clip.transformer")
        sizes = {"image_size": 32, "patch_size": 8, "width": WIDTH, "layers": 2, "heads": HEADS, "mlp_ratio": 2.0}
        return randomised(transformer.VisionTransformer(**{**sizes, "output_dim": 24, **settings}))

    return make


_BEIT = "beit_base_patch16_224"
_EVA02 = "eva02_tiny_patch14_224"

MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": _vit(**DROPS),
    "vit_unfused": _vit(fused=False, **DROPS),
    "vit_avg_pool": _vit(global_pool="avg"),
    "vit_dynamic": _vit(dynamic_img_size=True),
    "vit_non_square": _vit(img_size=(24, 40)),
    "vit_patch_drop": _vit(patch_drop_rate=0.5),
    "vit_qk_norm": _vit(qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True),
    "vit_no_classifier": _vit(num_classes=0),
    "vit_gated": _vit(gated=True),
    "vit_no_bias": _vit(qkv_bias=False, proj_bias=False),
    "deit": _vit("deit_tiny_patch16_224"),
    "deit_distilled": _vit("deit_tiny_distilled_patch16_224"),
    "deit3": _vit("deit3_small_patch16_224", **DROPS),
    "dinov2_registers": _vit("vit_small_patch14_reg4_dinov2", mlp_ratio=2.0),
    "dinov2_swiglu": _vit("vit_giant_patch14_dinov2", mlp_ratio=2.0),
    "siglip": _vit("vit_base_patch16_siglip_224"),
    "clip": _vit("vit_base_patch16_clip_224"),
    "beit": _vit(_BEIT, **DROPS),
    "beit_unfused": _vit(_BEIT, fused=False, **DROPS),
    "beit_shared": _vit(_BEIT, use_rel_pos_bias=True, use_shared_rel_pos_bias=True, use_abs_pos_emb=True),
    "eva": _vit("eva_giant_patch14_224", mlp_ratio=2.0, **DROPS),
    "eva02": _vit(_EVA02, **DROPS),
    "eva02_base": _vit("eva02_base_patch14_224", mlp_ratio=2.0),
    "eva02_clip_unfused": _vit("eva02_base_patch16_clip_224", fused=False, mlp_ratio=2.0),
    "eva02_post_norm": _vit("eva02_enormous_patch14_clip_224", mlp_ratio=2.0, **DROPS),
    "eva_dynamic": _vit(_EVA02, dynamic_img_size=True, patch_drop_rate=0.5),
    "eva_mixed_rope": _vit("vit_small_patch16_rope_mixed_224"),
    "eva_gqa": _vit(_EVA02, attn_type="rope", qkv_fused=False, num_kv_heads=1),
    "dinov3": _vit("vit_small_patch16_dinov3", **DROPS),
    "swin": _swin(**DROPS),
    "swin_unfused": _swin(fused=False, **DROPS),
    "swin_padded": _swin(img_size=(40, 24), always_partition=True),
    "swin_dynamic": _swin(dynamic_img_size=True),
    "hf_vit": _hf_vit("ViTForImageClassification", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1),
    "hf_vit_eager": _hf_vit("ViTForImageClassification", kernel="eager"),
    "hf_vit_bare": _hf_vit("ViTModel", image_size=(24, 40)),
    "hf_dinov2": _hf("Dinov2ForImageClassification", "Dinov2Config", mlp_ratio=2, drop_path_rate=0.3),
    "hf_dinov2_bare": _hf("Dinov2Model", "Dinov2Config", mlp_ratio=2, use_swiglu_ffn=True),
    "hf_dinov2_registers": _hf(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", mlp_ratio=2, hidden_dropout_prob=0.1
    ),
    "hf_clip": _hf_clip("CLIPVisionModel", attention_dropout=0.1),
    "hf_clip_projection": _hf_clip("CLIPVisionModelWithProjection"),
    "hf_clip_classifier": _hf_clip_classifier,
    "hf_siglip": _hf_siglip("SiglipVisionModel", attention_dropout=0.1),
    "hf_siglip_classifier": _hf_siglip("SiglipForImageClassification"),
    "torchvision": _torchvision(dropout=0.1, attention_dropout=0.1),
    "torchvision_representation": _torchvision(representation_size=24),
    "open_clip": _open_clip(ls_init_value=1.0, patch_dropout=0.3),
    "open_clip_plain": _open_clip(ls_init_value=1.0),
    "open_clip_avg": _open_clip(pool_type="avg", final_ln_after_pool=True),
    "open_clip_attn_pool": _open_clip(attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2),
}
