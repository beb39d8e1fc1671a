"""Batch norms that do more are taken apart where, and only where, their parts compute the same."""

import copy

import pytest
import torch
from torch import Tensor, nn

from sepdeploy.analyze.trace import trace_network
from sepdeploy.loading.split_norms import compound_norms, split_norms


class NormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.LeakyReLU(0.1, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class Frozen(nn.Module):
    """As the FrozenBatchNorm2d of detection networks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps = 1e-3
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class Functional(nn.BatchNorm2d):
    """Its activation is no child."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class OnlyInTraining(NormAct):
    """In training it is something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (1.0 if self.training else 0.0)


class Counting(NormAct):
    """Has state of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("calls", torch.zeros(()))


class Broken(NormAct):
    """Cannot run alone."""

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("not here")


def network(kind: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 8, 3), kind(8), nn.Conv2d(8, 8, 3), kind(8))
    with torch.no_grad():
        for name, value in made.state_dict().items():
            if name.split(".")[1] in ("running_mean", "running_var", "weight", "bias") and value.dim() == 1:
                value.copy_(torch.rand(8) + 0.5)
    return made.eval()


@pytest.mark.parametrize("kind", [NormAct, Frozen])
@torch.no_grad()
def test_parts_compute_the_same_and_the_norm_is_seen(kind):
    whole = network(kind)
    before, x = copy.deepcopy(whole.state_dict()), torch.randn(2, 3, 9, 9)
    assert compound_norms(whole) == ("1", "3")
    split = split_norms(whole, compound_norms(whole))
    torch.testing.assert_close(split(x), whole(x))
    assert type(whole[1]) is kind, "the network that was given stays as it is"
    assert all(torch.equal(value, before[name]) for name, value in whole.state_dict().items())
    assert [site.norm for site in trace_network(whole, x[:1]).sites] == [None, None]
    assert [site.norm for site in trace_network(split, x[:1]).sites] == ["1.norm", "3.norm"]
    assert compound_norms(split) == ()


def test_training_goes_on_as_before():
    whole, x = network(NormAct).train(), torch.randn(4, 3, 9, 9)
    split = split_norms(whole, compound_norms(whole))
    torch.testing.assert_close(split(x), whole(x))
    torch.testing.assert_close(split[1].norm.running_var, whole[1].running_var)
    frozen = split_norms(network(Frozen), ("1", "3")).train()
    before = frozen[1].norm.running_mean.clone()
    frozen(x)
    assert torch.equal(frozen[1].norm.running_mean, before)
    assert not any(weight.requires_grad for weight in frozen[1].norm.parameters())


@pytest.mark.parametrize("kind", [Functional, OnlyInTraining, Counting, Broken, nn.BatchNorm2d, nn.InstanceNorm2d])
def test_what_is_more_than_its_children_stays(kind):
    assert compound_norms(network(kind)) == ()


def test_a_norm_under_two_names_stays_one():
    whole = network(NormAct)
    whole[3] = whole[1]
    split = split_norms(whole, compound_norms(whole))
    assert split[3] is split[1]
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(split(x), whole(x))


def test_norms_in_lists_of_lists_are_found_by_name():
    whole = nn.Sequential(nn.ModuleDict({"a": NormAct(4)}), network(NormAct))
    assert compound_norms(whole) == ("0.a", "1.1", "1.3")
    split = split_norms(whole, ("0.a",))
    assert type(split[0]["a"].norm) is nn.BatchNorm2d
    assert split_norms(whole, ()) is whole
