from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.conv import ConvSpec
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.core.selection import FusedBlock
from sepdeploy.errors import UsageError
from sepdeploy.planning.fused_block import blocks_of_site, build_block, dense_block, dense_form, example_of
from sepdeploy.schemes.scheme import SCHEMES, find_scheme

SPEC = ConvSpec(32, 48, (3, 3), stride=(2, 1), padding=(1, 1, 1, 1))


def blocks(spec: ConvSpec = SPEC, size: tuple[int, int] = (9, 12)) -> list[FusedBlock]:
    schemes = [scheme for scheme in map(find_scheme, SCHEMES) if scheme.check(spec) is None]
    assert len(schemes) > 5
    return [FusedBlock(scheme.design(spec, SchemeOptions()), spec, size, activation="relu") for scheme in schemes]


def test_every_scheme_keeps_values_in_a_sane_range() -> None:
    for block in (dense_block(SPEC, (9, 12), activation="relu"), *blocks()):
        output = build_block(block)(example_of(block))
        assert output.shape == (1, 48, 5, 12)
        assert 0.3 < float(output.square().mean().sqrt()) < 1.5
        assert float(output.min()) == 0.0  # the ReLU


def test_blocks_are_the_same_every_time_and_leave_the_generator_alone() -> None:
    block = blocks()[-1]
    torch.manual_seed(5)
    first = build_block(block)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    assert torch.equal(build_block(block)(example_of(block)), first(example_of(block)))
    assert not any(module.training for module in first.modules())


def test_lowerings_are_applied_and_change_nothing_else() -> None:
    form = find_scheme("optimized_separable").design(SPEC, SchemeOptions())
    block = FusedBlock(form, SPEC, (9, 12))
    folded = replace(block, lowering=("fold_shuffle",))
    example = example_of(block)
    assert torch.allclose(build_block(block)(example), build_block(folded)(example), atol=1e-5)
    kinds = [[type(module).__name__ for module in build_block(b).modules()] for b in (block, folded)]
    assert "ChannelShuffle" in kinds[0]
    assert "ChannelShuffle" not in kinds[1]


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("relu6", F.relu6),
        ("hardswish", F.hardswish),
        ("silu", F.silu),
        ("sigmoid", torch.sigmoid),
        ("hardsigmoid", F.hardsigmoid),
        ("leaky_relu", F.leaky_relu),
        ("gelu", F.gelu),
    ],
)
def test_activations(activation, function) -> None:
    plain = dense_block(SPEC, (9, 12))
    active = dense_block(SPEC, (9, 12), activation=activation)
    example = example_of(plain)
    assert torch.equal(build_block(active)(example), function(build_block(plain)(example)))


def test_linear_layers_are_matrix_products_over_positions() -> None:
    spec = ConvSpec(24, 16, (1, 1))
    dense = dense_block(spec, (1, 1), positions=5, is_linear=True)
    assert example_of(dense).shape == (1, 5, 24)
    assert example_of(replace(dense, positions=1)).shape == (1, 24)
    assert isinstance(build_block(dense)[0], nn.Linear)
    low_rank = replace(dense, form=find_scheme("optimized_separable").design(spec, SchemeOptions()))
    assert build_block(low_rank)(example_of(dense)).shape == (1, 5, 16)
    assert not any(isinstance(module, nn.Linear) for module in build_block(low_rank).modules())


def test_padding_modes_of_the_layer_come_first() -> None:
    block = dense_block(replace(SPEC, padding_mode="reflect"), (9, 12))
    example = example_of(block)
    network = build_block(block)
    conv = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    padded = F.pad(example, (1, 1, 1, 1), mode="reflect")
    assert torch.allclose(network(example), F.conv2d(padded, conv.weight, conv.bias, stride=(2, 1)), atol=1e-5)


def test_one_block_for_each_call(make_net) -> None:
    twice = trace_network(*make_net("twice")).site("conv")
    found = blocks_of_site(twice, dense_form(twice.spec), "relu", ("fold_norm",))
    assert found == (FusedBlock(dense_form(twice.spec), twice.spec, (12, 12), 1, "relu", ("fold_norm",)),) * 2
    residual = trace_network(*make_net("residual")).site("a")  # has no bias, but a batch norm
    assert blocks_of_site(residual, dense_form(residual.spec), "relu") == (
        dense_block(twice.spec, (12, 12), activation="relu"),
    )
    patches = trace_network(*make_net("patches_as_batch")).site("conv")
    (block,) = blocks_of_site(patches, dense_form(patches.spec))
    assert (block.positions, block.input_size) == (4, (6, 6))
    assert example_of(block).shape == (4, 8, 6, 6)


def test_a_linear_site_counts_its_positions() -> None:
    net = nn.Sequential(nn.Flatten(2), nn.Linear(36, 8))
    trace = trace_network(net, torch.randn(1, 4, 6, 6), includes_linear=True)
    (block,) = blocks_of_site(trace.site("1"), dense_form(trace.site("1").spec))
    assert (block.positions, block.input_size, block.is_linear) == (4, (1, 1), True)
    assert build_block(block)(example_of(block)).shape == (1, 4, 8)


def test_unknown_lowerings_are_refused() -> None:
    with pytest.raises(UsageError, match="no lowering 'faster'"):
        build_block(replace(blocks()[0], lowering=("faster",)))
