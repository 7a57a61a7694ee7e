"""torchvision's VisionTransformer."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.flow import Flow
from ..core.taps import Taps
from ._mha import MhaView
from ._parts import IMAGENET, need, plain_linear, put
from ._plain import Wiring

# width -> letter in the names of torchvision's builders
LETTERS = {768: "b", 1024: "l", 1280: "h"}


class TorchvisionViT(MhaView):
    """Walks torchvision's `VisionTransformer`; `heads` ends in the classifier, or is none at all."""

    wiring = Wiring(
        blocks="encoder.layers",
        norm1="ln_1",
        attn="self_attention",
        proj="out_proj",
        after1=("dropout",),
        norm2="ln_2",
        fc1="mlp.0",
        act=("mlp.1", "mlp.2"),
        fc2="mlp.3",
        after2=("mlp.4",),
        patches="conv_proj",
        norm="encoder.ln",
    )

    def check(self, model: Any) -> None:
        super().check(model)
        if not isinstance(model.heads, nn.Identity):
            need(model, self.classifiers(model)[0], nn.Linear)

    def run(self, model: Any, images: Tensor, taps: Taps) -> tuple[Tensor, Flow]:
        side = model.image_size // model.patch_size
        flow = Flow(1, (side, side), has_class=True)
        x = taps.affine("patch_embed", model._process_input(images), flow)
        x = torch.cat([model.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = model.encoder.dropout(x + model.encoder.pos_embedding)
        x, flow = self.run_blocks(model, x, taps, flow)
        return taps.affine("norm", model.encoder.ln(x), flow), flow

    def pool(self, model: Any, tokens: Tensor, flow: Flow) -> Tensor:
        x = tokens[:, 0]
        for layer in list(model.heads.children())[:-1]:
            x = layer(x)
        return x

    def classify(self, model: Any, tokens: Tensor, flow: Flow) -> Tensor:
        return model.heads(tokens[:, 0])

    def num_features(self, model: Any) -> int:
        names = self.classifiers(model)
        return model.get_submodule(names[0]).in_features if names else model.hidden_dim

    def classifiers(self, model: Any) -> Sequence[str]:
        if isinstance(model.heads, nn.Identity):
            return []
        return [".".join(["heads", *[name for name, _ in model.heads.named_children()][-1:]])]

    def set_head(self, model: Any, head: nn.Linear) -> None:
        names = self.classifiers(model)
        if names:
            put(model, names[0], plain_linear(head))
        else:
            model.heads = nn.Sequential(OrderedDict(head=plain_linear(head)))
        model.num_classes = head.out_features

    def input_config(self, model: Any) -> dict[str, Any]:
        size = (3, model.image_size, model.image_size)
        return {"input_size": size, "interpolation": "bilinear", **IMAGENET, "crop_pct": 0.875, "crop_mode": "center"}

    def identify(self, model: Any) -> dict[str, str]:
        letter = LETTERS.get(model.hidden_dim)
        return {"name": f"vit_{letter}_{model.patch_size}", "tag": ""} if letter else super().identify(model)
