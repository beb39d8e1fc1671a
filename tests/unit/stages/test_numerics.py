"""Differences between outputs, and what is made of them."""

import math

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.conv import Trace
from sepdeploy.errors import ContractError, ToolError, UnsupportedModelError
from sepdeploy.stages import numerics
from sepdeploy.stages.numerics import check_numerics, fold_network, largest_error, numeric_error

NAN, INF = math.nan, math.inf
BATCH = np.ones((2, 3), np.float32)
NO_SITES = Trace(sites=(), input_shape=(1, 3), output_shapes=((1, 3),), total_macs=0, total_params=0)


def error(expected, found):
    return largest_error((np.array(expected, np.float32),), (np.array(found, np.float32),))


def test_error_is_relative_to_the_largest_value_of_the_output():
    assert error([0.0, -200.0], [1.0, -200.0]) == pytest.approx(1 / 200)
    assert error([0.02, 0.04], [0.02, 0.03]) == pytest.approx(0.25)
    assert error([3e38], [-3e38]) == pytest.approx(2)  # no overflow


def test_small_outputs_may_be_off_by_rounding_only():
    tolerance = numerics.NUMERIC_TOLERANCE
    assert error([0.0, 0.0], [0.0, 0.0]) == 0
    assert error([0.0, 0.0], [0.9e-6, 0.0]) <= tolerance
    assert error([0.0, 0.0], [1.1e-6, 0.0]) > tolerance
    assert error([1e-3], [2e-3]) > tolerance


def test_nan_is_never_equal_and_never_lost_among_outputs():
    assert math.isnan(error([NAN], [NAN]))
    assert math.isnan(error([1.0, 2.0], [1.0, NAN]))
    fine, broken = np.ones(2), np.array([1.0, NAN])
    assert math.isnan(largest_error((fine, fine), (fine, broken)))
    assert math.isnan(largest_error((fine, fine), (broken, fine)))


def test_infinities_are_equal_to_themselves_and_leave_the_range_alone():
    assert error([-INF, 1.0], [-INF, 1.0]) == 0
    assert error([-INF, 1.0], [-INF, 1.5]) == 0.5
    assert error([-INF, 1.0], [INF, 1.0]) == INF
    assert error([-INF, 1.0], [-1e38, 1.0]) == INF


class LookingIn(nn.Module):
    """A network that uses more of its norm than its output."""

    def __init__(self, norm, look):
        super().__init__()
        self.conv, self.norm, self.last, self.plain = nn.Conv2d(8, 8, 3), norm, nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.look = look

    def forward(self, x):
        return self.plain(self.last(self.look(self.norm, self.conv(x))))


def with_its_factor(norm, x):
    return norm(x) + norm.weight.sum()


def by_its_type(norm, x):
    return norm(x) if isinstance(norm, nn.BatchNorm2d) else x * 2


@pytest.mark.parametrize(("look", "folded"), [
    (lambda norm, x: norm(x), ["conv", "last"]), (with_its_factor, ["last"]), (by_its_type, ["last"]),
])  # fmt: skip
@torch.no_grad()
def test_norms_with_more_inside_are_folded_where_the_network_does_not_look_into_them(make_net, look, folded):
    inner = make_net("norm_with_children")[0][1]
    network = LookingIn(inner, look).eval()
    x = torch.randn(2, 8, 6, 6)
    found = fold_network(network, trace_network(network, x[:1]), x.numpy())
    assert sorted(found.pairs) == folded
    assert isinstance(found.network.norm, nn.Sequential) == ("conv" in folded)
    assert isinstance(found.network.plain, nn.Identity)
    assert torch.allclose(found.network(x), network(x), atol=1e-5)


class LookingEverywhere(nn.Module):
    def __init__(self, look):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, eps=0.5)
        self.norm.act = nn.ReLU()
        self.look = look

    def forward(self, x):
        return self.look(self.norm, self.conv(x))


@pytest.mark.parametrize(("look", "folded"), [
    (lambda norm, x: norm.act(norm(x)), ["conv"]), (with_its_factor, []), (by_its_type, []),
])  # fmt: skip
@torch.no_grad()
def test_plain_norms_that_the_network_looks_into_stay(look, folded):
    network, x = LookingEverywhere(look).eval(), torch.randn(2, 8, 6, 6)
    found = fold_network(network, trace_network(network, x[:1]), x.numpy())
    assert sorted(found.pairs) == folded
    assert torch.allclose(found.network(x), network(x), atol=1e-5)


@torch.no_grad()
def test_memory_that_runs_out_is_no_look_into_a_norm():
    def look(norm, x):
        if isinstance(norm, nn.Identity):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return norm(x)

    network, x = LookingEverywhere(look).eval(), torch.randn(2, 8, 6, 6)
    with pytest.raises(RuntimeError, match="allocate memory"):
        fold_network(network, trace_network(network, x[:1]), x.numpy())


class Sum(nn.Module):
    """Adds a constant to each output value."""

    def __init__(self, *values):
        super().__init__()
        self.values = torch.tensor(values)

    def forward(self, x):
        return x + self.values


def sum_file(path, *values):
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "c"], ["y"])],
        "sum",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])],
        [helper.make_tensor("c", TensorProto.FLOAT, [3], values)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
    return path


@pytest.mark.parametrize("values", [(0.0, 0.0, 0.5), (0.0, 0.0, NAN), (0.0, 0.0, INF)])
def test_file_that_computes_something_else_is_refused(tmp_path, values):
    path = sum_file(tmp_path / "net.onnx", *values)
    with pytest.raises(ToolError, match=r"exported \.onnx file computes something else"):
        check_numerics(path, Sum(0.0, 0.0, 0.0), BATCH, is_channels_last=False)


def test_reported_error_is_absolute_and_finite(tmp_path):
    path = sum_file(tmp_path / "net.onnx", 99.0, -INF, 0.0)
    check_numerics(path, Sum(99.0, -INF, 0.0), BATCH, is_channels_last=False)
    assert numeric_error(path, Sum(99.0, -INF, 0.5), BATCH, is_channels_last=False) == 0.5
    for values in ((99.0, 0.0, 0.0), (99.0, -INF, NAN)):
        with pytest.raises(ToolError, match=r"net\.onnx gives NaN or infinite values"):
            numeric_error(path, Sum(*values), BATCH, is_channels_last=False)


def test_network_that_gives_nan_is_refused_before_it_is_compared():
    with pytest.raises(UnsupportedModelError, match="gives NaN on validation images"):
        fold_network(Sum(0.0, 0.0, NAN), NO_SITES, BATCH)


@pytest.mark.parametrize("wrong", [0.5, NAN])
def test_fold_that_changes_the_outputs_is_a_bug(monkeypatch, wrong):
    monkeypatch.setattr(numerics, "fold_batchnorm", lambda network, norms: network.values.fill_(wrong))
    with pytest.raises(ContractError, match="folding the batch norms changed the outputs"):
        fold_network(Sum(0.0, 0.0, 0.0), NO_SITES, BATCH)
