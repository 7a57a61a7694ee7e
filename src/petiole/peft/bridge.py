"""petiole's methods as tuners of Hugging Face PEFT. Importing this module registers them with PEFT.

The host keeps its own forward, outputs and head. Each of its blocks is wrapped in a layer that runs the view's step of
that block in place of the block's own forward, so that a plugin meets exactly the sites it meets in `petiole.adapt`:

PeftModel ── tuner ──┬── host: embedding ── layer(block 0) ── layer(block 1) ── ... ── norm ── head
                     └── plugins: {adapter name: one Plugin}, every tensor stored once
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, make_dataclass
from itertools import takewhile
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..backbones import view_of
from ..core.flow import Flow
from ..core.plugin import Delta, Plugin
from ..core.prove import eval_mode, prove_view
from ..core.taps import Step, Taps
from ..errors import MergeError, PluginError
from ..plugins import METHODS, method, settings_of

try:
    import peft
    from peft import PeftConfig, PeftType
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
    from peft.utils import register_peft_method
except ImportError as error:
    raise PluginError(f"the bridge needs peft 0.21 ({error}): pip install 'petiole[peft]'") from error

# What PEFT calls a setting: its own code reads `bias` of every config, as a word and not as a truth value.
_RENAMED = {"bias": "has_bias"}


@dataclass
class PluginConfig(PeftConfig):
    """Settings of a petiole plugin as a config of PEFT; `FacTConfig` and others add the plugin's own."""

    method: ClassVar[str]
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Host modules to train too."})
    target_modules: str | None = field(default=None, metadata={"help": "Host's blocks, set by the tuner."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(self.method.upper())
        self.plugin()

    def plugin(self) -> Plugin:
        """Returns a fresh plugin with these settings."""
        settings = {name: getattr(self, _RENAMED.get(name, name)) for name in settings_of(self.method)}
        return method(self.method, **settings)


class HostWalk(Taps):
    """A host's blocks as steps of its view, caught before the blocks are wrapped; calls out to the active adapters.

    Raises:
        BackboneError: No view walks the host.
        ProofError: The walk does not equal the host's own forward.
        PluginError: The host gives its blocks more than tokens.
    """

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.view = view_of(host)
        prove_view(self.view, host)
        self.adapters = nn.ModuleDict()
        self.steps: dict[str, Step] = {}
        self.num_prefix, self.has_class, self.grid = 0, False, (0, 0)
        # the patch convolution: what it gives says the grid, also for images of another size
        self.convolution = next(module for module in host.modules() if isinstance(module, nn.Conv2d))
        hook = self.convolution.register_forward_hook(self.see)
        try:
            with eval_mode(host), torch.no_grad():
                self.view.run(host, self.view.probe(host), self)
                sites = [site for site in self.view.sites(host) if site.kind in ("linear", "affine", "branch")]
                self.sites = [site for site in sites if site.name.startswith(tuple(f"{n}." for n in self.steps))]
                self.blocks = {self.path(name): name for name in self.steps}
                self.check(host)
        finally:
            hook.remove()

    def block(self, name: str, x: Tensor, flow: Flow, run: Step) -> tuple[Tensor, Flow]:
        """Keeps a block's step instead of running it."""
        self.steps[name], self.num_prefix, self.has_class = run, flow.num_prefix, flow.has_class
        if self.flow(x) != flow:
            raise PluginError(f"the grid at {name} is {flow.grid}, the host's first convolution gives {self.grid}")
        return x, flow

    def path(self, name: str) -> str:
        """Returns the module name of a block in the host: what the names of its tensors have in common."""
        slots = (site.weight for site in self.sites if site.name.startswith(f"{name}."))
        columns = zip(*(slot.name.split(".") for slot in slots if slot is not None), strict=False)
        return ".".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))

    def check(self, host: nn.Module) -> None:
        """Looks whether the host calls each block with its tokens alone, for one tensor."""
        called: list[bool] = []

        def look(block: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            called.append(sum(isinstance(value, Tensor) for value in (*args, *kwargs.values(), output)) == 2)

        hooks = [host.get_submodule(path).register_forward_hook(look, with_kwargs=True) for path in self.blocks]
        self.view.answer(host, self.view.probe(host))
        for hook in hooks:
            hook.remove()
        if not all(called) or len(called) != len(hooks):
            raise PluginError(
                f"{type(host).__name__} gives its blocks more than tokens, e.g. rotary positions, which a layer of "
                "PEFT cannot follow: use petiole.adapt"
            )

    def see(self, convolution: nn.Module, images: Any, output: Tensor) -> None:
        """Reads the patch grid of this forward pass."""
        self.grid = (output.shape[-2], output.shape[-1])

    def flow(self, x: Tensor) -> Flow:
        """Returns the facts about tokens `[B, N, d]`, or a map `[B, H, W, d]`; no grid where patches were dropped."""
        grid = self.grid if x.ndim == 3 else (x.shape[1], x.shape[2])
        is_whole = self.num_prefix + grid[0] * grid[1] == x.shape[1:-1].numel()
        return Flow(self.num_prefix, grid if is_whole else None, has_class=self.has_class)

    def step(self, name: str, x: Tensor, adapters: list[str], is_checkpointed: bool) -> Tensor:
        """Returns what a block gives with the plugins of some adapters."""
        plugins = tuple(self.adapters[adapter] for adapter in adapters)
        if plugins != self.plugins:
            Taps.__init__(self, plugins)  # type: ignore[arg-type]
        run, flow = self.steps[name], self.flow(x)
        return (checkpoint(run, x, flow, use_reentrant=False) if is_checkpointed else run(x, flow))[0]


class BlockLayer(nn.Module, BaseTunerLayer):
    """A host's block, walked by its view with the active adapters; the block's own forward where there are none.

    Holds no tensors but the block's, as the plugins belong to the tuner; other attributes are the block's own.
    """

    adapter_layer_names = ("adapters",)

    def __init__(self, block: nn.Module, path: str, walk: HostWalk) -> None:
        super().__init__()
        self.base_layer, self.path, self.walk = block, path, walk
        self.merged_adapters: list[str] = []
        self.kept: dict[str, Tensor] = {}

    @property
    def adapters(self) -> nn.ModuleDict:
        """The plugins by adapter name, shared by all layers of the host."""
        return self.walk.adapters

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the residual stream after the block `[B, ..., d]`."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.adapters]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        if any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
            raise PluginError(f"the host gave {self.path} more than tokens, e.g. a mask: use petiole.adapt")
        is_checkpointed = self.training and getattr(self.base_layer, "gradient_checkpointing", False)
        return self.walk.step(self.walk.blocks[self.path], x, active, is_checkpointed)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Folds adapters into the block's weights, of which `unmerge` gives back the originals, bit for bit."""
        block = f"{self.walk.blocks[self.path]}."
        for adapter in check_adapters_to_merge(self, adapter_names):
            plugin = self.adapters[adapter]
            assert isinstance(plugin, Delta)
            for site in (site for site in plugin.sites if site.name.startswith(block)):
                assert site.weight is not None
                name, rows = site.weight.name.removeprefix(f"{self.path}."), slice(site.weight.start, site.weight.stop)
                weight = self.base_layer.get_parameter(name)
                frozen = self.kept.setdefault(name, weight.clone())[rows]
                change, _ = plugin.change(site, frozen, None)
                if safe_merge and not change.isfinite().all():
                    raise MergeError(f"the change of the adapter {adapter!r} at {site.name} is not finite")
                weight[rows] = weight[rows] + change
            self.merged_adapters.append(adapter)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the block's original weights back."""
        for name, tensor in self.kept.items():
            self.base_layer.get_parameter(name).copy_(tensor)
        self.kept.clear()
        self.merged_adapters.clear()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


class PluginModel(BaseTuner):
    """Tuner of PEFT that puts one plugin per adapter into a host; a subclass per method names its `prefix`."""

    uses_shared_state = True
    tuner_layer_cls = BlockLayer

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self.walk = HostWalk(model)
        self.register_module(f"{self.prefix}plugins", self.walk.adapters)

    def _post_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self.hook = self.walk.convolution.register_forward_hook(self.walk.see)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        peft_config.target_modules = "|".join(re.escape(path) for path in self.walk.blocks)
        return peft_config

    def _create_and_replace(
        self, config: Any, adapter_name: str, target: Any, target_name: str, parent: Any, current_key: str, *_: Any
    ) -> None:
        if adapter_name not in self.walk.adapters:
            plugin, like = config.plugin(), next(self.model.parameters())
            plugin.attach(self.walk.sites)
            if any(adapter_name in key.split(".") for key in (*plugin.state_dict(), *self.model.state_dict())):
                raise PluginError(f"an adapter cannot be called {adapter_name!r}: PEFT would lose tensors of that name")
            if not any(p.is_meta for p in plugin.parameters()):
                plugin.to(like.device, like.dtype)
            self.walk.adapters[adapter_name] = plugin.train(self.model.training)
        if not isinstance(target, BlockLayer):
            setattr(parent, target_name, BlockLayer(target, current_key, self.walk).train(target.training))

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        for plugin in self.walk.adapters.values():
            if not isinstance(plugin, Delta):
                raise MergeError(f"{type(plugin).__name__} cannot be merged: it is no linear change of weights")

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        host = super()._unload_and_optionally_merge(*args, **kwargs)
        self.hook.remove()
        return host

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise PluginError("adapter_names chooses adapters by row, which PEFT has for LoRA only: call set_adapter")
        yield

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT looks for the name at the end of a key only: a plugin's tensors lie deeper
        return key.replace(f"{cls.prefix}plugins.{adapter_name}.", f"{cls.prefix}plugins.", 1)


def _tuner(name: str) -> tuple[Any, Any]:
    """Returns config and tuner of a method in petiole's table, which PEFT knows from here on.

    Raises:
        PluginError: The installed PEFT has a method of that name already, or is built otherwise.
    """
    word, title = name.upper(), METHODS[name]
    # PEFT's methods are an enumeration, which has to grow first
    needs = ("_member_map_", "_member_names_", "_value2member_map_", "_remove_adapter_name_from_key")
    missing = [need for need in needs if not hasattr(PeftType, need) and not hasattr(BaseTuner, need)]
    if missing or word in PeftType.__members__:
        found = f"lacks {', '.join(missing)}" if missing else f"already has a method {word}"
        raise PluginError(
            f"{title} cannot be registered with peft {peft.__version__}, which {found}: the bridge was made for peft "
            "0.21; install that, or use petiole.adapt"
        )
    member = str.__new__(PeftType, word)
    member._name_ = member._value_ = word
    type.__setattr__(PeftType, word, member)
    PeftType._member_map_[word] = PeftType._value2member_map_[word] = member
    PeftType._member_names_.append(word)

    fields = [(_RENAMED.get(key, key), Any, field(default=value)) for key, value in settings_of(name).items()]
    doc = f"Settings of `petiole.{title}` under the same names, but `bias` as `has_bias`; see `PluginConfig`."
    own = {"__module__": __name__, "__doc__": doc, "method": name}
    config = make_dataclass(f"{title}Config", fields, bases=(PluginConfig,), namespace=own)
    own = {"__module__": __name__, "__doc__": f"`petiole.{title}` as a tuner of PEFT.", "prefix": f"{name}_"}
    model = type(f"{title}Model", (PluginModel,), own)
    register_peft_method(name=name, config_cls=config, model_cls=model)
    return config, model


FacTConfig, FacTModel = _tuner("fact")
ConvpassConfig, ConvpassModel = _tuner("convpass")
AdaptFormerConfig, AdaptFormerModel = _tuner("adaptformer")
