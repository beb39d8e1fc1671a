"""Designed networks as bundles: what is written is what comes back."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import sepdeploy
from sepdeploy.core.codec import read_json
from sepdeploy.core.design import DesignOptions, DesignResult
from sepdeploy.core.manifest import Manifest
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.errors import UsageError
from sepdeploy.schemes.module import ChainConv2d

CODE = """
from torch import nn

def net(width=1.0):
    c = int(10 * width)
    return nn.Sequential(
        nn.Conv2d(3, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, c + 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(c + 4), nn.ReLU(), nn.Conv2d(c + 4, c, 3, stride=2),
    )
"""


@pytest.fixture(autouse=True)
def nets(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)


def options(**changes):
    return replace(DesignOptions("nets.py:net", (3, 12, 12), multiplier=1.5), **changes)


@pytest.mark.parametrize("middle", ["linear", "norm", "norm_activation"])
@pytest.mark.parametrize("rounding", ["auto", "uneven", "padded"])
def test_the_bundle_gives_the_network_back(tmp_path, monkeypatch, middle, rounding):
    """With and without biases, which norms have too and which uneven groups keep in several parts."""
    network, result = sepdeploy.design(
        options(output=tmp_path / "out", middle=middle, scheme_options=SchemeOptions(group_rounding=rounding))
    )
    monkeypatch.chdir(tmp_path.parent)
    again = sepdeploy.load(tmp_path / "out")
    assert isinstance(again, nn.Module)
    found = {name: part for name, part in again.named_modules() if isinstance(part, ChainConv2d)}
    assert [part.bias is not None for part in found.values()] == [False, True]
    x = torch.randn(2, 3, 12, 12)
    assert torch.equal(again(x), network.eval()(x))
    again.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in again.parameters())
    manifest = read_json(Manifest, tmp_path / "out" / "manifest.json")
    assert manifest.arch.spec == "nets.py:net(width=1.5)"
    assert (manifest.seed, manifest.model, manifest.input_shape) == (0, "", (1, 3, 12, 12))
    assert read_json(DesignResult, tmp_path / "out" / "design.json") == result


def test_equal_seeds_give_equal_files(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        sepdeploy.design(options(output=tmp_path / name, seed=seed))
    first, same, other = ((tmp_path / name / "model.pt").read_bytes() for name in "abc")
    assert first == same
    assert first != other


def test_a_design_may_be_made_anew_but_nothing_else_is_touched(tmp_path):
    out = tmp_path / "out"
    sepdeploy.design(options(output=out))
    sepdeploy.design(options(output=out, seed=1))
    assert read_json(Manifest, out / "manifest.json").seed == 1
    (out / "report.json").write_text("{}")
    with pytest.raises(UsageError, match=r"out holds a converted network \(report.json\)"):
        sepdeploy.design(options(output=out))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("important")
    with pytest.raises(UsageError, match="holds other files"):
        sepdeploy.design(options(output=tmp_path / "mine"))
    with pytest.raises(UsageError, match="write"):
        sepdeploy.design(options(output=tmp_path / "nets.py"))


def test_nothing_is_written_without_an_output(tmp_path):
    sepdeploy.design(options(output=None))
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".py" and path.name != "__pycache__"] == []


def test_trained_weights_are_not_overwritten(tmp_path):
    out = tmp_path / "out"
    sepdeploy.design(options(output=out))
    sepdeploy.design(options(output=out, seed=1))  # fresh weights may be drawn anew
    network = sepdeploy.load(out)
    torch.save(network.state_dict(), out / "model.pt")
    trained = (out / "model.pt").read_bytes()
    with pytest.raises(UsageError, match="has changed since the design was made, perhaps by training"):
        sepdeploy.design(options(output=out))
    assert (out / "model.pt").read_bytes() == trained
