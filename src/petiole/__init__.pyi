"""petiole joins small plugins to one large pretrained model."""

from .backbones.bundled import backbone as backbone
from .core.adapted import Adapted as Adapted
from .errors import BackboneError as BackboneError
from .errors import DivergedError as DivergedError
from .errors import FitError as FitError
from .errors import MergeError as MergeError
from .errors import PetioleError as PetioleError
from .errors import PluginError as PluginError
from .errors import PluginFileError as PluginFileError
from .errors import ProofError as ProofError
from .errors import TaskError as TaskError
from .files import PluginInfo as PluginInfo
from .files import inspect as inspect
from .files import load as load
from .files import save as save
from .files.hub import pull as pull
from .files.hub import push as push
from .joining import adapt as adapt
from .joining import combine as combine
from .joining import merge as merge
from .joining import only as only
from .joining import quantise as quantise
from .plugins.adapter import Adapter as Adapter
from .plugins.adaptformer import AdaptFormer as AdaptFormer
from .plugins.bitfit import BitFit as BitFit
from .plugins.convpass import Convpass as Convpass
from .plugins.fact import FacT as FacT
from .plugins.full import Full as Full
from .plugins.layernorm import LayerNorm as LayerNorm
from .plugins.linear import Linear as Linear
from .plugins.lora import LoRA as LoRA
from .plugins.repadapter import RepAdapter as RepAdapter
from .plugins.ssf import SSF as SSF
from .plugins.vpt import VPT as VPT
from .tasks import Task as Task
from .tasks import Transform as Transform
from .tasks import open_task as open_task
from .train.evaluate import predict as predict
from .train.loop import FitResult as FitResult
from .train.loop import fit as fit
from .train.published import recipe as recipe
from .train.recipe import Recipe as Recipe
from .train.searching import SearchResult as SearchResult
from .train.searching import search as search

__version__: str
