"""The backbone that a file belongs to: built by its name, or compared with the one that is given."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..backbones import view_of
from ..core.fingerprint import fingerprint
from ..core.view import View
from ..errors import BackboneError, PetioleError, PluginFileError
from .container import one_line
from .description import class_name, dtype_name

# What a timm model's name or tag is made of: no slash, no scheme, so that a file cannot name another source.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_.\-]+)?")


def build_backbone(wanted: Mapping[str, Any], where: str, advice: str) -> nn.Module:
    """Returns the backbone a file names, with its pretrained weights.

    Args:
        wanted: What `describe_backbone` said of it.
        where: What messages call the file.
        advice: What to do where it cannot be built.

    Raises:
        PluginFileError: It cannot be built by its name.
    """
    name, tag = wanted["name"], wanted["tag"]
    full = f"{name}.{tag}" if tag and name != "micro" else name
    if not wanted["class"].startswith("timm.") or not _PLAIN_NAME.fullmatch(full):
        raise PluginFileError(f"{where} belongs to {full!r}, which cannot be built by its name: {advice}")
    # here, so that loading onto a given model needs neither timm nor the bundled weights
    from ..backbones.bundled import backbone

    try:
        return backbone(full).to(getattr(torch, wanted["dtype"], torch.float32))
    except (PetioleError, OSError, RuntimeError, ValueError, TypeError) as error:
        raise PluginFileError(f"{where} belongs to {full}: {one_line(error)}; or {advice}") from error


def match_backbone(wanted: Mapping[str, Any], backbone: nn.Module, where: str) -> View:
    """Returns the view of a backbone after comparing its fingerprint with the file's.

    Raises:
        PluginFileError: It is another backbone; says in what.
    """
    kind = class_name(backbone)
    try:
        view = view_of(backbone)
    except BackboneError as error:
        raise PluginFileError(f"{where} belongs to a {wanted['class']}, got a {kind}: {one_line(error)}") from error
    found = fingerprint(view.frozen_weights(backbone))
    if found == wanted["fingerprint"]:
        return view
    dtype = dtype_name(next(backbone.parameters()).dtype)
    if kind != wanted["class"]:
        why = "the class differs: build the file's backbone"
    elif (width := view.num_features(backbone)) != wanted["width"]:
        why = f"the width differs, {wanted['width']} in the file and {width} here: build the file's backbone"
    elif dtype != wanted["dtype"]:
        why = f"the dtype differs, {wanted['dtype']} in the file and {dtype} here: call .to(torch.{wanted['dtype']})"
    else:
        why = "class and dtype agree, the weights differ: load the same pretrained weights, not fine-tuned since"
    identity = view.identify(backbone)
    raise PluginFileError(
        f"{where} belongs to another backbone: the file's is {_title(wanted)} {wanted['class']} "
        f"{wanted['fingerprint'][:12]}, this one is {_title(identity)} {kind} {found[:12]}; {why}"
    )


def _title(identity: Mapping[str, Any]) -> str:
    return f"{identity['name']}.{identity['tag']}" if identity["tag"] else str(identity["name"])
