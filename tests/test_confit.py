"""Batch statistics kept in front of convolutions: pairs, statistics, bank."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.layers import StdConv2d
from torch import Tensor, nn
from torch.nn import functional as F

from petiole.continual.confit.bank import StatisticsBank
from petiole.continual.confit.pairing import find_pairs
from petiole.continual.confit.statistics import STATISTICS
from petiole.errors import BackboneError, FitError
from test_golden import det, golden

MODELS = {
    "resnet18": lambda: timm.create_model("resnet18"),
    "mobilenet_v2": torchvision.models.mobilenet_v2,  # depthwise
    "regnet": torchvision.models.regnet_y_400mf,  # grouped, and convolutions without batch norms
    "efficientnet": lambda: timm.create_model("tf_efficientnet_b0"),  # padded by size, batch norms with activations
}
MAPS = {
    "7x7/2": lambda: nn.Conv2d(6, 4, 7, stride=2, padding=3),
    "5x5/3 dilated": lambda: nn.Conv2d(6, 4, 5, stride=3, padding=2, dilation=2),
    "3x1 grouped": lambda: nn.Conv2d(6, 4, (3, 1), stride=(1, 2), padding=(1, 0), groups=2),
    "depthwise": lambda: nn.Conv2d(6, 12, 3, padding=1, groups=6, bias=False),
    "valid": lambda: nn.Conv2d(6, 4, 3),
    "same": lambda: nn.Conv2d(6, 4, (3, 5), dilation=2, padding="same"),
    "circular": lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"),
    "reflect": lambda: nn.Conv2d(6, 4, 3, padding=2, padding_mode="reflect"),
    "replicate/2": lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1, padding_mode="replicate"),
    "1x1/2": lambda: nn.Conv2d(6, 4, 1, stride=2),
    "1d": lambda: nn.Conv1d(6, 4, 3, stride=2, padding=1),
    "3d": lambda: nn.Conv3d(6, 4, 3, padding=1),
    "linear": lambda: nn.Linear(6, 4),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(num: int, size: int = 32, seed: int = 0) -> Tensor:
    """Images whose mean is another one everywhere."""
    return random(num, 3, size, size, seed=seed) + torch.linspace(-1, 2, size).square()


def seeded(make: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


@torch.no_grad()
def drift(network: nn.Module, share: float = 0.3) -> None:
    """Changes every kernel by a share of itself."""
    for i, p in enumerate(network.parameters()):
        if p.ndim > 1:
            p.add_(share * p.std() * random(*p.shape, seed=i))


def small() -> nn.Sequential:
    """Two convolutions with batch norms, of random gains and statistics."""
    network = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.Dropout(0.5),
        )
    )
    for i in (1, 4):
        for j, tensor in enumerate((network[i].weight, network[i].bias, network[i].running_mean)):
            tensor.data.copy_(0.3 * random(len(tensor), seed=10 * i + j) + (j == 0))
    return network


def bank_of(network: nn.Module, **settings: Any) -> StatisticsBank:
    return StatisticsBank(network, find_pairs(network, images(2)), **settings)


@contextmanager
def untouched(network: nn.Module) -> Iterator[None]:
    """Asserts that tensors, modes and hooks of a network are what they were."""
    before = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    yield
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert modes == [module.training for module in network.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def kept(bank: StatisticsBank, experience: str, norm: str) -> Any:
    return bank.records[experience][norm]


def test_pairs_are_those_of_the_forward_pass() -> None:
    network = timm.create_model("resnet10t")
    pairing = find_pairs(network, images(2))
    expected = {"bn1": "conv1.6"}
    for name, module in network.named_modules():
        if isinstance(module, timm.models.resnet.BasicBlock):
            expected |= {f"{name}.bn1": f"{name}.conv1", f"{name}.bn2": f"{name}.conv2"}
            if module.downsample is not None:
                # the last of its parts is the batch norm, the one before it the convolution
                last = len(module.downsample) - 1
                expected[f"{name}.downsample.{last}"] = f"{name}.downsample.{last - 1}"
    expected |= {"conv1.1": "conv1.0", "conv1.4": "conv1.3"}
    assert dict(pairing.pairs) == expected
    assert pairing.lone_norms == {}
    assert pairing.lone_maps == ("fc",)


def test_finding_pairs_leaves_the_network_as_it_was() -> None:
    network = small().train()
    with untouched(network):
        find_pairs(network, images(2))


class Twice(nn.Module):
    """One batch norm behind two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.a(x)) + self.norm(self.b(x))


class Tokens(nn.Module):
    """A linear map on tokens, behind which the batch norm has channels of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.norm = nn.Linear(32, 8), nn.BatchNorm1d(96)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.map(x.flatten(1, 2)))


class Rectified(nn.Conv2d):
    """A convolution with more to it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Unused(nn.Sequential):
    """A batch norm for training alone."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 1))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self[0](x)) if self.training else self[0](x)


@pytest.mark.parametrize(
    ("make", "norm", "reason"),
    [
        (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1)), "0", "no convolution or linear map"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.AvgPool2d(2), nn.BatchNorm2d(4)), "2", "no convolution"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(True), nn.BatchNorm2d(4)), "2", "no convolution"),
        (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4)), "1", "no convolution"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), "1", "keeps no run"),
        (lambda: nn.Sequential(StdConv2d(3, 4, 3), nn.BatchNorm2d(4)), "1", "does not follow from its weight"),
        (lambda: nn.Sequential(Rectified(3, 4, 3), nn.BatchNorm2d(4)), "1", "does not follow from its weight"),
        (Twice, "norm", "calls it 2 times"),
        (Tokens, "norm", "gives 3 axes"),
        (Unused, "norm", "does not call it"),
    ],
)
def test_what_is_no_pair_is_reported_with_the_reason(make: Any, norm: str, reason: str) -> None:
    pairing = find_pairs(seeded(make), images(2))
    assert dict(pairing.pairs) == {}
    assert reason in pairing.lone_norms[norm]
    assert f"{norm} is not paired: {pairing.lone_norms[norm]}" in str(pairing)


def test_pre_activation_networks_are_paired_in_part() -> None:
    pairing = find_pairs(torchvision.models.densenet121(), images(2))
    assert pairing.pairs["features.denseblock1.denselayer1.norm2"] == "features.denseblock1.denselayer1.conv1"
    assert "features.denseblock1.denselayer1.norm1" in pairing.lone_norms
    assert len(pairing.norms) == 121


def test_network_without_batch_norm_is_refused() -> None:
    with pytest.raises(BackboneError, match="Conv2d has no batch norm whose statistics could be kept"):
        find_pairs(nn.Conv2d(3, 4, 1), images(2))


@pytest.mark.parametrize("name", MAPS)
def test_taps_give_the_mean_output_under_any_weights(name: str) -> None:
    module = seeded(MAPS[name])
    size = {"1d": (9,), "3d": (5, 6, 7), "linear": ()}.get(name, (9, 12))
    x = random(5, 6, *size) + random(6, *size, seed=1)
    taps = STATISTICS["taps"].reduce(module, x.mean(0))
    assert taps.shape == (6, *module.weight.shape[2:])
    for p in module.parameters():
        p.data.copy_(random(*p.shape, seed=2))
    with torch.no_grad():
        std, mean = torch.std_mean(module(x).transpose(0, 1).flatten(1), 1)
        found = STATISTICS["taps"].recover(module, taps, size, module.weight, module.bias)
    assert float(((found - mean) / std).abs().max()) < 1e-5


@pytest.mark.parametrize(("statistic", "is_exact"), [("phases", True), ("channel", False)])
def test_phases_are_exact_where_channels_are_not(statistic: str, is_exact: bool) -> None:
    module, x = seeded(MAPS["1x1/2"]), random(5, 6, 9, 12) + random(6, 9, 12, seed=1)
    numbers = STATISTICS[statistic].reduce(module, x.mean(0))
    assert numbers.shape == ((4 if is_exact else 1), 6)
    with torch.no_grad():
        mean = module(x).mean((0, 2, 3))
        found = STATISTICS[statistic].recover(module, numbers, (9, 12), module.weight, module.bias)
    assert torch.allclose(found, mean, atol=1e-5) is is_exact


def test_constant_input_needs_no_more_than_channels() -> None:
    module, x = seeded(MAPS["7x7/2"]), random(1, 6, 1, 1).expand(2, 6, 9, 12)
    numbers = STATISTICS["channel"].reduce(module, x.mean(0))
    with torch.no_grad():
        mean = module(x).mean((0, 2, 3))
        found = STATISTICS["channel"].recover(module, numbers, (9, 12), module.weight, module.bias)
    torch.testing.assert_close(found, mean)


def test_map_smaller_than_the_stride_keeps_finite_phases() -> None:
    module, x = seeded(MAPS["7x7/2"]), random(2, 6, 1, 1)
    numbers = STATISTICS["phases"].reduce(module, x.mean(0))
    with torch.no_grad():
        found = STATISTICS["phases"].recover(module, numbers, (1, 1), module.weight, module.bias)
        torch.testing.assert_close(found, module(x).mean((0, 2, 3)))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_recovered_mean_is_the_true_one_under_other_weights(name: str) -> None:
    network = seeded(MODELS[name]).eval()
    pairing = find_pairs(network, images(2))
    assert pairing.lone_norms == {}
    bank = StatisticsBank(network, pairing)
    bank.record("a", [images(4), images(4, seed=1)])
    # what each convolution saw: the same pass by hand, with hooks of its own
    norms, inputs, hooks = [network.get_submodule(norm) for norm in pairing.pairs], {}, []
    for norm, conv in pairing.pairs.items():
        keep = lambda module, args, norm=norm: inputs.setdefault(norm, []).append(args[0].clone())  # noqa: E731
        hooks.append(network.get_submodule(conv).register_forward_pre_hook(keep))
    for module in norms:
        module.train()
    for batch in (images(4), images(4, seed=1)):
        network(batch)
    for hook in hooks:
        hook.remove()
    drift(network)
    with bank.activate("a"):
        for norm, conv in pairing.pairs.items():
            y = network.get_submodule(conv)(torch.cat(inputs[norm])).transpose(0, 1).flatten(1).double()
            error = (network.get_submodule(norm).running_mean - y.mean(1)) / y.std(1)
            assert float(error.abs().max()) < 1e-5, norm


@pytest.mark.slow
def test_phases_agree_with_the_authors_code() -> None:
    expected = golden("confit_resnet18")
    network = timm.create_model("resnet18").double()
    with torch.no_grad():
        for name, p in network.named_parameters():
            is_gain = p.ndim == 1 and name.endswith("weight")
            p.copy_(is_gain + det(f"confit.{name}", tuple(p.shape), 0.05 if p.ndim > 1 else 0.1))
    given = expected["input"]
    x = det(given["name"], tuple(given["shape"]), 1.0) + given["offset"]
    bank = StatisticsBank(network, find_pairs(network, x[:2, :, :64, :64]), statistic="phases")
    bank.record("a", [x])
    # running means are linear: after one step from zero they are momentum times the mean
    share = expected["momentum"]
    assert dict(bank.pairing.pairs) == {layer["bn"]: name for name, layer in expected["layers"].items()}
    with bank.activate("a"):
        for layer in expected["layers"].values():
            record, recovered = kept(bank, "a", layer["bn"]), network.get_submodule(layer["bn"]).running_mean
            found = {
                "tracked_mean_sum": share * record.pre_conv.sum(),
                "tracked_mean_norm": share * record.pre_conv.norm(),
                "bn_running_var_sum": (1 - share + share * record.variance).sum(),
                "recovered_mean_norm": share * recovered.norm(),
                "recovered_mean_head": share * recovered[:6],
            }
            assert list(record.pre_conv.squeeze(0).shape) == layer["tracked_mean_shape"]
            for key, value in found.items():
                torch.testing.assert_close(value, torch.tensor(layer[key], dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "others", "counts"),
    [
        ("resnet18", 3 * 4800, {"channel": 3843, "phases": 6540, "taps": 31123}),
        ("resnet50", 3 * 26560, {"channel": 22531, "phases": 30604, "taps": 52883}),
        ("mobilenet_v2", 3 * 17056, {"channel": 15779, "phases": 18812, "taps": 72891}),
    ],
)
def test_storage_is_that_of_the_formulas(name: str, others: int, counts: dict[str, int]) -> None:
    network = getattr(torchvision.models, name)()
    for statistic, count in counts.items():
        bank = bank_of(network, statistic=statistic)
        bank.record("a", [images(2)])
        numbers = bank.num_kept("a")
        assert numbers == {"variance": others // 3, "affine": 2 * others // 3, "pre_conv": count}
        assert bank.num_bytes("a") == 4 * (others + count)


@pytest.mark.parametrize("is_training", [True, False])
def test_recording_leaves_the_network_as_it_was(is_training: bool) -> None:
    network = small().train(is_training)
    with untouched(network):
        bank_of(network).record("a", [images(4)])


def test_recorded_are_the_batch_statistics_of_training() -> None:
    network, batches = small(), [images(4), images(8, seed=1)]
    bank = bank_of(network, mean="stale")
    bank.record("a", batches)
    inputs = []
    for x in batches:  # without the dropout at the end
        y = network[0](x)
        inputs.append((y, network[3](F.relu(network[1].train()(y)))))
    for norm, index in (("1", 0), ("4", 1)):
        parts = [y[index].transpose(0, 1).flatten(1) for y in inputs]
        mean = (4 * parts[0].mean(1) + 8 * parts[1].mean(1)) / 12
        variance = (4 * parts[0].var(1) + 8 * parts[1].var(1)) / 12
        torch.testing.assert_close(kept(bank, "a", norm).mean, mean)
        torch.testing.assert_close(kept(bank, "a", norm).variance, variance)


@pytest.mark.parametrize("is_training", [True, False])
def test_activation_leaves_the_network_as_it_was(is_training: bool) -> None:
    network = small().train(is_training)
    bank = bank_of(network)
    bank.record("a", [images(4)])
    drift(network)
    with untouched(network), bank.activate("a"):
        assert not network.training
        assert not torch.equal(network[1].running_mean, small()[1].running_mean)
        network.train()(images(4))
        network[1].weight.data.zero_()


def test_activation_leaves_the_network_as_it_was_after_an_exception() -> None:
    network = small().train()
    bank = bank_of(network)
    bank.record("a", [images(4)])
    with untouched(network):
        with pytest.raises(RuntimeError, match="in the middle"), bank.activate("a"):
            raise RuntimeError("in the middle")
        with bank.activate("a"):
            pass


def test_forward_passes_record_nothing() -> None:
    network = small()
    bank = bank_of(network)
    bank.record("a", [images(4)])
    before = copy.deepcopy(bank.state())
    network.train()(images(4, seed=3))
    network.eval()(images(4, seed=4))
    with bank.activate("a"):
        network(images(4, seed=5))
    assert set(bank.records) == {"a"}
    for norm, tensors in before["a"].items():
        now = bank.state()["a"][norm]
        assert now["size"] == tensors.pop("size")
        assert all(torch.equal(now[name], tensor) for name, tensor in tensors.items())


def test_experiences_do_not_see_each_other() -> None:
    network = small()
    bank = bank_of(network)
    bank.record("a", [images(4)])
    with bank.activate("a"):
        before = network(images(2))
    bank.record("b", [images(4, seed=1) + 3])
    network[1].weight.data.mul_(2)
    with bank.activate("a"):
        assert torch.equal(network(images(2)), before)


@pytest.mark.parametrize("mean", ["recovered", "stale", "latest"])
@pytest.mark.parametrize("variance", ["stale", "rescaled", "latest"])
@pytest.mark.parametrize("affine", ["own", "latest"])
def test_settings_say_where_each_tensor_comes_from(mean: Any, variance: Any, affine: Any) -> None:
    network = small()
    bank = bank_of(network, mean=mean, variance=variance, affine=affine)
    everything = bank_of(network, mean="stale")
    bank.record("a", [images(4)])
    everything.record("a", [images(4)])
    recorded = kept(everything, "a", "4")
    latest = network[4]
    latest.weight.data.add_(1)
    # twice the kernel: twice the mean, four times the variance; the layer in front stays as it is
    network[3].weight.data.mul_(2)
    expected = {
        "running_mean": {"recovered": 2 * recorded.mean, "stale": recorded.mean, "latest": latest.running_mean}[mean],
        "running_var": {
            "stale": recorded.variance,
            "rescaled": 4 * recorded.variance,
            "latest": latest.running_var,
        }[variance],
        "weight": recorded.weight if affine == "own" else latest.weight,
        "bias": recorded.bias if affine == "own" else latest.bias,
    }
    expected = {name: value.detach().clone() for name, value in expected.items()}
    with bank.activate("a"):
        for name, value in expected.items():
            torch.testing.assert_close(getattr(latest, name).detach(), value, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_rescaled_variance_is_that_of_uncorrelated_inputs() -> None:
    # white noise under a kernel that meets no border: its entries are uncorrelated, so the formula is exact
    network = seeded(lambda: nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5)))
    bank = bank_of(network, variance="rescaled")
    x = random(64, 3, 24, 24) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    bank.record("a", [x])
    drift(network, 1.0)
    with bank.activate("a"):
        ratio = network[1].running_var / network[0](x).transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(ratio, torch.ones(5), rtol=0.05, atol=0)


def test_spread_that_was_zero_keeps_the_variance() -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    bank = bank_of(network, variance="rescaled")
    network[0].weight.data.zero_()
    bank.record("a", [images(4)])
    network[0].weight.data.fill_(1)
    with bank.activate("a"):
        assert torch.equal(network[1].running_var, torch.zeros(2))


def test_lone_batch_norm_keeps_the_recorded_mean() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    bank = bank_of(network)
    bank.record("a", [images(4)])
    assert bank.num_kept("a") == {"mean": 3, "variance": 3 + 2, "affine": 4, "pre_conv": 3}
    with bank.activate("a"):
        torch.testing.assert_close(network[0].running_mean, images(4).mean((0, 2, 3)))


def test_bank_goes_on_from_its_state() -> None:
    network = small()
    bank, other = bank_of(network, variance="rescaled"), bank_of(network, variance="rescaled")
    bank.record("a", [images(4)])
    other.restore(bank.state())
    drift(network)
    with bank.activate("a"):
        expected = network(images(2))
    with other.activate("a"):
        assert torch.equal(network(images(2)), expected)


def test_settings_are_checked() -> None:
    with pytest.raises(FitError, match=r"statistic is one of taps, channel, phases, got 'tap' \(did you mean 'taps'"):
        bank_of(small(), statistic="tap")
    with pytest.raises(FitError, match="variance is one of stale, rescaled, latest, got 'recovered'"):
        bank_of(small(), variance="recovered")


def test_recording_says_what_is_wrong() -> None:
    network = small()
    bank = bank_of(network)
    for batches, reason in [
        ([], "no batch came by 1"),
        ([images(1)], "at least 2 samples, got one of 1"),
        ([images(2), images(2, size=16)], r"before 1, \[3, 16, 16\] follows \[3, 32, 32\]"),
    ]:
        with untouched(network), pytest.raises(FitError, match=reason):
            bank.record("a", batches)
    assert bank.records == {}
    network[3] = nn.Identity()
    network[4] = nn.BatchNorm2d(4)
    with pytest.raises(FitError, match="4 no longer takes the output of 3: find the pairs anew"):
        bank.record("a", [images(2)])


def test_activation_says_what_is_wrong() -> None:
    bank = bank_of(small())
    with pytest.raises(FitError, match="nothing is recorded of 'birds': known are nothing"), bank.activate("birds"):
        pass
    bank.record("birds", [images(2)])
    with pytest.raises(FitError, match=r"'bird' \(did you mean 'birds'\?\): known are birds"), bank.activate("bird"):
        pass
    with bank.activate("birds"):
        with pytest.raises(FitError, match="an experience is active"), bank.activate("birds"):
            pass
        with pytest.raises(FitError, match="an experience is active"):
            bank.record("cats", [images(2)])
