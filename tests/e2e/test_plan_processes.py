"""`sepdeploy plan` in two real processes, as `accelerate launch` starts them: the same damages as in one."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

NETWORK = """
from torch import nn

def net():
    layers = []
    for inputs, outputs in ((3, 8), (8, 8), (8, 12)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "nets.py").write_text(NETWORK)
    names: dict = {}
    exec(NETWORK, names)
    torch.manual_seed(0)
    network: nn.Module = names["net"]()
    torch.save(network.state_dict(), tmp_path / "net.pt")
    np.savez(tmp_path / "images.npz", images=np.random.default_rng(0).integers(0, 256, (48, 6, 6, 3), np.uint8))
    return tmp_path


def plan(place, output, *launcher, arch="nets.py:net"):
    """The finished process; no prices are measured, for they are nothing to the damages."""
    command = [
        sys.executable, *launcher, "-m", "sepdeploy", "plan", "net.pt", "--arch", arch, "--calibration", "images.npz",
        "--max-drop", "5", "--pricing-time", "1e-9", "--output", output, "--json",
    ]  # fmt: skip
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=240, check=False)


LAUNCHER = (
    # With --cpu, accelerate starts several processes through MPI only; with the variable, the usual way does.
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
)  # fmt: skip


def test_two_processes_measure_the_same_damages_and_the_first_alone_speaks(place):
    alone, together = plan(place, "alone"), plan(place, "together", *LAUNCHER)
    assert alone.returncode == together.returncode == 0, alone.stderr + together.stderr
    data = json.loads(together.stdout)  # one plan, nothing else
    assert data == json.loads((place / "together" / "plan.json").read_text())
    damages = [(place / output / "search" / "work" / "damages.json").read_text() for output in ("alone", "together")]
    assert damages[0] == damages[1]  # to the last bit
    layers = json.loads(damages[0])["damages"]
    assert set(layers) == {"2", "4"}
    assert all(len(forms) > 2 for forms in layers.values())


def test_what_is_wrong_is_said_once(place):
    done = plan(place, "out", *LAUNCHER, arch="nets.py:nothing")
    assert done.returncode != 0
    assert "nets.py has no nothing" in json.loads(done.stdout)["error"]["message"]  # one document
    assert done.stderr.count("sepdeploy: ") == 1
