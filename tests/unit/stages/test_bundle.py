"""Bundles that were moved, edited or made by somebody else."""

import json
import shutil

import pytest
import torch
from torch import nn

from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.codec import write_json
from sepdeploy.core.files import sha256_of_file
from sepdeploy.core.manifest import ArchitectureSource, FileEntry, Manifest
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.errors import UsageError
from sepdeploy.planning.candidates import propose_plan
from sepdeploy.planning.convert import convert_network
from sepdeploy.schemes.module import ChainConv2d
from sepdeploy.stages.bundle import load, read_weights, rebuild, save_weights

CODE = """
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, bias=False))
"""


def build() -> nn.Module:
    names: dict = {}
    exec(CODE, names)
    torch.manual_seed(0)
    return names["net"]().eval()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A bundle with only what `load` reads, and the network that it must give."""
    root = tmp_path_factory.mktemp("bundle")
    (root / "net.py").write_text(CODE)
    folder = root / "demo"
    folder.mkdir()
    net, x = build(), torch.randn(4, 8, 8, 8)
    traced = trace_network(net, x[:1])
    plan = propose_plan(traced, "depthwise_separable", SchemeOptions(terms=1))
    assert len(plan.replaced) == 2
    converted, _ = convert_network(net, traced, plan, lambda: [x], method="data-free")
    write_json(folder / "plan.json", plan)
    save_weights(folder / "model.pt", converted)
    manifest = Manifest(
        version="0", command="", seed=0, model="net.pt", model_sha256="",
        arch=ArchitectureSource("net.py:net", str(root / "net.py"), sha256_of_file(root / "net.py")),
        input_shape=(1, 8, 8, 8), versions={},
        files={n: FileEntry(0, sha256_of_file(folder / n)) for n in ("plan.json", "model.pt")},
    )  # fmt: skip
    write_json(folder / "manifest.json", manifest)
    return folder, converted, x


@pytest.fixture
def bundle(finished, tmp_path):
    """A copy somewhere else."""
    shutil.copytree(finished[0], tmp_path / "moved")
    return tmp_path / "moved"


@torch.no_grad()
def test_loaded_network_computes_the_same_from_anywhere(finished, bundle, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    _, converted, x = finished
    for network in (load(bundle), load("moved")):
        assert not network.training
        assert torch.equal(network(x), converted(x))
        assert sum(isinstance(module, ChainConv2d) for module in network.modules()) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [("manifest.json", "is no finished bundle"), ("plan.json", "plan.json is missing"), ("model.pt", "model.pt is")],
)
def test_missing_files(bundle, name, message):
    (bundle / name).unlink()
    with pytest.raises(UsageError, match=message):
        load(bundle)


@pytest.mark.parametrize("name", ["plan.json", "model.pt"])
def test_edited_files(bundle, name):
    with (bundle / name).open("ab") as file:
        file.write(b"\n")
    with pytest.raises(UsageError, match="not the file that"):
        load(bundle)


def test_damaged_manifest(bundle):
    (bundle / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match="not a valid Manifest"):
        load(bundle)


def edit_arch(bundle, **changes) -> None:
    data = json.loads((bundle / "manifest.json").read_bytes())
    data["arch"].update(changes)
    (bundle / "manifest.json").write_text(json.dumps(data))


def test_architecture_that_is_gone_or_changed(finished, bundle, tmp_path):
    edit_arch(bundle, path=str(tmp_path / "gone.py"))
    with pytest.raises(UsageError, match=r"gone; name it with arch="):
        load(bundle)
    (tmp_path / "gone.py").write_text(CODE + "\n")
    with pytest.raises(UsageError, match="has changed since the bundle was made"):
        load(bundle)
    assert load(bundle, arch=f"{tmp_path / 'gone.py'}:net")


def test_architecture_that_does_not_fit(bundle):
    with pytest.raises(UsageError, match="has no layer '0'"):
        load(bundle, arch="models.digits:digits_cnn")
    with pytest.raises(UsageError, match="do not fit"):
        rebuild(build(), _empty_plan(), {"other.weight": torch.zeros(1)})


def _empty_plan():
    return propose_plan(trace_network(build(), torch.zeros(1, 8, 8, 8)), "dense", SchemeOptions())


def test_equal_weights_give_equal_bytes_whatever_the_file_is_called(tmp_path):
    net = build()
    save_weights(tmp_path / "a.pt", net)
    save_weights(tmp_path / "other_name.pt", net.to(memory_format=torch.channels_last))
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "other_name.pt").read_bytes()


class Wrapped(nn.Module):
    """All names start with `module.`, as if a wrapper had been left on; and there is state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.module = build()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 3}

    def set_extra_state(self, state: object) -> None:
        pass


def test_names_are_kept_as_they_are_and_extra_state_is_left_out(tmp_path):
    network = Wrapped().eval()
    save_weights(tmp_path / "model.pt", network)
    weights = read_weights(tmp_path / "model.pt")
    assert set(weights) == {name for name in network.state_dict() if name != "_extra_state"}
    traced = trace_network(network, torch.randn(1, 8, 8, 8))
    nothing = propose_plan(traced, "dense", SchemeOptions())
    again = rebuild(network, nothing, weights)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04"])
def test_damaged_weights_are_one_sentence(tmp_path, content):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(UsageError, match="convert again"):
        read_weights(tmp_path / "model.pt")
