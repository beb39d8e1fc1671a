"""Damages measured by two real processes, as `accelerate launch` starts them. This file is also what they run."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.planning.choices import propose_choices
from sepdeploy.planning.damage import measure_damages
from sepdeploy.stages.launch import joined_processes

GRID = {
    "depthwise_separable": [SchemeOptions(terms=1), SchemeOptions(terms=2)],
    "optimized_separable": [SchemeOptions()],
}


def table(rank=0, processes=1, gather=None):
    """The damages of a small network, as a list that JSON keeps exactly; and how many forms this process measured."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = []
    for inputs, outputs in ((3, 8), (8, 8), (8, 8), (8, 12)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)).eval()
    images = torch.randn(32, 3, 6, 6)
    trace = trace_network(net, images[:1])

    def fit():
        return iter(images[:16].split(8))

    done = []
    forms = propose_choices(trace, net, lambda _form: ((),), fit, grid=GRID)
    damages = measure_damages(
        net,
        trace,
        forms,
        fit,
        lambda: iter(images[16:].split(8)),
        rank=rank,
        processes=processes,
        gather=gather,
        progress=lambda *counts: done.append(counts),
    )
    return [[*key, value] for key, value in damages.items()], done[-1]


def main(folder):
    with joined_processes() as processes:

        def gather(own):
            parts = [None] * processes.count
            torch.distributed.all_gather_object(parts, own, group=processes.group)
            return parts

        result = table(processes.rank, processes.count, gather)
        (folder / f"{processes.rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


@pytest.fixture
def launched(tmp_path):
    """What each of two processes returned."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # With --cpu, accelerate starts several processes through MPI only; with the variable, the usual way does.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port), __file__, str(tmp_path)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_measure_the_same_table(launched):
    expected, (done, total) = table()
    assert done == total == len(expected) > 5
    (first, (first_done, first_total)), (second, (second_done, second_total)) = launched
    assert first == second == expected  # to the last bit
    assert first_done == first_total
    assert second_done == second_total
    assert first_total + second_total == total
    assert min(first_total, second_total) > 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
