"""Statistics and biases of a converted network, measured anew: two cheap corrections without training.

Batch norm re-estimation gives every norm behind a replaced layer the mean and the variance of what it now reads. Bias
correction gives every output channel of a replaced layer the mean that it has in the original network (Nagel et al.,
"Data-free quantization through weight equalization and bias correction", 2019, section 4.2, here measured on images).
Either can hurt a network whose layers were fitted to the original's outputs already, so held-out images decide.

Both are sequential by nature: each layer is to be measured with those before it corrected already. Instead of one pass
over the images per layer, a single pass corrects every layer by the mean over all batches so far, its own included.
"""

from __future__ import annotations

import copy
from collections import deque
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sepdeploy.analyze.damage import network_damage
from sepdeploy.core.conv import Trace
from sepdeploy.core.plan import Plan
from sepdeploy.core.training import RecoveryStep
from sepdeploy.errors import ContractError
from sepdeploy.schemes.module import ChainConv2d, ChainLinear
from sepdeploy.transfer.layer import Batches

__all__ = ["recalibrate"]

_LEAST_GAIN = 1e-3
"""Share of the damage that a step must take away to be kept: less may be rounding."""


@torch.no_grad()
def recalibrate(
    original: nn.Module, converted: nn.Module, trace: Trace, plan: Plan, fit: Batches, held_out: Batches
) -> tuple[nn.Module, tuple[RecoveryStep, ...]]:
    """Re-estimate batch norms, then correct biases, each kept only if it brings the outputs nearer to the original's.

    Args:
        original: The trained network in eval mode.
        converted: What `convert_network` made of it; it is not changed.
        trace: Of the original network.
        plan: What was replaced.
        fit: Images to measure on; about six passes are made.
        held_out: Images to decide on.

    Returns:
        The network in eval mode, and what was tried: nothing if no convolution was replaced.
    """
    network = copy.deepcopy(converted).eval()
    layers = tuple(site.name for site in trace.sites if site.name in plan.replaced)
    if not layers:
        return network, ()
    damage, images = _damage(original, network, held_out)
    name = "batch norm re-estimation"
    norms = _stale_norms(original, network, fit)
    norm_step = RecoveryStep(
        name, damage, damage, images, False, "no batch norm with running statistics reads what a replaced layer changed"
    )
    if norms:
        trial = copy.deepcopy(network)
        _reestimate_norms(trial, norms, fit)
        after, _ = _damage(original, trial, held_out)
        norm_step = _decided(name, damage, after, images, f"{len(norms)} batch norms")
        if norm_step.is_kept:
            network, damage = trial, after
    trial = copy.deepcopy(network)
    _correct_biases(original, trial, layers, fit)
    if norm_step.is_kept:
        _reestimate_norms(trial, norms, fit)  # they were to fit the means that have just been moved
    after, _ = _damage(original, trial, held_out)
    bias_step = _decided("bias correction", damage, after, images, f"{len(layers)} layers")
    return trial if bias_step.is_kept else network, (norm_step, bias_step)


def _decided(name: str, before: float, after: float, images: int, detail: str) -> RecoveryStep:
    return RecoveryStep(name, before, after, images, after < before * (1 - _LEAST_GAIN), detail)


def _damage(original: nn.Module, network: nn.Module, held_out: Batches) -> tuple[float, int]:
    """Change of the outputs on the held-out images, and how many these are."""
    sizes: list[int] = []

    def counted(batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        return batch

    return network_damage(original, network, map(counted, held_out())), sum(sizes)


class _Statistics:
    """Mean and variance per channel of what a batch norm reads, over all calls (Chan, Golub and LeVeque, 1983).

    Args:
        norm: Has running statistics.
        is_live: Whether these follow with each call.
    """

    def __init__(self, norm: _BatchNorm, *, is_live: bool) -> None:
        self._norm = norm
        self._is_live = is_live
        self._count = 0
        self._mean = self._variance = torch.zeros((), dtype=torch.float64)

    def see(self, _norm: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        """Hook: add the input (N, C, ...) of a call."""
        x = _input(args, kwargs)
        count = x.numel() // x.shape[1]
        others = [dim for dim in range(x.dim()) if dim != 1]
        variance, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), others, correction=0)
        share = count / (self._count + count)
        change = mean.double() - self._mean
        between = share * (1 - share) * change.square()
        self._variance = (1 - share) * self._variance + share * variance.double() + between
        self._mean = self._mean + share * change
        self._count += count
        if self._is_live:
            self.write()

    def write(self) -> None:
        """Set the running statistics; a norm that has seen NaN or a single value per channel keeps its own."""
        norm = self._norm
        is_finite = bool((self._mean + self._variance).isfinite().all())
        if norm.running_mean is not None and norm.running_var is not None and self._count > 1 and is_finite:
            norm.running_mean.copy_(self._mean)
            norm.running_var.copy_(self._variance * self._count / (self._count - 1))


def _input(args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Tensor:
    return args[0] if args else kwargs["input"]


def _stale_norms(original: nn.Module, network: nn.Module, fit: Batches) -> tuple[str, ...]:
    """Names of the batch norms whose inputs are no longer the original's; those in training mode have no use for it."""
    names = [
        name
        for name, module in network.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and not module.training
    ]
    batch = next(iter(fit()), None)
    if batch is None:
        raise ContractError("no calibration images")
    before, after = (_inputs_of(model, names, batch[:1]) for model in (original, network))
    return tuple(name for name in names if not _are_equal(before.get(name, []), after.get(name, [])))


def _are_equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def _inputs_of(model: nn.Module, names: list[str], image: Tensor) -> dict[str, list[Tensor]]:
    """What each of the modules reads for one image, call by call."""
    inputs: dict[str, list[Tensor]] = {}

    def see(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        inputs.setdefault(name_of[module], []).append(_input(args, kwargs).clone())

    name_of = {module: name for name, module in model.named_modules() if name in names}
    with ExitStack() as hooks:
        for module in name_of:
            hooks.callback(module.register_forward_pre_hook(see, with_kwargs=True).remove)
        model(image.clone())
    return inputs


def _reestimate_norms(network: nn.Module, names: tuple[str, ...], fit: Batches) -> None:
    """Give batch norms the statistics of their inputs over all images; in place.

    In the first pass every norm goes by the batches so far. The second measures all of them with the norms before them
    as the first left them: on ResNet-20 that is as good as one pass per norm.
    """
    norms = [norm for norm in map(network.get_submodule, names) if isinstance(norm, _BatchNorm)]
    for is_live in (True, False):
        measured = [_Statistics(norm, is_live=is_live) for norm in norms]
        with ExitStack() as hooks:
            for norm, statistics in zip(norms, measured, strict=True):
                hooks.callback(norm.register_forward_pre_hook(statistics.see, with_kwargs=True).remove)
            for batch in fit():
                network(batch.clone())
        for statistics in measured:
            statistics.write()


class _Offset:
    """What one layer's outputs lack per channel of the original's mean, over the calls so far."""

    def __init__(self, layer: ChainConv2d) -> None:
        self._is_linear = isinstance(layer, ChainLinear)
        self._expected: deque[Tensor] = deque()
        self._positions = 0
        self._lacking = torch.zeros(layer.out_channels, dtype=torch.float64)

    def expect(self, _layer: nn.Module, _args: object, output: Tensor) -> None:
        """Hook on the original layer."""
        self._expected.append(self._sum(output))

    def correct(self, _layer: nn.Module, _args: object, output: Tensor) -> Tensor:
        """Hook on the converted layer: adds a call's outputs and corrects them."""
        if self._expected:  # a network may call a layer less often for some images
            self._lacking += self._expected.popleft() - self._sum(output)
            self._positions += output.numel() // len(self._lacking)
        offset = self.mean.to(output.dtype)
        return output + (offset if self._is_linear else offset[:, None, None])

    def end_batch(self) -> None:
        """Forget calls of the original that the converted network did not make."""
        self._expected.clear()

    @property
    def mean(self) -> Tensor:
        """(C,) float64; zeros if nothing finite is known."""
        mean = self._lacking / max(self._positions, 1)
        return mean if bool(mean.isfinite().all()) else torch.zeros_like(mean)

    def _sum(self, output: Tensor) -> Tensor:
        """Sum over everything but the channels, (C,) float64."""
        channels = output if self._is_linear else output.movedim(-3, -1)
        return channels.flatten(0, -2).sum(0, dtype=torch.float64)


def _correct_biases(original: nn.Module, network: nn.Module, names: tuple[str, ...], fit: Batches) -> None:
    """Shift the biases of replaced layers so that their outputs have the original's mean per channel; in place."""
    offsets: list[tuple[ChainConv2d, _Offset]] = []
    with ExitStack() as hooks:
        for name in names:
            layer = network.get_submodule(name)
            if not isinstance(layer, ChainConv2d):
                raise ContractError(f"{name} is to be replaced by the plan, but is a {type(layer).__name__}")
            offset = _Offset(layer)
            offsets.append((layer, offset))
            hooks.callback(original.get_submodule(name).register_forward_hook(offset.expect).remove)
            hooks.callback(layer.register_forward_hook(offset.correct).remove)
        for batch in fit():
            original(batch.clone())
            network(batch.clone())
            for _, offset in offsets:
                offset.end_batch()
    for layer, offset in offsets:
        if bool(offset.mean.any()):
            bias = layer.bias
            layer.set_bias(offset.mean if bias is None else bias.double() + offset.mean)
