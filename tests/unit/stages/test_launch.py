"""One process is the rule; several are told apart by the launcher's variables."""

import pytest
import torch.distributed as dist

from sepdeploy.errors import ToolError
from sepdeploy.stages.launch import (
    LeaderFailedError,
    Processes,
    _is_disconnection,
    joined_processes,
    launched_processes,
)


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


def test_a_follower_has_the_exit_code_of_a_failed_tool():
    assert LeaderFailedError("gone").exit_code == ToolError.exit_code
