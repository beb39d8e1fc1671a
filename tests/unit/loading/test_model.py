from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sepdeploy.errors import UnsupportedModelError, UsageError
from sepdeploy.loading.model import load_model

NET = """
import torch
from torch import nn

def block(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())

class Net(nn.Module):
    def __init__(self, num_classes=10, width=4, depth=3, inputs=3):
        super().__init__()
        widths = [inputs] + [width] * depth
        self.features = nn.Sequential(*(block(a, b) for a, b in zip(widths, widths[1:])))
        self.fc = nn.Linear(width, num_classes)
        self.fc.weight.requires_grad = False

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))

class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = Net()

def other():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))

def lazy():
    return nn.Sequential(nn.LazyConv2d(4, 3))

def meta():
    with torch.device("meta"):
        return Net()

def half():
    return Net().half()
"""


@pytest.fixture
def arch(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    return f"{tmp_path}/net.py"


def state_of(arch: str, factory: str = "Net", **options) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    namespace: dict = {}
    exec(NET, namespace)
    state = namespace[factory](**options).state_dict()
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.rand(value.shape, generator=generator) if value.is_floating_point() else value + 7
        for name, value in state.items()
    }


def save_state(arch: str, state: dict) -> Path:
    path = Path(arch).with_name("w.pt")
    torch.save(state, path)
    return path


def assert_loaded(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_every_weight_and_buffer_is_loaded(arch):
    state = state_of(arch)
    loaded = load_model(save_state(arch, {"state_dict": state}), f"{arch}:Net")
    assert_loaded(loaded.module, state)
    assert loaded.notes == ()
    assert not any(module.training for module in loaded.module.modules())
    assert loaded.weights.nested_under == "state_dict"
    assert loaded.architecture.source_path == arch
    assert {n for n, p in loaded.module.named_parameters() if not p.requires_grad} == {"fc.weight"}


def test_safetensors(arch):
    state = state_of(arch)
    path = Path(arch).with_name("w.safetensors")
    save_file(state, path)
    assert_loaded(load_model(path, f"{arch}:Net").module, state)


@pytest.mark.parametrize("prefix", ["model.", "net.backbone."])
def test_a_shared_prefix_of_the_checkpoint_is_taken_off(arch, prefix):
    state = state_of(arch)
    path = save_state(arch, {prefix + name: value for name, value in state.items()})
    loaded = load_model(path, f"{arch}:Net")
    assert_loaded(loaded.module, state)
    assert loaded.notes == (f"the prefix '{prefix}' was taken off all names of the checkpoint",)


def test_a_network_beside_losses_and_averages_is_found(arch):
    state = state_of(arch)
    parts = {"net.": 1, "ema_net.module.": 2}
    saved = {prefix + name: value * k for prefix, k in parts.items() for name, value in state.items()}
    loaded = load_model(save_state(arch, saved | {"criterion.weight": torch.ones(10)}), f"{arch}:Net")
    assert_loaded(loaded.module, state)
    note = "the network was found below 'net.'; what is beside it was left out: criterion, ema_net"
    assert loaded.notes == (note,)


@pytest.mark.parametrize(
    ("prefixes", "more"),
    [
        (("student.", "teacher."), ()),
        (("", "teacher."), ()),
        (("student.", "teacher."), ("student.projection.weight",)),
        (("model.", "swa_model.module."), ("model.auxiliary.weight",)),
    ],
)
def test_a_network_that_is_there_twice_is_not_guessed(arch, prefixes, more):
    state = state_of(arch)
    saved = {prefix + name: value for prefix in prefixes for name, value in state.items()}
    saved |= dict.fromkeys(more, torch.ones(1))
    with pytest.raises(UsageError, match="does not fit"):
        load_model(save_state(arch, saved), f"{arch}:Net")


def test_a_deeper_network_beside_others_is_not_cut(arch):
    state = {f"net.{name}": value for name, value in state_of(arch, depth=4).items()}
    with pytest.raises(UsageError, match="does not fit"):
        load_model(save_state(arch, state | {"criterion.weight": torch.ones(10)}), f"{arch}:Net")


def test_a_shared_prefix_of_the_network_is_put_on(arch):
    state = state_of(arch)
    loaded = load_model(save_state(arch, state), f"{arch}:Wrapped")
    assert_loaded(loaded.module.backbone, state)
    assert loaded.notes == ("the prefix 'backbone.' was put before all names of the checkpoint",)


def test_missing_batch_norm_counters_are_tolerated(arch):
    state = state_of(arch)
    old = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    loaded = load_model(save_state(arch, old), f"{arch}:Net")
    for name, value in loaded.module.state_dict().items():
        if name in old:
            assert torch.equal(value, old[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_become_float32_with_a_note(arch, dtype):
    state = {n: v.to(dtype) if v.is_floating_point() else v for n, v in state_of(arch).items()}
    loaded = load_model(save_state(arch, state), f"{arch}:Net")
    assert loaded.notes == (f"the checkpoint's {str(dtype)[6:]} weights were converted to float32",)
    assert {value.dtype for value in loaded.module.parameters()} == {torch.float32}
    assert torch.equal(loaded.module.fc.bias, state["fc.bias"].float())


def test_a_network_built_in_half_precision_becomes_float32(arch):
    state = state_of(arch)
    assert_loaded(load_model(save_state(arch, state), f"{arch}:half").module, state)


def test_values_that_are_not_finite_are_named(arch):
    state = state_of(arch)
    state["fc.bias"][2] = torch.nan
    state["features.0.1.running_var"][0] = torch.inf
    loaded = load_model(save_state(arch, state), f"{arch}:Net")
    assert loaded.notes == ("the checkpoint has NaN or infinite values in features.0.1.running_var, fc.bias",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 7}, r"2 of another shape .*fc\.weight is 7x4, not 10x4.* --arch '.*:Net\(num_classes=7\)'"),
        ({"inputs": 1}, r"features\.0\.0\.weight is 4x1x3x3, not 4x3x3x3\); the checkpoint takes 1 input channels"),
        ({"width": 5}, "wider or narrower variant"),
        ({"depth": 2}, r"5 missing \(features\.2\.0\.weight, .*shallower variant"),
        ({"depth": 4}, r"6 unexpected \(features\.3\.0\.weight, .*deeper variant"),
    ],
)
def test_variants_are_told_apart(arch, options, message):
    with pytest.raises(UsageError, match=message):
        load_model(save_state(arch, state_of(arch, **options)), f"{arch}:Net")


def test_another_architecture_is_called_so(arch):
    with pytest.raises(UsageError, match=r"0 tensors match.*another architecture"):
        load_model(save_state(arch, state_of(arch, "other")), f"{arch}:Net")


def test_renamed_layers_are_another_version(arch):
    state = state_of(arch)
    state["head.weight"] = state.pop("fc.weight")
    with pytest.raises(UsageError, match=r"1 missing \(fc\.weight\), 1 unexpected \(head\.weight\); some names differ"):
        load_model(save_state(arch, state), f"{arch}:Net")


@pytest.mark.parametrize(("factory", "message"), [("lazy", "lazy parameter 0.weight"), ("meta", "on the meta device")])
def test_networks_without_memory_are_refused(arch, factory, message):
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(save_state(arch, state_of(arch)), f"{arch}:{factory}")


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor.* are deprecated:UserWarning")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.to(torch.complex64), r"fc\.weight in .* is complex"),
        (lambda v: v.to_sparse(), r"fc\.weight in .* is sparse"),
        (lambda v: (v * 127).to(torch.int8), r"has int8 values where the network has floating-point"),
        (lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8), r"fc\.weight in .* is quantized"),
    ],
)
def test_weights_that_are_no_real_floats_are_refused(arch, change, message):
    state = state_of(arch)
    state["fc.weight"] = change(state["fc.weight"])
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(save_state(arch, state), f"{arch}:Net")
