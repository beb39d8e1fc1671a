"""Two real processes on the CPU, as `accelerate launch` starts them, against one. This file is also what they run."""

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sepdeploy.core.progress import Silent
from sepdeploy.core.training import TrainOptions
from sepdeploy.data.images import open_images
from sepdeploy.data.preprocess import Preprocess
from sepdeploy.errors import UsageError
from sepdeploy.train import finetune as finetune_module
from sepdeploy.train.processes import shared_batch_size


class Net(nn.Module):
    """Class scores, or outputs of several scales; one layer is never used."""

    def __init__(self, has_scores):
        super().__init__()
        self.a, self.norm, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.linear, self.unused, self.has_scores = nn.Linear(8, 4), nn.Linear(2, 2), has_scores

    def forward(self, x):
        maps = self.relu(self.norm(self.a(x)))
        scores = self.linear(maps.mean((2, 3)))
        return scores if self.has_scores else {"map": 100 * maps, "far": [7 + scores]}


PREPROCESS = Preprocess(mean=(0.2,), std=(0.1,))
CASES = {
    "frozen": (True, TrainOptions(3, 16, batch_norm="frozen", augment=None)),
    "several": (False, TrainOptions(3, 16, "sgd", batch_norm="frozen", augment=("flip", "shift", "zoom", "color"))),
    "train": (True, TrainOptions(3, 16, batch_norm="train", augment=("flip",))),
    "killed": (True, TrainOptions(3, 16, batch_norm="train", augment=("flip",))),
}


def teacher_of(has_scores):
    torch.manual_seed(0)
    teacher = Net(has_scores).eval()
    nn.init.normal_(teacher.linear.weight, std=5)
    return teacher


def run_case(name, folder, place):
    """Weights and metrics; of 55 images 48 fill batches, and 21 held-out ones are shared unevenly."""
    has_scores, options = CASES[name]
    teacher = teacher_of(has_scores)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.a.weight += 0.1 * torch.randn(student.a.weight.shape)
    images, held_out = (
        open_images(str(folder / f"{part}.npz"), role="validation", preprocess=PREPROCESS)
        for part in ("train", "held_out")
    )
    network, step, history = finetune_module.finetune(
        student, teacher, images, held_out, options, features=("norm",), folder=folder / place, progress=Silent()
    )
    return {
        "weights": network.state_dict(),
        "losses": [metrics.loss for metrics in history],
        "damages": [step.damage_before, *(metrics.held_out_damage for metrics in history)],
        "accuracies": [metrics.held_out_accuracy_ratio for metrics in history],
        "is_kept": step.is_kept,
        "detail": step.detail,
    }


def main(folder):
    rank = int(os.environ["RANK"])
    for name in ("frozen", "several", "train"):
        torch.save(run_case(name, folder, f"{name} of two"), folder / f"{name}{rank}.pt")

    original = finetune_module._Run.train_epoch

    def stop_in_the_second(self):
        if len(self.history) == 1:
            raise KeyboardInterrupt
        return original(self)

    finetune_module._Run.train_epoch = stop_in_the_second
    with pytest.raises(KeyboardInterrupt):
        run_case("killed", folder, "killed")
    finetune_module._Run.train_epoch = original
    torch.save(run_case("killed", folder, "killed"), folder / f"killed{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """case -> (of one process, of the first of two, of the second)."""
    folder = tmp_path_factory.mktemp("processes")
    generator = np.random.default_rng(0)
    for part, count in (("train", 55), ("held_out", 21)):
        pixels = generator.integers(0, 256, (count, 8, 8, 3)) * generator.random((count, 1, 1, 3))
        pixels = pixels.astype(np.uint8)
        with torch.no_grad():
            labels = teacher_of(True)(torch.from_numpy(PREPROCESS.to_input(pixels))).argmax(1).numpy()
        labels = np.where(np.arange(count) % 4 == 0, 0, labels)  # mostly right, so that they count
        np.savez(folder / f"{part}.npz", images=pixels, labels=labels)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # With --cpu, accelerate starts several processes through MPI only; with the variable, the usual way does.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port), __file__, str(folder)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(launch, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as two:
        one = {name: run_case(name, folder, f"{name} of one") for name in ("frozen", "several", "train")}
        try:
            output, _ = two.communicate(timeout=240)
        finally:
            two.terminate()
    assert two.returncode == 0, output
    one["killed"] = one["train"]
    return {name: (one[name], *(torch.load(folder / f"{name}{rank}.pt") for rank in (0, 1))) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_all_processes_return_the_same(name, results):
    _, first, second = results[name]
    assert first["is_kept"]
    assert first["losses"] == second["losses"]
    assert first["damages"] == second["damages"]
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key]), key


@pytest.mark.parametrize("name", ["frozen", "several"])
def test_two_processes_train_as_one_does(name, results):
    one, two, _ = results[name]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["damages"] == pytest.approx(one["damages"], rel=1e-4)
    assert two["accuracies"] == one["accuracies"]
    assert (None in one["accuracies"]) == (name == "several")
    assert two["detail"] == one["detail"]
    for key, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_statistics_of_batch_norms_are_each_process_s_own_on_cpus(results):
    one, two, _ = results["train"]
    assert two["losses"] == pytest.approx(one["losses"], rel=0.5)
    assert two["losses"] != pytest.approx(one["losses"], rel=1e-5)


def test_two_killed_processes_go_on_as_if_nothing_had_happened(results):
    _, whole, _ = results["train"]
    _, killed, _ = results["killed"]
    assert killed["losses"] == whole["losses"]
    for key, value in whole["weights"].items():
        assert torch.equal(killed["weights"][key], value), key


def test_batches_that_cannot_be_shared_are_refused():
    assert shared_batch_size(128, 1000, 4) == 128
    assert shared_batch_size(128, 31, 4) == 28
    assert shared_batch_size(128, 31, 1) == 31
    with pytest.raises(UsageError, match="128 images cannot be shared evenly by 3 processes; give a --batch-size that"):
        shared_batch_size(128, 1000, 3)
    with pytest.raises(UsageError, match="3 images are too few for 4 processes"):
        shared_batch_size(128, 3, 4)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
