"""Several processes that train one network together, as `accelerate launch` starts them; the first one leads.

The first process does everything else alone: it alone writes the bundle. The others wait until it tells them to train,
and go when it does. A process that fails just ends: the others notice that its connections are gone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

from sepdeploy.errors import ToolError

__all__ = ["LeaderFailedError", "Processes", "joined_processes", "launched_processes", "leave"]

_PATIENCE = timedelta(days=30)
"""The first process may export and measure for hours while the others wait."""


class LeaderFailedError(ToolError):
    """The first process ended before the others: it has said why, and they have nothing to add."""


def leave(error: LeaderFailedError) -> NoReturn:
    """End this process with the error's exit code at once.

    While Python takes itself down, gloo's threads would now and then find the other end gone and abort the process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(error.exit_code)


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes that train together.

    Attributes:
        rank: Of this one; 0 leads.
        count: Of all.
        group: Connects them; None for one process alone.
    """

    rank: int = 0
    count: int = 1
    group: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this process leads."""
        return self.rank == 0

    def told(self, value: Any) -> Any:
        """What the first process says, for all of them; each waits here for the others.

        Args:
            value: Said by the first process, ignored in the others.
        """
        if self.group is None:
            return value
        import torch.distributed as dist

        said = [value]
        dist.broadcast_object_list(said, src=0, group=self.group)
        dist.barrier(group=self.group)
        return said[0]

    def gathered(self, value: Any) -> list[Any]:
        """What each process says, in the order of their ranks; each waits here for the others."""
        if self.group is None:
            return [value]
        import torch.distributed as dist

        said = [None] * self.count
        dist.all_gather_object(said, value, group=self.group)
        return said


def launched_processes() -> int:
    """How many processes a launcher has started together; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Connect the processes that a launcher started; one without a launcher stands alone.

    Raises:
        LeaderFailedError: in the others, if the first process ends within the block.
        ToolError: in the first, if another one does; in all, if they cannot be connected.
    """
    if launched_processes() == 1:
        yield Processes()
        return
    import torch.distributed as dist
    from accelerate import PartialState

    from sepdeploy.train.processes import trains_on_cpu

    state = PartialState(cpu=trains_on_cpu(), timeout=_PATIENCE)
    if state.num_processes != launched_processes():  # then each would believe that it leads
        raise ToolError(
            f"{launched_processes()} processes were started, but accelerate connects {state.num_processes}; start them "
            "with 'accelerate launch', on CPUs with 'ACCELERATE_USE_CPU=true accelerate launch --multi_gpu'"
        )
    try:
        yield Processes(state.process_index, state.num_processes, dist.new_group(backend="gloo", timeout=_PATIENCE))
    except (RuntimeError, ValueError) as error:
        if not _is_disconnection(error):
            raise
        if state.process_index > 0:
            raise LeaderFailedError("the first process has ended; its own message says why") from error
        raise ToolError(
            f"another of the {state.num_processes} processes has failed; its own message says why", stderr=str(error)
        ) from error


def _is_disconnection(error: Exception) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "closed by peer" in str(error)
