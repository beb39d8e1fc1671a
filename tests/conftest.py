"""Tiny networks that do what real ones do wrong: one factory each, reached through the fixture `make_net`."""

import importlib.util
import os
import shutil
import types
import warnings

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.utils import parametrizations

TOOLS = ("litert_torch", "ai_edge_litert", "ai_edge_quantizer", "sklearn")
"""Optional packages without which tests are skipped."""

PROGRAMS = ("qemu-aarch64", "llvm-mca-19", "mmdebstrap", "gcc", "aarch64-linux-gnu-objdump", "dockerd", "ssh", "sshd")
"""Programs likewise; .ci/run has the command that installs them."""


def pytest_addoption(parser):
    parser.addoption("--require-tools", action="store_true", help=f"fail if one of {', '.join(TOOLS)} is missing")


def pytest_configure(config):
    missing = [name for name in TOOLS if importlib.util.find_spec(name) is None]
    programs = [name for name in PROGRAMS if find_program(name) is None]
    if programs and config.getoption("--require-tools"):
        raise pytest.UsageError(f"--require-tools: {', '.join(programs)} cannot be found; .ci/run installs them")
    if missing and config.getoption("--require-tools"):
        raise pytest.UsageError(
            f"--require-tools: {', '.join(missing)} cannot be found; run pip install -e '.[tflite,test]'"
        )


def find_program(name):
    """Path of a program, of those for administrators too; None if it is not installed."""
    return shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin")))


@pytest.fixture(scope="session")
def program():
    """`program(name)` is the path of one of PROGRAMS; the test is skipped if it is not installed."""

    def find(name):
        path = find_program(name)
        if path is None:
            pytest.skip(f"{name} is not installed; .ci/run has the command")
        return path

    return find


@pytest.fixture(scope="session", autouse=True)
def _own_price_cache(tmp_path_factory):
    """Prices of earlier runs, and of the user, are no part of a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEPDEPLOY_CACHE_DIR", str(tmp_path_factory.mktemp("prices")))
        yield


class Net(nn.Module):
    """Modules by name, and a function of (network, input) as the forward pass."""

    def __init__(self, run, **modules) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.run(self, x)


class DoublingConv(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


class NormAct(nn.BatchNorm2d):
    """As timm has it: the activation is a child of the norm."""

    def __init__(self, channels, act=nn.ReLU):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class FrozenNorm(nn.Module):
    """As torchvision has it: everything is a buffer."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        weight, bias, mean, variance = (each[:, None, None] for each in self._buffers.values())
        scale = weight * (variance + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)


class ActivatedNorm(nn.BatchNorm2d):
    """A batch norm with an activation inside that is no module."""

    def forward(self, input):
        return F.relu(super().forward(input))


def conv(inputs=8, outputs=8, kernel=3, **options):
    options.setdefault("padding", 1)
    return nn.Conv2d(inputs, outputs, kernel, **options)


def _deprecated(wrap, module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return wrap(module)


def plain(**options):
    return Net(lambda n, x: n.conv(x), conv=conv(**options))


def chain():
    return nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 12, stride=2), nn.BatchNorm2d(12), nn.ReLU())


def residual():
    return Net(
        lambda n, x: F.relu(x + n.bn2(n.b(F.relu(n.bn1(n.a(x)))))),
        a=conv(bias=False), bn1=nn.BatchNorm2d(8), b=conv(bias=False), bn2=nn.BatchNorm2d(8),
    )  # fmt: skip


def twice():
    return Net(lambda n, x: n.bn(n.conv(F.relu(n.bn(n.conv(x))))), conv=conv(), bn=nn.BatchNorm2d(8))


def twice_in_place():
    def run(n, x):
        y = n.conv(x)
        x += y
        return n.conv(x)

    return Net(lambda n, x: run(n, 2 * x), conv=conv())


def shared_weight():
    net = nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU(), conv(), nn.BatchNorm2d(8))
    net[3].weight = net[0].weight
    return net


def alias():
    module = conv()
    return nn.ModuleDict({"a": module, "b": nn.Sequential(module, nn.ReLU())})


def aliased():
    inner = alias()
    return Net(lambda n, x: n.inner["b"](n.inner["a"](x)), inner=inner)


def list_reused():
    layers = nn.ModuleList([conv(), nn.ReLU()])
    layers.append(layers[0])
    return Net(lambda n, x: n.layers[2](n.layers[1](n.layers[0](x))), layers=layers)


def held_in_plain_list():
    net = Net(lambda n, x: n.held[0](x), conv=conv())
    net.held = [net.conv]
    return net


def functional():
    net = Net(lambda n, x: F.conv2d(F.relu(n.conv(x)), n.kernel, padding=1), conv=conv())
    net.kernel = nn.Parameter(torch.randn(8, 8, 3, 3))
    return net


def weight_used_elsewhere():
    return Net(lambda n, x: n.bn(n.conv(x)) + F.conv2d(x, n.conv.weight, padding=1), conv=conv(), bn=nn.BatchNorm2d(8))


def own_forward():
    return nn.Sequential(DoublingConv(8, 8, 3, padding=1), nn.BatchNorm2d(8))


def patched_forward():
    net = plain()
    net.conv.forward = types.MethodType(lambda self, x: 3 * nn.Conv2d.forward(self, x), net.conv)
    return net


def hooked():
    net = nn.Sequential(conv(), nn.BatchNorm2d(8))
    net[0].register_forward_hook(_double)
    return net


def _double(module, args, output):
    return 2 * output


def called_past_hooks():
    return Net(lambda n, x: n.conv.forward(x), conv=conv())


def mixed_dimensions():
    return Net(
        lambda n, x: n.c3(n.c1(n.up(x).flatten(2)).reshape(len(x), 1, 8, 12, -1)),
        up=nn.ConvTranspose2d(8, 8, 2, stride=2), c1=nn.Conv1d(8, 8, 3, padding=1), c3=nn.Conv3d(1, 2, 3),
    )  # fmt: skip


def norm_after_transposed():
    return nn.Sequential(nn.ConvTranspose2d(8, 8, 2, stride=2), nn.BatchNorm2d(8))


def never_called():
    return Net(lambda n, x: n.conv(x), conv=conv(), unused=conv())


def norm_input_read_elsewhere():
    def run(n, x):
        y = n.conv(x)
        return n.bn(y) + y

    return Net(run, conv=conv(), bn=nn.BatchNorm2d(8))


def norm_of_two_convs():
    return Net(lambda n, x: n.bn(n.a(x)) + n.bn(n.b(x)), a=conv(), b=conv(), bn=nn.BatchNorm2d(8))


def norm_with_activation():
    return nn.Sequential(conv(), ActivatedNorm(8))


def norm_with_children():
    """With an activation of its own, in another norm and behind it."""
    return nn.Sequential(conv(), NormAct(8), conv(), NormAct(8, nn.PReLU), conv(), NormAct(8, nn.Identity), nn.ReLU())


def frozen_norm():
    return Net(lambda n, x: n.b(F.relu(n.norm(n.a(x)))), a=conv(), norm=FrozenNorm(8), b=conv())


def norm_in_training():
    net = Net(lambda n, x: n.bn(n.conv(x)), conv=conv(), bn=nn.BatchNorm2d(8))
    net.bn.train = lambda mode=True: net.bn
    return net


def conv_output_returned():
    def run(n, x):
        y = n.conv(x)
        return y, n.bn(y)

    return Net(run, conv=conv(), bn=nn.BatchNorm2d(8))


def relu_in_place():
    return nn.Sequential(nn.ReLU(inplace=True), conv(), nn.ReLU(inplace=True), nn.BatchNorm2d(8), conv())


def input_in_place():
    return Net(lambda n, x: n.conv(x.sub_(0.5).mul_(2)), conv=conv())


def dict_output():
    return Net(lambda n, x: {"scores": n.conv(x), "deep": [x.mean((2, 3)), None]}, conv=conv())


def nhwc():
    return Net(lambda n, x: n.conv(x.permute(0, 3, 1, 2)), conv=conv())


def unbatched():
    return Net(lambda n, x: torch.stack([n.conv(image) for image in x]), conv=conv())


def keyword():
    return Net(lambda n, x: n.conv(input=x), conv=conv())


def patches_as_batch():
    def run(n, x):
        batch = len(x)
        patches = x.unfold(2, 6, 6).unfold(3, 6, 6).permute(0, 2, 3, 1, 4, 5).reshape(-1, 8, 6, 6)
        return n.conv(patches).reshape(batch, 4, 8, 6, 6)

    return Net(run, conv=conv())


def autocast():
    def run(n, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return n.b(F.relu(n.a(x))).float()

    return Net(run, a=conv(), b=conv())


def with_gradients():
    def run(n, x):
        with torch.enable_grad():
            return n.bn(n.conv(x)).detach()

    return Net(run, conv=conv(), bn=nn.BatchNorm2d(8))


def looks_at_type():
    return Net(lambda n, x: n.conv(x) if isinstance(n.conv, nn.Conv2d) else 0 * n.conv(x), conv=conv())


def reads_private_attribute():
    return Net(lambda n, x: F.pad(n.conv(x), n.conv._reversed_padding_repeated_twice), conv=conv())


def stale_geometry():
    """Stride turned into dilation after construction, as segmentation backbones do it, and pruned channels."""
    net = plain(stride=2, outputs=16)
    net.conv.stride, net.conv.dilation, net.conv.padding = 1, (2, 2), (2, 2)
    net.conv.weight = nn.Parameter(net.conv.weight.detach()[:12])
    net.conv.bias = nn.Parameter(net.conv.bias.detach()[:12])
    return net


def swallows_everything():
    def run(n, x):
        try:
            y = n.conv(x)
        except BaseException:
            y = x
        return F.relu(y)

    return Net(run, conv=conv())


def calls_by_value():
    """Early exit: how often the convolution runs depends on the image."""
    return Net(lambda n, x: n.conv(x) if x.mean() > -100 else x, conv=conv())


def not_finite():
    net = plain()
    net.conv.weight.data[0, 0, 0, 0] = float("nan")
    return net


def complex_weight():
    return Net(lambda n, x: n.conv(x.to(torch.complex64)).abs(), conv=conv(dtype=torch.complex64))


def remade_in_forward():
    def run(n, x):
        n.conv = nn.Conv2d(8, 8, 3, padding=1)
        return n.conv(x)

    return Net(run, conv=conv())


FACTORIES = {
    function.__name__: function
    for function in (
        plain, chain, residual, twice, twice_in_place, shared_weight, aliased, list_reused, held_in_plain_list,
        functional, weight_used_elsewhere, own_forward, patched_forward, hooked, called_past_hooks, mixed_dimensions,
        norm_after_transposed, never_called, norm_input_read_elsewhere, norm_of_two_convs, norm_with_activation,
        norm_with_children, frozen_norm, norm_in_training, conv_output_returned, relu_in_place, input_in_place,
        dict_output, nhwc, unbatched, keyword,
        patches_as_batch, autocast, with_gradients, looks_at_type, reads_private_attribute, stale_geometry,
        swallows_everything, calls_by_value, not_finite, complex_weight, remade_in_forward,
    )
} | {
    "old_weight_norm": lambda: _deprecated(lambda net: (nn.utils.weight_norm(net[0]), net)[1], chain()),
    "old_spectral_norm": lambda: _deprecated(lambda net: (nn.utils.spectral_norm(net[0]), net)[1], chain()),
    "weight_norm": lambda: nn.Sequential(parametrizations.weight_norm(conv()), nn.BatchNorm2d(8)),
    "spectral_norm": lambda: nn.Sequential(parametrizations.spectral_norm(conv()), nn.BatchNorm2d(8)),
    "pointwise": lambda: plain(kernel=1, padding=0),
    "depthwise": lambda: plain(groups=8),
    "row_kernel": lambda: plain(kernel=(1, 3), padding=(0, 1)),
    "few_channels": lambda: plain(groups=4),
    "grouped": lambda: plain(inputs=8, outputs=16, groups=2),
    "same_even": lambda: plain(kernel=(4, 2), padding="same"),
    "same_even_reflect": lambda: plain(kernel=(4, 2), padding="same", padding_mode="reflect"),
    "reflect": lambda: plain(padding_mode="reflect"),
    "replicate": lambda: plain(padding=(2, 1), padding_mode="replicate", stride=2),
    "circular": lambda: plain(padding_mode="circular"),
}  # fmt: skip


def _make_net(name, seed=0, **options):
    torch.manual_seed(seed)
    net = FACTORIES[name](**options).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | FrozenNorm):  # statistics of a trained network, not the identity
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 2)
            module.bias.data.normal_()
    shape = (1, 12, 12, 8) if name == "nhwc" else (1, 8, 12, 12)
    return net, torch.randn(shape)


@pytest.fixture
def make_net():
    """`make_net(name, seed=0)` gives a network in eval mode with random but fixed weights, and one input for it."""
    return _make_net


def pytest_generate_tests(metafunc):
    if "net_name" in metafunc.fixturenames:
        metafunc.parametrize("net_name", sorted(FACTORIES))
