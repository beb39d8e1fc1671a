"""Design from scratch at the command line, on the networks that come with sepdeploy."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sepdeploy
from sepdeploy.cli.main import run
from sepdeploy.errors import UsageError

ROOT = Path(__file__).parents[2]
RESNET = ["--arch", "models.resnet_cifar:resnet20", "--input-shape", "3,32,32"]


def output_of(capfd, *arguments) -> str:
    assert run(list(arguments)) == 0
    out, err = capfd.readouterr()
    assert err == ""
    return out


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_command_of_the_readme_style(capfd, tmp_path):
    out = output_of(
        capfd, "design", *RESNET, "--scheme", "depthwise_separable", "--middle", "norm", "--match", "macs",
        "--output", "d-resnet20",
    )  # fmt: skip
    assert "d-resnet20_m2.75" in out
    assert "18 of 19" in out
    assert "bundle: d-resnet20" in out
    network = sepdeploy.load("d-resnet20")
    assert sum(parameter.numel() for parameter in network.parameters()) == 250194  # printed as 0.250 M
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in network.modules()) == 19 + 18


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"kernel_size": 0}, "kernel_size must be K or"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size must be K or"),
        ({"kernel_size": 3, "middle": "bn"}, "there is no middle 'bn'; choose one of linear, norm"),
        ({"kernel_size": 3, "activation": "gelu"}, "there is no activation 'gelu'; choose one of relu"),
        ({"kernel_size": 1, "scheme": "depthwise_separable"}, "keep nn.Conv2d there"),
    ],
)
def test_arguments_that_a_separable_convolution_refuses(arguments, part):
    with pytest.raises(UsageError, match=part):
        sepdeploy.SeparableConv2d(16, 16, **arguments)


def test_a_designed_network_trains_from_its_bundle():
    network, _ = sepdeploy.design(
        sepdeploy.DesignOptions("models.digits:digits_cnn", (1, 16, 16), multiplier=1.0, output=Path("o-digits"))
    )
    again = sepdeploy.load("o-digits").train()
    torch.manual_seed(0)
    x, labels = torch.randn(64, 1, 16, 16), torch.arange(64) % 10
    optimizer = torch.optim.Adam(again.parameters(), 0.01)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(again(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert len(list(network.parameters())) == len(list(again.parameters()))


def test_several_schemes_at_one_width(capfd):
    results = json.loads(output_of(capfd, "design", *RESNET, "--scheme", "all", "--multiplier", "2", "--json"))
    by_name = {result["name"]: result for result in results}
    assert {"o-resnet20_m2", "d-resnet20_m2", "s-resnet20_m2", "so-resnet20_m2", "dw-resnet20_m2"} < set(by_name)
    original = {"macs": 40551040, "params": 269722, "convs": 19}
    assert all(result["original"] == original for result in results)
    params = [by_name[f"{prefix}-resnet20_m2"]["variant"]["params"] for prefix in ("dw", "o", "d", "s")]
    assert params == sorted(params)
    blind = {name for name, result in by_name.items() if not result["keeps_receptive_field"]}
    assert blind == {"dw-resnet20_m2", "grouped-resnet20_m2"}


def test_a_scheme_that_replaces_nothing_is_noted_beside_the_others(capfd, tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def build(width=1.0):\n"
        "    return nn.Sequential(\n"
        "        nn.Conv2d(3, 16, 3), nn.Conv2d(16, int(16 * width), 1), nn.Conv2d(int(16 * width), 16, 1))\n"
    )
    network = ["design", "--arch", "net.py:build", "--input-shape", "3,8,8", "--replace-pointwise", "--multiplier", "2"]
    assert run([*network, "--scheme", "depthwise,low_rank"]) == 0
    out, err = capfd.readouterr()
    assert "low_rank-build_m2" in out
    assert "note: depthwise replaces no convolution of net.py:build" in out
    assert err == ""
    assert run([*network, "--scheme", "depthwise,spatial_separable"]) == 2
    assert "depthwise replaces no convolution" in capfd.readouterr().err


def test_help_and_the_list_of_schemes_need_no_torch():
    code = (
        "import sys, sepdeploy.cli.main as m\n"
        "codes = [m.run(a) for a in (['design', '--help'], ['inspect', '--help'], ['schemes'], ['schemes', '-h'])]\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "assert codes == [0] * 4 and not heavy, (codes, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_schemes_prints_both_tables(capfd):
    text = output_of(capfd, "schemes", "--channels", "32")
    assert "--kernel-position" in text
    assert "32 to 32 channels, 3x3, 32x32 pixels" in text
    rows = json.loads(output_of(capfd, "schemes", "--channels", "32", "--json"))
    assert next(row for row in rows if row["name"] == "depthwise_separable")["params"] == 32 * (32 + 9)


def test_inspect_shows_the_schemes_that_are_asked_for(capfd):
    checkpoint = str(ROOT / "models" / "digits.pt")
    arguments = ["inspect", checkpoint, "--arch", "models.digits:digits_cnn", "--input-shape", "1,16,16"]
    text = output_of(capfd, *arguments)
    assert max(map(len, text.splitlines())) <= 100
    assert "o- is optimized separable" in " ".join(text.split())
    totals = next(line for line in text.splitlines() if line.strip().startswith("whole"))
    assert len([cell for cell in totals.split() if cell.endswith("x")]) == 4
    data = json.loads(output_of(capfd, *arguments, "--scheme", "grouped,spatial_optimized", "--groups", "2", "--json"))
    names = {tuple(offers) for offers in data["candidates"].values()}
    assert names == {("grouped", "spatial_optimized")}
