"""Which modules are batch norms, whatever their class."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from sepdeploy.analyze.batch_norms import behind_norm, is_batchnorm, norm_parts


class Norm(nn.Module):
    """State of a batch norm, and any function of it."""

    def __init__(self, run, eps=1e-5, variance=1.0, affine=True, **children) -> None:
        super().__init__()
        self.run, self.eps = run, eps
        torch.manual_seed(0)
        self.register_buffer("running_mean", torch.randn(6))
        self.register_buffer("running_var", variance * (0.5 + torch.rand(6)))
        self.weight = nn.Parameter(torch.randn(6)) if affine else None
        self.bias = nn.Parameter(torch.randn(6)) if affine else None
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        return self.run(self, x)


def norm(n, x, eps=None):
    return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, False, 0.1, n.eps if eps is None else eps)


def by_hand(n, x):
    x = (x - n.running_mean[:, None, None]) / (n.running_var[:, None, None] + n.eps).sqrt()
    return x if n.weight is None else x * n.weight[:, None, None] + n.bias[:, None, None]


def then(*names):
    def run(n, x):
        x = norm(n, x)
        for name in names:
            x = n.get_submodule(name)(x)
        return x

    return run


def in_place(n, x):
    return x.copy_(norm(n, x))


def remembering(n, x):
    """Computes its factors once: what is put into its weights afterwards is lost."""
    if "factors" not in vars(n):
        n.factors = n.weight / (n.running_var + n.eps).sqrt()
    return (x - n.running_mean[:, None, None]) * n.factors[:, None, None] + n.bias[:, None, None]


def of_no_small_variance(n, x):
    return F.batch_norm(x, n.running_mean, n.running_var.clamp(min=0.1), n.weight, n.bias, False, 0.1, n.eps)


def before(n, x):
    return norm(n, n.act(x))


def noisy(n, x):
    return norm(n, x) + 1e-3 * torch.randn_like(x)


def of_the_batch(n, x):
    return F.batch_norm(x, None, None, n.weight, n.bias, True, 0.1, n.eps)


def first_channel_more(n, x):
    y = norm(n, x)
    y[:, 0] += 1e-5
    return y


@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm2d(6),
        nn.BatchNorm1d(6, affine=False),
        nn.SyncBatchNorm(6),
        Norm(norm),
        Norm(norm, affine=False),
        Norm(by_hand),
        Norm(by_hand, variance=1e-8, eps=1e-3),
        Norm(then("drop", "act"), drop=nn.Identity(), act=nn.ReLU(inplace=True)),
        Norm(then("act"), act=nn.PReLU(6)),
        Norm(then("conv"), conv=nn.Conv2d(6, 2, 1)),
        Norm(by_hand, variance=0.0),
        Norm(in_place),
    ],
)
def test_norms(module) -> None:
    assert is_batchnorm(module.eval())


@pytest.mark.parametrize(
    "module",
    [
        None,
        nn.ReLU(),
        nn.Conv2d(6, 6, 1),
        nn.BatchNorm2d(6, track_running_stats=False),
        nn.BatchNorm3d(6),
        nn.InstanceNorm2d(6, affine=True, track_running_stats=False),
        nn.GroupNorm(2, 6),
        Norm(lambda n, x: norm(n, x, 0.0)),
        Norm(lambda n, x: norm(n, x, 1e-3)),
        Norm(lambda n, x: norm(n, x, 1e-3), variance=1e-6),
        Norm(lambda n, x: norm(n, x).relu()),
        Norm(lambda n, x: norm(n, x).clamp(max=3)),
        Norm(lambda n, x: norm(n, x).clamp(-50, 50)),
        Norm(lambda n, x: norm(n, x, 0.0), variance=1e4),  # but its weights may change
        Norm(lambda n, x: norm(n, x, 1e-3), variance=0.0),
        Norm(of_no_small_variance, variance=9.0),
        Norm(lambda n, x: norm(n, x).mean((2, 3), keepdim=True)),
        Norm(norm, act=nn.ReLU()),  # which it does not use
        Norm(before, act=nn.ReLU()),
        Norm(then("act", "drop"), drop=nn.Hardtanh(), act=nn.Sigmoid()),
        Norm(lambda n, x: norm(n, x), eps="small"),
        Norm(lambda n, x: norm(n, x)[:, :3]),
        Norm(lambda n, x: (norm(n, x),)),
        Norm(lambda n, x: norm(n, x, x.argmax())),
        Norm(noisy),
        Norm(of_the_batch),
        Norm(first_channel_more),
    ],
)
def test_others(module) -> None:
    assert not is_batchnorm(None if module is None else module.eval())


def test_a_dead_channel_is_compared_with_itself() -> None:
    """A channel that is 1e-9 of the others may still be all that the next layer reads."""

    def run(n, x):
        y = norm(n, x)
        return torch.cat([y[:, :1] * 2, y[:, 1:]], 1)

    module = Norm(run).eval()
    module.weight.data[0], module.bias.data[0] = 1e-9, 0
    assert not is_batchnorm(module)


def test_norms_in_training_with_hooks_parametrizations_or_more_state_are_left_alone() -> None:
    assert not is_batchnorm(Norm(norm).train())
    hooked = Norm(norm).eval()
    hooked.register_forward_hook(lambda *_: None)
    assert not is_batchnorm(hooked)
    parametrized = Norm(norm).eval()
    nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    assert not is_batchnorm(parametrized)
    more = Norm(norm).eval()
    more.register_buffer("temperature", torch.ones(1))
    assert not is_batchnorm(more)


def test_what_a_norm_has_computed_before_is_not_its_weights() -> None:
    module = Norm(remembering).eval()
    module(torch.zeros(1, 6, 2, 2))  # as tracing does
    assert not is_batchnorm(module)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_scripted_norms_take_no_hooks_and_are_left_alone() -> None:
    assert not is_batchnorm(torch.jit.script(nn.BatchNorm2d(6).eval()))


def test_a_plain_norm_does_not_run_its_children() -> None:
    module = nn.BatchNorm2d(6).eval()
    module.act = nn.ReLU()
    assert is_batchnorm(module)
    assert isinstance(behind_norm(module), nn.Identity)
    assert not behind_norm(module).training


def test_trying_changes_nothing() -> None:
    module = Norm(then("act"), act=nn.Dropout()).eval()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    random = torch.get_rng_state()
    assert is_batchnorm(module)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert not module.act.training


def test_what_is_behind_keeps_its_names() -> None:
    behind = behind_norm(Norm(norm, drop=nn.Identity(), act=nn.PReLU()))
    assert list(behind.state_dict()) == ["act.weight"]
    assert isinstance(behind_norm(nn.BatchNorm2d(3)), nn.Identity)


def test_parts_of_what_is_no_norm() -> None:
    assert norm_parts(nn.Linear(3, 3)) is None
    assert norm_parts(nn.BatchNorm2d(3, track_running_stats=False)) is None
    parts = norm_parts(nn.BatchNorm2d(3, affine=False, eps=0.5))
    assert parts is not None
    assert (parts.eps, parts.tensors[2:]) == (0.5, (None, None))
