"""Proofs that a walk, a plugin and a merge do what they promise."""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ProofError
from .adapted import Adapted
from .flow import Flow
from .here import Here
from .plugin import Delta, Plugin
from .site import Site
from .taps import Taps, side_by_side, spread
from .twin import twin
from .view import View

# Draws after which what was dead in each is called dead: a ReLU of width 1 is dead for two images every second time.
NUM_DRAWS = 16
# Relative error a merge may show per dtype: rounding of the weights and of one forward pass, with room.
MERGE_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@torch.no_grad()
def prove_view(view: View, backbone: nn.Module) -> None:
    """Checks that the walk without plugins equals the model's own forward, bit for bit, in eval mode.

    Raises:
        ProofError: It does not; names the first part of the model where the walk departs from it.
    """
    model = twin(backbone).eval()
    images = view.probe(model)

    def walk() -> Tensor:
        return view.classify(model, *view.run(model, images, Taps()))

    if torch.equal(walk(), view.answer(model, images)):
        return
    expected, found = _trace(model, lambda: view.answer(model, images)), _trace(model, walk)
    for name, output in expected.items():
        if name not in found:
            fault = f"never calls {name}"
        elif found[name].shape != output.shape or not torch.equal(found[name], output):
            fault = f"first differs at the output of {name}"
        else:
            continue
        break
    else:
        fault = "differs after the last module, in how the answer is put together"
    raise ProofError(
        f"{type(view).__name__} does not walk this {type(backbone).__name__} as its own forward does: the walk {fault}."
        " The model is wired otherwise than the view expects: please report it with the library's version"
    )


def prove_attached(model: Adapted) -> None:
    """Checks by one tiny forward and backward that every plugin is alive at every one of its sites.

    Works on copies of the plugins with random tensors, so it also proves plugins that start as the identity. What is
    dead for one draw, as a narrow ReLU may be for two images, is tried with others: only what is dead for all is.

    Raises:
        ProofError: A site is never called, a plugin adds nothing there, what it adds does not reach the features, or
            a trained tensor gets no gradient; names the site or the tensor.
    """
    generator = torch.Generator().manual_seed(1)
    faults = _faults(model, generator)
    for _ in range(NUM_DRAWS - 1):
        if faults:
            others = _faults(model, generator)
            faults = {name: fault for name, fault in faults.items() if name in others}
    for fault in faults.values():
        raise ProofError(fault)


def _faults(model: Adapted, generator: torch.Generator) -> dict[str, str]:
    """Returns what is dead for one random draw of the plugins' tensors: site or tensor, and in which way."""
    view, faults = model.view, dict[str, str]()
    plugins = [plugin.eval() for plugin in copy.deepcopy(model.taps.plugins)]
    with torch.no_grad():
        for p in itertools.chain.from_iterable(plugin.parameters() for plugin in plugins):
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))
    taps = _Probes(plugins)
    with eval_mode(model.backbone), torch.enable_grad():
        tokens, flow = view.run(model.backbone, view.probe(model.backbone), taps)
        features = view.pool(model.backbone, tokens, flow)
        reached = [(site, probe, dy) for plugin in taps.seen for site, probe, dy in taps.seen[plugin]]
        wanted = {f"plugins.{i}.{n}": p for i, plugin in enumerate(plugins) for n, p in plugin.named_parameters()}
        wanted |= {f"backbone.{n}": p for n, p in _below_head(model) if p.requires_grad}
        inputs = [*wanted.values(), *(probe for _, probe, _ in reached)]
        weights = torch.randn(features.shape, generator=generator).to(features)
        grads = torch.autograd.grad((features * weights).sum(), inputs, allow_unused=True) if inputs else ()
    for i, plugin in enumerate(plugins):
        called = {site.name for site, _, _ in taps.seen.get(i, ())}
        for name in (site.name for site in plugin.sites if site.kind not in ("tokens", "input")):
            if name not in called:
                faults[name] = f"{type(plugin).__name__} sits at {name}, but the walk never calls that site"
    for (site, _, dy), grad in zip(reached, grads[len(wanted) :], strict=True):
        if not dy.any():
            faults[site.name] = f"the plugin at {site.name} adds nothing there even with random tensors"
        elif grad is None or not grad.any():
            end = "does not reach the features: it would never train"
            faults[site.name] = f"what the plugin adds at {site.name} {end}"
    for name, grad in zip(wanted, grads, strict=False):
        if grad is None or not grad.any():
            faults[name] = f"the tensor {name} gets no gradient: it would never train"
    return faults


@torch.no_grad()
def prove_merged(model: Adapted, plain: nn.Module) -> None:
    """Checks that a merged model answers as the adapted one does.

    Raises:
        ProofError: The logits differ by more than rounding; names the site where `add` and `weight` disagree.
    """
    images = model.view.probe(plain)
    tolerance = MERGE_TOLERANCE[images.dtype]
    with eval_mode(model):
        expected, found = model(images), model.view.answer(plain, images)
        if expected.shape == found.shape and _error(found, expected) <= tolerance:
            return
        for plugin in model.taps.plugins:
            if not isinstance(plugin, Delta):
                continue
            for site in plugin.sites:
                if site.kind == "affine":
                    continue  # it sees an output, so there is no map to set the change against
                weight, bias = model.frozen(site)
                x = torch.randn(1, 8, site.d_in, generator=torch.Generator().manual_seed(0)).to(images)
                here = Here(Flow(0, None), None, (F.linear(x, weight, bias),), (weight,))
                if _error(F.linear(x, *plugin.change(site, weight, bias)), plugin.add(site, x, here)) > tolerance:
                    raise ProofError(f"{type(plugin).__name__}.change disagrees with .add at {site.name}")
    raise ProofError(
        f"the merged model's logits differ from the adapted model's by {_error(found, expected):.1e} relative, "
        f"more than {tolerance:.0e}, though every site agrees"
    )


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def _below_head(model: Adapted) -> Iterator[tuple[str, nn.Parameter]]:
    heads = tuple(f"{name}." for name in model.view.classifiers(model.backbone))
    return ((name, p) for name, p in model.backbone.named_parameters() if not name.startswith(heads))


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Puts a module into eval mode, and every part back into its own mode afterwards."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode


def _trace(model: nn.Module, forward: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Returns the first output of every leaf module, in the order of the calls."""
    outputs: dict[str, Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if not any(module.children()):
            hooks.append(module.register_forward_hook(_recorder(outputs, name)))
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def _recorder(outputs: dict[str, Tensor], name: str) -> Callable[[nn.Module, object, object], None]:
    def record(module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor):
            outputs.setdefault(name, output)

    return record


class _Probes(Taps):
    """Taps that add a zero leaf to every addition, to see whether its gradient comes back."""

    def __init__(self, plugins: Iterable[Plugin]) -> None:
        super().__init__(plugins)
        self.seen: dict[int, list[tuple[Site, Tensor, Tensor]]] = {}

    def ask(self, plugin: Plugin, sites: Sequence[Site], x: Tensor, here: Here) -> list[Tensor]:
        additions = side_by_side(super().ask(plugin, sites, x, here), sites)
        probes = [torch.zeros_like(dy, requires_grad=True) for dy in additions]
        rows = self.seen.setdefault(self.plugins.index(plugin), [])
        rows.extend(zip(sites, probes, additions, strict=True))
        return [dy + probe for dy, probe in zip(additions, probes, strict=True)]

    def onto(self, plugin: Plugin, sites: Sequence[Site], x: Tensor, y: Tensor, here: Here) -> Tensor:
        return y + spread(self.ask(plugin, sites, x, here), here.starts, y.shape[-1])
