"""The networks in the tables of "Optimized Separable Convolution: Yet Another Efficient Convolution Operator".

A row is a network with dense convolutions and the `Replacement` that its prefix stands for. The paper leaves open much
of what makes up the numbers; `OSEP`, `DSEP` and the rows hold the choices that reproduce them. They are the same for
all networks: stems and 1x1 convolutions stay dense, every other convolution is replaced; parameters include batch
norms; MACs are those of convolutions and classifier.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from sepdeploy.analyze.trace import conv_spec
from sepdeploy.core.chain import Chain, ChainSum, Norm
from sepdeploy.core.conv import ConvSpec
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.models import darts, mobilenet, resnet_cifar
from sepdeploy.schemes.scheme import find_scheme

STEMS = ("conv1", "stem", "features.init_block")
"""First convolutions by how their names begin."""


@dataclass(frozen=True, slots=True)
class Replacement:
    """What becomes of a convolution.

    Attributes:
        scheme: Name in the registry.
        options: Its hyper-parameters.
        has_middle_norm: Whether a batch norm stands between the factors.
    """

    scheme: str
    options: SchemeOptions
    has_middle_norm: bool = False

    def form(self, spec: ConvSpec) -> ChainSum:
        form = find_scheme(self.scheme).design(spec, self.options)
        if not self.has_middle_norm:
            return form
        [chain] = form.terms
        first, *others = chain.stages
        return ChainSum((Chain((first, Norm(first.out_channels), *others)),))


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table.

    Attributes:
        name: As printed, with the channel multiplier or the initial channels.
        build: Makes the network; called with the meta device, as the widest have a billion dense weights.
        image_size: Pixels of a side of the image.
        params_m: Millions of parameters as printed.
        macs_g: Billions of multiply-accumulates as printed; None if they are not.
        replacement: None for a network as it is.
        note: What the paper prints otherwise.
    """

    name: str
    build: Callable[[], nn.Module]
    image_size: int
    params_m: float
    macs_g: float | None
    replacement: Replacement | None = None
    note: str = ""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Cost:
    """Parameters, batch norms included, and multiply-accumulates of one image."""

    params: int
    macs: int

    def errors(self, row: Row) -> list[float]:
        """Relative differences to the numbers that a row prints: parameters and, if printed, MACs."""
        printed = ((self.params, 1e6 * row.params_m), (self.macs, 1e9 * row.macs_g if row.macs_g else None))
        return [value / reference - 1 for value, reference in printed if reference]


OSEP = Replacement("optimized_separable", SchemeOptions(factors=2, kernel_position=1, group_rounding="padded"))
"""o-: gamma = 1, min(in, out) middle channels; Algorithm 1 gives the kernel to factor floor(N / 2)."""

UNEVEN_OSEP = replace(OSEP, options=replace(OSEP.options, group_rounding="uneven"))
"""The same without padding: groups that do not divide the channels differ in size."""

DSEP = Replacement("depthwise_separable", SchemeOptions(terms=1), has_middle_norm=True)
"""d-: its batch norm shows in the parameters."""


def network_cost(row: Row, replacement: Replacement | None) -> Cost:
    """The cost of a row's network with `replacement`, computed on shapes alone."""
    layers: list[tuple[str, nn.Module, tuple[int, int]]] = []
    with torch.device("meta"):
        network = row.build().eval()
        for name, module in network.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(
                    lambda layer, args, _, name=name: layers.append((name, layer, tuple(args[0].shape[-2:])))
                )
        network(torch.zeros(1, 3, row.image_size, row.image_size))
    params = sum(parameter.numel() for parameter in network.parameters())
    macs = 0
    for name, layer, input_size in layers:
        if isinstance(layer, nn.Linear):
            macs += layer.weight.numel()
            continue
        spec = conv_spec(layer)
        form = ChainSum((Chain((spec.as_factor(),)),))
        if replacement and not spec.is_pointwise and not name.startswith(STEMS):
            params -= form.params
            form = replacement.form(spec)
            params += form.params
        macs += form.macs(input_size)
    return Cost(params, macs)


def _cifar(depth: int, width: float = 1.0, shortcut: str = "pad") -> Callable[[], nn.Module]:
    return partial(getattr(resnet_cifar, f"resnet{depth}"), width=width, shortcut=shortcut)


def _plain(depth: int, params_m: float, macs_g: float) -> Row:
    return Row(f"ResNet{depth}", _cifar(depth), 32, params_m, macs_g)


def _osep(depth: int, width: float, params_m: float, macs_g: float | None) -> Row:
    """Dense 1x1 projections with batch norm: neither what plain ResNets have nor what the d- rows have."""
    return Row(f"o-ResNet{depth} x{width}", _cifar(depth, width, "projection"), 32, params_m, macs_g, OSEP)


def _dsep(depth: int, params_m: float, macs_g: float, note: str = "") -> Row:
    return Row(f"d-ResNet{depth} x2.75", _cifar(depth, 2.75), 32, params_m, macs_g, DSEP, note)


def _imagenet40(depth: int, width: float, params_m: float, macs_g: float) -> Row:
    name, replacement = (f"ResNet{depth}", None) if width == 1 else (f"o-ResNet{depth} x{width}", OSEP)
    build = partial(getattr(resnet_cifar, f"resnet{depth}_imagenet40"), width=width)
    return Row(name, build, 32, params_m, macs_g, replacement)


def o_mobilenet(width: float, last_channels: int | None) -> Row:
    """No width is printed, nor whether the last unit, which the classifier reads, has it too."""
    build = partial(mobilenet.MobileNetV1, width=width, last_channels=last_channels, is_separable=False)
    name = f"o-MobileNet x{width}" + (f", {last_channels} last" if last_channels else "")
    return Row(name, build, 224, 3.00, 0.564, OSEP)


DENSE_DARTS = darts.DARTS_V2.as_dense()

O_DARTS_CIFAR = Row(
    "o-DARTS, 42 channels", partial(darts.NetworkCifar, 42, genotype=DENSE_DARTS), 32, 3.25, 0.572, OSEP
)
O_DARTS_IMAGENET = Row(
    "o-DARTS, 56 channels", partial(darts.NetworkImageNet, 56, genotype=DENSE_DARTS), 224, 4.50, 0.554, OSEP
)
O_MOBILENET = o_mobilenet(2.125, 1024)

TABLES: dict[str, tuple[Row, ...]] = {
    "Table 3: DARTS, CIFAR10": (Row("DARTS, 36 channels", darts.darts_cifar, 32, 3.35, 0.528), O_DARTS_CIFAR),
    "Table 5: ImageNet": (
        Row("DARTS, 48 channels", darts.darts_imagenet, 224, 4.72, 0.530),
        O_DARTS_IMAGENET,
        Row(
            "MobileNet",
            mobilenet.mobilenet_v1,
            224,
            4.20,
            0.575,
            note="quoted from MobileNetV2, table 4; MobileNet's own paper counts 0.569 G",
        ),
        O_MOBILENET,
    ),
    "Table 6: ResNet, CIFAR10": (
        _plain(20, 0.270, 0.04055),
        _osep(20, 3.625, 0.221, 0.04070),
        _dsep(20, 0.250, 0.0400, "printed as x2.72"),
        _plain(32, 0.464, 0.06886),
        _osep(32, 3.75, 0.367, 0.06726),
        _dsep(32, 0.429, 0.06565),
        _plain(56, 0.853, 0.12548),
        _osep(56, 3.875, 0.682, 0.12574),
        _dsep(56, 0.786, 0.11890),
        _plain(110, 1.728, 0.25289),
        _osep(110, 3.875, 1.337, 0.24763),
        _dsep(110, 1.590, 0.23870),
        _osep(110, 1.0, 0.180, None),  # section 3.1
    ),
    "Table 7: ResNet, ImageNet40": (
        _imagenet40(20, 1.0, 4.58, 0.162),
        _imagenet40(20, 5.375, 5.13, 0.160),
        _imagenet40(32, 1.0, 7.68, 0.275),
        _imagenet40(32, 5.75, 7.78, 0.278),
        _imagenet40(56, 1.0, 13.88, 0.502),
        _imagenet40(56, 6.0, 12.55, 0.497),
        _imagenet40(110, 1.0, 27.83, 1.012),
        _imagenet40(110, 6.25, 23.79, 1.027),
    ),
}
