"""A learner's file: everything that can be kept goes on bit for bit, and what does not fit is refused."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import petiole as pt
from fitting import make_split, vit
from petiole.continual.closed_form import NCM, SLDA, RandomRidge, Ridge
from petiole.continual.confit.baselines import EWC, LwF
from petiole.continual.confit.baselines import FineTune as FineTuneNetwork
from petiole.continual.confit.learner import ConFiT
from petiole.continual.exemplars import ClassBalanced, Herding, Reservoir, Ring
from petiole.continual.features import Extractor
from petiole.continual.heads import Head, HeadLearner
from petiole.continual.learner import Learner, run
from petiole.continual.online.augment import CropColour, ShiftFlip
from petiole.continual.online.baselines import GDumb, a_gem, dark_experience, er, mir
from petiole.continual.online.learner import OnlineLearner
from petiole.continual.online.objectives import CrossEntropy, ProxyNCA
from petiole.continual.online.pairs import Hybrid, MultiSimilarity, SupCon
from petiole.continual.online.rehearsal import Joint as JointRehearsal
from petiole.continual.parts import PARTS, Supply, describe, make
from petiole.continual.per_task import PluginPerTask
from petiole.continual.replay import ER, ERACE, DERpp
from petiole.continual.saving import inspect_learner, leaves, load_learner, save_learner
from petiole.continual.streams import Stream, class_incremental
from petiole.continual.taer import TAER
from petiole.continual.trained import FineTune, Joint
from petiole.core.fingerprint import digest
from petiole.files.container import read, write
from petiole.tasks import Transform
from petiole.tasks.cache import Pixels

CLASSES = [f"class {i}" for i in range(6)]
SIZE = (3, 8, 8)
NORMALIZE = Transform({"input_size": SIZE}).normalize


def network() -> nn.Module:
    """A network with a batch norm behind a convolution, with the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = (nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return nn.Sequential(*layers)


def small_vit() -> VisionTransformer:
    """A backbone for images as small as the network's, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=0)
    model.default_cfg = model.pretrained_cfg = {**vit().default_cfg, "input_size": SIZE}
    return model.eval()


def head(make_head: Callable[[], Head]) -> Callable[[], Learner]:
    return lambda: HeadLearner(make_head())


def online(*args: Any, **settings: Any) -> OnlineLearner:
    return OnlineLearner(network(), *args, lr=0.05, replay=4, normalize=NORMALIZE, **settings)


SHORT: dict[str, Any] = {"epochs": 2, "batch_size": 4}
TUNED: dict[str, Any] = {"lr": 0.05, "prepare": NORMALIZE, "input_size": SIZE}
ON_FEATURES: dict[str, Callable[[], Learner]] = {
    "ncm": head(lambda: NCM(metric="euclidean")),
    "slda": head(SLDA),
    "ridge": head(Ridge),
    "random ridge": head(lambda: RandomRidge(num_projections=20, seed=3)),
    "fine-tune": head(lambda: FineTune(**SHORT)),
    "joint": head(lambda: Joint(**SHORT)),
    "er": head(lambda: ER(Reservoir(7), is_rebalanced=True, **SHORT)),
    "er-ace": head(lambda: ERACE(Ring(per_class=2), **SHORT)),
    "der++": head(lambda: DERpp(ClassBalanced(7), **SHORT)),
    "taer": head(lambda: TAER(Herding(per_class=2), seed=5, **SHORT)),
}
ON_IMAGES: dict[str, Callable[[], Learner]] = {
    "generative": lambda: online(Hybrid(), Reservoir(9), augment=ShiftFlip(shift=1), views=2),
    "er": lambda: er(network(), ClassBalanced(9), replay=4, normalize=NORMALIZE),
    "supcon": lambda: online(SupCon(projection=4), Ring(9), augment=CropColour(), views=2),
    "multi-similarity": lambda: online(MultiSimilarity(), Reservoir(9)),
    "momentum": lambda: online(
        ProxyNCA(),
        Reservoir(9),
        optimizer=functools.partial(torch.optim.SGD, momentum=0.9),
        rehearsal=JointRehearsal(),
    ),
    "adam": lambda: online(CrossEntropy(negatives="incoming"), Reservoir(9), optimizer=torch.optim.AdamW),
    "a-gem": lambda: a_gem(network(), Reservoir(9), replay=4, normalize=NORMALIZE),
    "mir": lambda: mir(network(), Reservoir(9), replay=4, candidates=6, normalize=NORMALIZE),
    "der++": lambda: dark_experience(network(), Reservoir(9), num_classes=6, replay=4, normalize=NORMALIZE),
    "gdumb": lambda: GDumb(network(), ClassBalanced(9), epochs=1, batch_size=4, normalize=NORMALIZE),
    "confit": lambda: ConFiT(network(), **TUNED),
    "fine-tune": lambda: FineTuneNetwork(network(), **TUNED),
    "lwf": lambda: LwF(network(), **TUNED),
    "ewc": lambda: EWC(network(), num_samples=8, **TUNED),
    "plugin per task": lambda: PluginPerTask(small_vit(), method="lora", settings={"rank": 2, "dropout": 0.5}),
}
TABLE = [
    *(pytest.param(make_one, False, id=f"head {name}") for name, make_one in ON_FEATURES.items()),
    *(pytest.param(make_one, True, id=f"network {name}") for name, make_one in ON_IMAGES.items()),
]


@functools.cache
def stream(has_images: bool) -> Stream:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % 6
    if has_images:
        x = torch.randint(0, 256, (48, *SIZE), dtype=torch.uint8, generator=generator)
    else:
        x = torch.randn(48, 5, generator=generator) + labels[:, None]
    return class_incremental((x, labels), (x, labels), num_experiences=2, batch_size=6)


def same(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two states agree bit for bit."""
    plain = [
        [(name, digest(leaf) if isinstance(leaf, Tensor) else json.dumps(leaf)) for name, leaf in leaves(state)]
        for state in (first, second)
    ]
    return plain[0] == plain[1]


# going on


@pytest.mark.parametrize("steps", [0, 4, 5, 7], ids=lambda n: f"after {n} events")
@pytest.mark.parametrize(("make_one", "has_images"), TABLE)
def test_learner_from_a_file_goes_on_bit_for_bit(
    make_one: Callable[[], Learner], has_images: bool, steps: int, tmp_path: Path
) -> None:
    way, path = stream(has_images), tmp_path / "learner.safetensors"
    known = {"is_task_known": has_images}
    whole = make_one()
    *_, expected = run(way, whole, **known)

    learner, matrix, start = make_one(), None, (0, 0)
    for _, event in zip(range(steps), run(way, learner, **known), strict=False):
        matrix = event.matrix or matrix
        start = (event.experience, event.step) if event.matrix is None else (event.experience + 1, 0)
    save_learner(learner, path, classes=CLASSES)
    again = load_learner(path, network=network(), backbone=small_vit())
    assert same(again.state(), learner.state())
    *_, found = run(way, again, matrix=matrix, start=start, **known)

    assert repr(found.matrix) == repr(expected.matrix)
    assert same(again.state(), whole.state())


def parts_of(words: Any) -> set[str]:
    """The names of all parts in a description."""
    if not isinstance(words, dict) or "part" not in words:
        return set()
    return {words["part"]}.union(*map(parts_of, words["settings"].values()))


def test_every_part_of_the_table_is_tested() -> None:
    learners = [make_one() for make_one in (*ON_FEATURES.values(), *ON_IMAGES.values())]
    tested = {part for learner in learners for part in parts_of(describe(learner)[0])}
    assert tested == set(PARTS)


@pytest.mark.parametrize(("make_one", "has_images"), TABLE)
def test_what_is_made_from_words_is_described_alike(make_one: Callable[[], Learner], has_images: bool) -> None:
    words, tensors = describe(make_one())
    again = make(json.loads(json.dumps(words)), Supply(tensors, small_vit(), {"network": network()}, "file"))
    assert describe(again)[0] == words


def test_equal_learners_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        learner = ON_FEATURES["taer"]()
        list(run(stream(False), learner))
        save_learner(learner, tmp_path / name, classes=CLASSES)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_order_of_what_waits_is_kept(tmp_path: Path) -> None:
    learner = HeadLearner(TAER(Reservoir(5), **SHORT))
    for i in range(12):
        learner.observe(torch.full((1, 2), float(i)), torch.tensor([i % 3]))
    save_learner(learner, tmp_path / "file", classes=CLASSES)
    waiting = load_learner(tmp_path / "file").state()["waiting"]
    assert [part["x"][0, 0].item() for part in waiting.values()] == list(range(12))


# behind a backbone

SPLIT = make_split(12, 0)


def pixels(model: pt.Adapted) -> Tensor:
    return Pixels(SPLIT, Transform(model.input_config)).batch(range(12))[0]


def behind(*plugins: Any, backbone: nn.Module | None = None, **settings: Any) -> HeadLearner:
    model = pt.adapt(backbone or vit(), *plugins, **settings)
    with torch.no_grad():
        for p in model.plugins.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    learner = HeadLearner(NCM(), extract=Extractor(model))
    learner.observe(pixels(model), torch.from_numpy(SPLIT.labels))
    return learner


@pytest.mark.parametrize(
    ("plugins", "settings"),
    [
        ((), {}),
        ((pt.FacT(rank=4),), {}),
        ((pt.LoRA(rank=2, bits=1),), {}),
        ((pt.BitFit(),), {}),
        ((pt.Convpass(dim=2),), {"classes": ["cat", "dog"]}),
    ],
    ids=["bare", "fact", "one bit", "tuned backbone", "with a head"],
)
def test_learner_behind_a_backbone_is_a_classifier(plugins: Any, settings: Any, tmp_path: Path) -> None:
    learner = behind(*plugins, **settings)
    save_learner(learner, tmp_path / "file", classes=["red", "green", "blue"])
    again = load_learner(tmp_path / "file", backbone=vit())
    x = pixels(learner.extract.model)
    assert torch.equal(again.extract(x), learner.extract(x))
    assert torch.equal(again.predict(x), learner.predict(x))


def test_backbone_is_not_in_the_file_and_its_plugin_is(tmp_path: Path) -> None:
    learner = behind(pt.LoRA(rank=2))
    save_learner(learner, tmp_path / "file", classes=CLASSES)
    info = inspect_learner(tmp_path / "file")
    stored = sum(t.num_bytes for t in info.tensors if t.name.startswith("learner.extract/plugins."))
    assert stored == 4 * sum(p.numel() for p in learner.extract.model.plugins.parameters())
    assert info.total_bytes < 20_000


def test_transform_is_the_backbones(tmp_path: Path) -> None:
    learner = behind()
    save_learner(learner, tmp_path / "file", classes=CLASSES)
    assert inspect_learner(tmp_path / "file").input_config == learner.extract.model.input_config


def test_transform_is_that_of_normalisation_or_the_one_that_is_given(tmp_path: Path) -> None:
    save_learner(ON_IMAGES["confit"](), tmp_path / "file", classes=CLASSES)
    config = inspect_learner(tmp_path / "file").input_config
    assert config is not None
    assert config["input_size"] == SIZE
    save_learner(ON_FEATURES["ncm"](), tmp_path / "file", classes=CLASSES)
    assert inspect_learner(tmp_path / "file").input_config is None
    save_learner(ON_FEATURES["ncm"](), tmp_path / "file", classes=CLASSES, transform=Transform({"input_size": SIZE}))
    assert inspect_learner(tmp_path / "file").input_config == config


def test_file_says_what_it_is(tmp_path: Path) -> None:
    learner = HeadLearner(TAER(ClassBalanced(per_class=2), lr=0.2))
    size = save_learner(learner, tmp_path / "file", classes=["ant", "bee"], metrics={"acc": 0.5}, notes="a note")
    info = inspect_learner(tmp_path / "file")
    assert info.learner["part"] == "HeadLearner"
    assert info.learner["settings"]["head"]["settings"]["lr"] == 0.2
    assert (info.classes, info.metrics, info.notes, info.journey) == (("ant", "bee"), {"acc": 0.5}, "a note", None)
    assert info.total_bytes == size == (tmp_path / "file").stat().st_size


# what is refused


def saved(tmp_path: Path, learner: Learner) -> Path:
    path = tmp_path / "learner.safetensors"
    save_learner(learner, path, classes=CLASSES)
    return path


def other_backbone() -> nn.Module:
    model = vit()
    with torch.no_grad():
        model.norm.weight += 1
    return model


def pooled_otherwise() -> nn.Module:
    model = vit()
    model.global_pool = "avg"
    return model


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (other_backbone, "belongs to another backbone: .* class and dtype agree, the weights differ"),
        (network, "belongs to a timm.* got a torch.nn.modules.container.Sequential"),
        (
            pooled_otherwise,
            "fails its check: the features of a synthetic image are off by .* relative, allowed are 1e-03",
        ),
        (lambda: None, "belongs to tiny.v0: no backbone is called 'tiny.v0'.* give the backbone: load_learner"),
    ],
)
def test_other_backbone_is_refused(backbone: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    path = saved(tmp_path, behind(pt.LoRA(rank=2)))
    with pytest.raises(pt.PluginFileError, match=message):
        load_learner(path, backbone=backbone())


def test_other_network_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, ON_IMAGES["generative"]())
    with pytest.raises(
        pt.PluginFileError, match=r"belongs to another network: .*Sequential of 120 parameters in the file"
    ):
        load_learner(path, network=nn.Sequential(nn.Conv2d(3, 8, 3)))
    with pytest.raises(pt.PluginFileError, match=r"needs the network it was saved with, .*: give network=\.\.\."):
        load_learner(path)


def test_weights_of_a_trained_network_need_not_be_given(tmp_path: Path) -> None:
    learner = ON_IMAGES["generative"]()
    list(run(stream(True), learner))
    other = network()
    with torch.no_grad():
        other[0].weight.zero_()
    again = load_learner(saved(tmp_path, learner), network=other)
    assert same(again.state(), learner.state())


def test_network_of_timm_is_built_by_its_name(tmp_path: Path) -> None:
    import timm

    build = functools.partial(timm.create_model, "resnet10t", num_classes=0)
    learner = OnlineLearner(build(), ProxyNCA(), Reservoir(3), replay=1)
    again = load_learner(saved(tmp_path, learner))
    assert same(again.state(), learner.state())


def test_weights_of_a_frozen_network_must_be_those(tmp_path: Path) -> None:
    path = saved(tmp_path, HeadLearner(NCM(), extract=network().eval()))
    other = network()
    with torch.no_grad():
        other[0].weight.zero_()
    load_learner(path, given={"extract": network()})
    with pytest.raises(pt.PluginFileError, match=r"belongs to another extract: .*, of another weights"):
        load_learner(path, given={"extract": other})


def flat(x: Tensor) -> Tensor:
    return x.flatten(1)


def test_function_is_given_again(tmp_path: Path) -> None:
    path = saved(tmp_path, HeadLearner(NCM(), extract=flat))
    assert load_learner(path, given={"extract": flat}).extract is flat
    with pytest.raises(
        pt.PluginFileError, match=r"needs the function flat that it was saved with: pass given={'extract': \.\.\.}"
    ):
        load_learner(path)


class Odd(Learner):
    """A learner of nobody's table."""

    def observe(self, x: Tensor, y: Tensor) -> None: ...

    def predict(self, x: Tensor, among: Sequence[int] | None = None) -> Tensor:
        return torch.zeros(len(x))

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None: ...


def test_learner_outside_the_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        pt.PluginFileError, match="learner cannot be saved: Odd is no plain value, and none of the parts"
    ):
        save_learner(Odd(), tmp_path / "file", classes=CLASSES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a/b": 1}, "the key 'a/b' of the state cannot be kept: a word without / is wanted"),
        ({"a": {1: 2}}, "the key 1 of the state cannot be kept"),
        ({"a": float("nan")}, "the metadata cannot be written as JSON"),
        ({"a": [torch.zeros(1)]}, "the metadata cannot be written as JSON"),
        ({"a": torch.zeros(1, dtype=torch.complex64)}, "the tensor state/a is torch.complex64; a plugin file holds"),
    ],
)
def test_state_that_no_file_can_hold_is_refused(state: dict[str, Any], message: str, tmp_path: Path) -> None:
    learner = HeadLearner(NCM())
    learner.state = lambda: state  # type: ignore[method-assign]
    with pytest.raises(pt.PluginFileError, match=message):
        save_learner(learner, tmp_path / "file", classes=CLASSES)
    assert not list(tmp_path.iterdir())


def test_damaged_file_is_refused_in_every_byte(tmp_path: Path) -> None:
    path = saved(tmp_path, ON_FEATURES["ncm"]())
    data = path.read_bytes()
    for place in range(0, len(data), 41):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(pt.PluginFileError):
            load_learner(path)


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    tensors, info = read(path)
    change(info)
    write(path, tensors, info)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda info: info.pop("kind"), "holds a plugin, no learner: give a file of save_learner"),
        (lambda info: info.update(kind="eyes"), "holds eyes, no learner"),
        (
            lambda info: info.update(schema_version=2),
            "has schema version 2, petiole .* reads version 1: upgrade petiole",
        ),
        (lambda info: info.update(classes="cat"), "the metadata `classes` should be list, found 'cat'"),
        (
            lambda info: info["learner"].update(part="NMC"),
            r"holds a NMC, which this petiole does not know \(did you mean",
        ),
        (
            lambda info: info["learner"]["settings"]["head"]["settings"].update(metric="x"),
            "no NCM can be made again: metric",
        ),
        (lambda info: info["learner"]["settings"]["head"]["settings"].update(odd=1), "no NCM can be made again: "),
        (lambda info: info["state"].append(["head/more", "tensor", "cpu"]), "of which there is no tensor"),
        (lambda info: info["state"].append(17), "the state has the entry 17"),
        (lambda info: info["state"].clear(), "what was learnt does not fit the learner: 'head'"),
    ],
)
def test_other_metadata_are_refused(change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path) -> None:
    path = changed(saved(tmp_path, ON_FEATURES["ncm"]()), change)
    with pytest.raises(pt.PluginFileError, match=message):
        load_learner(path)


def test_plugin_file_is_no_learner_and_says_so(tmp_path: Path) -> None:
    pt.save(pt.adapt(vit(), classes=["cat", "dog"]), tmp_path / "file")
    with pytest.raises(pt.PluginFileError, match="holds a plugin, no learner"):
        load_learner(tmp_path / "file")
