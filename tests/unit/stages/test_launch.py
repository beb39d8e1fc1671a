"""One process is the rule; several are told apart by the launcher's variables."""

import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace

import accelerate
import pytest
import torch
import torch.distributed as dist

from sepdeploy.errors import ToolError
from sepdeploy.stages.launch import (
    LeaderFailedError,
    Processes,
    _is_disconnection,
    joined_processes,
    launched_processes,
)
from sepdeploy.train.processes import trains_on_cpu


def test_without_a_launcher_there_is_one_process_that_hears_itself(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")  # of some batch system: no launcher of ours without a rank
    monkeypatch.delenv("RANK", raising=False)
    assert launched_processes() == 1
    with joined_processes() as processes:
        assert processes == Processes(0, 1, None)
        assert processes.is_first
        assert processes.told("word") == "word"
    monkeypatch.setenv("RANK", "0")
    assert launched_processes() == 8


def test_processes_that_are_not_connected_do_not_all_lead(monkeypatch):
    asked = []

    def state(**arguments):
        asked.append(arguments)
        return SimpleNamespace(num_processes=1, process_index=0)

    monkeypatch.setattr(accelerate, "PartialState", state)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    message = "2 processes were started, but accelerate connects 1; start them with 'accelerate launch'"
    with pytest.raises(ToolError, match=message), joined_processes():
        pytest.fail("it believes that it leads")
    assert asked == [{"cpu": True, "timeout": timedelta(days=30)}]


@pytest.mark.parametrize(
    ("has_cuda", "flag", "count", "expected"),
    [(True, None, 2, False), (True, "true", 2, True), (True, "true", 1, True), (False, None, 2, True),
     (False, "false", 2, True), (False, None, 1, False)],
)  # fmt: skip
def test_training_keeps_to_the_cpu_where_it_is_told_to_or_several_have_no_gpu(
    monkeypatch, has_cuda, flag, count, expected
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    for name, value in {"ACCELERATE_USE_CPU": flag, "WORLD_SIZE": str(count), "RANK": "0"}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    assert trains_on_cpu() is expected


def test_errors_of_one_process_pass_through():
    with pytest.raises(ZeroDivisionError), joined_processes():
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (dist.DistNetworkError("no route"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("too many values"), False),
    ],
)
def test_lost_connections_are_told_from_other_errors(error, expected):
    assert _is_disconnection(error) is expected


def test_a_follower_leaves_at_once():
    lines = (
        "import atexit, sys",
        "from sepdeploy.stages.launch import LeaderFailedError, leave",
        "atexit.register(sys.stdout.write, ' and after')",
        "sys.stdout.write('said before')",
        "leave(LeaderFailedError('gone'))",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (ToolError.exit_code, "said before")


def test_a_follower_has_the_exit_code_of_a_failed_tool():
    assert LeaderFailedError("gone").exit_code == ToolError.exit_code
