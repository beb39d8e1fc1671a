"""Live activations, counted by hand for small networks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from sepdeploy.analyze.liveness import measure_memory
from sepdeploy.analyze.trace import conv_spec
from sepdeploy.core.artifact import Precision
from sepdeploy.core.chain import Chain, ChainSum, Factor
from sepdeploy.core.memory import MemoryProfile
from sepdeploy.errors import UnsupportedModelError, UsageError
from sepdeploy.passes.replace_convs import replace_modules
from sepdeploy.schemes.module import ChainConv2d

INPUT = 4 * 8 * 8
"""Values of the input, (1, 4, 8, 8), alive throughout."""


def profile(forward: Callable[[Tensor], object], shape: tuple[int, ...] = (1, 4, 8, 8)) -> MemoryProfile:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> object:
            return forward(x)

    return measure_memory(Net().eval(), torch.ones(shape))


def steps(memory: MemoryProfile) -> list[tuple[str, int]]:
    """Operators with the values alive besides the input."""
    return [(step.operator, step.live_values - INPUT) for step in memory.steps]


def test_norm_and_activation_fuse_into_the_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(4, 16, 1), nn.BatchNorm2d(16), nn.ReLU6(), nn.Conv2d(16, 2, 1)).eval()
    memory = measure_memory(model, torch.ones(1, 4, 8, 8))
    assert [(step.module, step.live_values - INPUT) for step in memory.steps] == [
        ("", 0),
        ("0", 16 * 64),
        ("3", 18 * 64),
    ]
    assert memory.peak(Precision.INT8).module == "3"


def test_a_norm_beside_another_reader_does_not_fuse() -> None:
    class Preactivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(4, 4, 1)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return x + F.relu(self.norm(x))

    memory = measure_memory(Preactivation().eval(), torch.ones(1, 4, 8, 8))
    assert steps(memory) == [("input", 0), ("convolution", 256), ("native_batch_norm", 512), ("add", 512)]


def test_precisions_differ_by_their_bytes_per_value() -> None:
    memory = profile(lambda x: torch.sigmoid(x))
    assert memory.peak_bytes(Precision.FLOAT32) == 4 * 512
    assert memory.peak_bytes(Precision.INT8) == 512


def test_indices_cost_the_same_in_every_precision() -> None:
    memory = profile(lambda x: x.argmax(1))
    assert memory.peak_bytes(Precision.FLOAT32) == 4 * 256 + 8 * 64
    assert memory.peak_bytes(Precision.INT8) == 256 + 8 * 64


def test_a_residual_stays_alive() -> None:
    def forward(x: Tensor) -> Tensor:
        x = torch.sigmoid(x)
        return x + torch.tanh(torch.sigmoid(x))

    # The sum needs no third buffer: it is written over the branch.
    assert steps(profile(forward)) == [("input", 0), ("sigmoid", 256), ("sigmoid", 512), ("tanh", 768), ("add", 512)]


def test_outputs_stay_alive_and_are_not_overwritten() -> None:
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.sigmoid(x)
        return first, torch.tanh(first + 1)

    assert steps(profile(forward)) == [("input", 0), ("sigmoid", 256), ("add", 512), ("tanh", 768)]


def test_the_input_is_not_overwritten() -> None:
    assert steps(profile(lambda x: F.relu(x, inplace=True).mul_(2))) == [("input", 0), ("relu_", 256), ("mul_", 256)]


def test_a_concatenation_lies_beside_its_inputs() -> None:
    memory = profile(lambda x: torch.cat((torch.sigmoid(x), torch.tanh(x)), 1))
    assert steps(memory)[-1] == ("cat", 2 * 256 + 512)


def test_a_product_is_written_over_the_larger_factor() -> None:
    memory = profile(lambda x: torch.exp(torch.sigmoid(x.mean((2, 3), keepdim=True)) * torch.tanh(x)))
    assert steps(memory)[-2:] == [("mul", 4 + 256), ("exp", 512)]


@pytest.mark.parametrize(
    ("view", "extra"),
    [
        (lambda x: x.reshape(1, -1), 0),
        (lambda x: x.contiguous(memory_format=torch.channels_last), 0),
        (lambda x: x.permute(0, 2, 3, 1), 0),
        (lambda x: x.reshape(1, 1, -1).transpose(0, 2), 0),  # of sizes 1, 1 and 256
        (lambda x: x.permute(0, 3, 1, 2).permute(0, 2, 3, 1), 0),
        (lambda x: x.permute(0, 1, 3, 2), 256),
        (lambda x: x.transpose(-1, -2), 256),
        (lambda x: x[:, :1], 64),
        (lambda x: x[:, :4], 0),
    ],
)
def test_what_views_need(view: Callable[[Tensor], Tensor], extra: int) -> None:
    memory = profile(lambda x: view(torch.tanh(x)))
    assert memory.peak_bytes(Precision.INT8) == INPUT + 256 + extra


@pytest.mark.parametrize(
    ("size", "stride", "padding", "padded"),
    [(8, 1, 1, 0), (8, 2, 1, 10), (9, 2, 1, 0), (8, 2, 0, 0), (8, 1, 2, 12), (8, 1, 0, 0), (8, 3, 1, 10)],
)
def test_padding_that_is_not_same_needs_a_padded_copy(size: int, stride: int, padding: int, padded: int) -> None:
    conv = nn.Conv2d(4, 2, 3, stride, padding)
    memory = measure_memory(conv, torch.ones(1, 4, size, size))
    image = 4 * size**2
    pads = [step.live_values - image for step in memory.steps if step.operator == "pad"]
    assert pads == ([4 * padded**2] if padded else [])


@pytest.mark.parametrize(
    ("pad", "is_fused"), [((0, 1, 0, 1), True), ((1, 0, 1, 0), False), ((1, 1, 1, 1), False), ((0, 1), False)]
)
def test_a_zero_pad_fuses_where_it_makes_the_padding_same(pad: tuple[int, ...], is_fused: bool) -> None:
    conv = nn.Conv2d(4, 2, 3, stride=2)
    memory = profile(lambda x: conv(F.pad(x, pad)))
    assert ("constant_pad_nd" not in dict(steps(memory))) == is_fused


def test_what_no_output_depends_on_is_not_counted() -> None:
    def forward(x: Tensor) -> Tensor:
        torch.cat([torch.sigmoid(x)] * 9)
        return F.max_pool2d(x, 2) + torch.ones(1, 4, 4, 4).cumsum(0)

    # Neither the unused branch, nor the indices of the pooling, nor the constant.
    memory = profile(forward)
    assert steps(memory) == [("input", 0), ("max_pool2d_with_indices", 64), ("add", 64)]
    assert all(step.live_other_bytes == 0 for step in memory.steps)


def test_what_is_written_into_a_slice_is_kept() -> None:
    def forward(x: Tensor) -> Tensor:
        both = torch.zeros(1, 8, 8, 8)
        both[:, :4] = torch.sigmoid(x)
        both[:, 4:].copy_(torch.tanh(x))
        return both

    memory = profile(forward)
    assert [operator for operator, _ in steps(memory) if operator in ("sigmoid", "tanh")] == ["sigmoid", "tanh"]
    assert steps(memory)[-1][1] >= 512


def test_a_module_in_place_of_a_convolution_compares_with_it() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(4, 4, 1)
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.conv2 = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return x + self.conv2(self.conv(x))

    model = Block().eval()
    before = measure_memory(model, torch.ones(1, 4, 8, 8))
    widening = Chain((Factor(4, 12, (3, 3), padding=(1, 1, 1, 1), groups=4), Factor(12, 4, (1, 1))))
    form = ChainSum((widening, widening))
    replace_modules(model, {"conv": ChainConv2d(form, conv_spec(model.conv), bias=True)})
    after = measure_memory(model, torch.ones(1, 4, 8, 8))

    assert [step.module for step in before.steps] == ["", "stem", "conv", "conv2", ""]
    # Dense: input, residual, output. Two terms: at the second pointwise also the sum so far and 12 middle channels.
    assert before.module_peak_bytes("conv", Precision.INT8) == 3 * 256
    assert after.module_peak_bytes("conv", Precision.INT8) == INPUT + 256 + 256 + (12 + 4) * 64
    assert after.peak(Precision.INT8).module.startswith("conv.terms.1")
    for name in ("stem", "conv2"):
        assert after.module_peak_bytes(name, Precision.INT8) == before.module_peak_bytes(name, Precision.INT8)
    assert before.module_peak_bytes("absent", Precision.INT8) is None


def test_a_module_called_twice_counts_its_worst_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return x + self.conv(torch.sigmoid(x))

    memory = measure_memory(Twice().eval(), torch.ones(1, 4, 8, 8))
    assert memory.module_peak_bytes("conv", Precision.INT8) == INPUT + 3 * 256


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Conv2d(4, 4, 1)
    image = torch.ones(1, 4, 8, 8)
    before = measure_memory(model, image)
    assert not model._forward_hooks
    assert measure_memory(model, image) == before
    measure_memory(nn.Hardtanh(0, 0.5, inplace=True), image)
    assert torch.equal(image, torch.ones(1, 4, 8, 8))


def test_a_wrong_input_is_refused() -> None:
    with pytest.raises(UsageError, match="does not run on an input of shape"):
        measure_memory(nn.Conv2d(4, 4, 1), torch.ones(1, 3, 8, 8))
    with pytest.raises(UnsupportedModelError, match="returns no tensor"):
        profile(lambda x: None)
