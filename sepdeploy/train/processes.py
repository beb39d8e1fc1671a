"""Where training runs: devices, precision, and the processes that share the work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast,
    parse_flag_from_env,
)
from torch import nn

from sepdeploy.core.training import TrainPrecision
from sepdeploy.errors import UsageError

__all__ = ["ahead", "equalize", "make_accelerator", "shared_batch_size", "trains_on_cpu"]

T = TypeVar("T")

_PATIENCE = timedelta(hours=6)
"""How long processes wait for the first one, which alone hashes the images and writes files."""

_ACCELERATE_NAMES: dict[TrainPrecision, str] = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


def trains_on_cpu() -> bool:
    """Whether training keeps to the CPU: because ACCELERATE_USE_CPU says so, or as one of several without CUDA.

    Unless it is told so, accelerate leaves several processes without CUDA unconnected.
    """
    is_one_of_several = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    return parse_flag_from_env("ACCELERATE_USE_CPU") or (is_one_of_several and not torch.cuda.is_available())


def make_accelerator(precision: TrainPrecision) -> Accelerator:
    """The device of this process and its connection to the others, as `accelerate launch` or nothing has set them up.

    Raises:
        UsageError: if it cannot train in that precision, or the network itself is to be divided.
    """
    on_cpu = trains_on_cpu()
    if precision == "auto":
        has_cuda = torch.cuda.is_available() and not on_cpu
        has_bfloat16 = has_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bfloat16" if has_bfloat16 else "float16" if has_cuda else "float32"
    mixed = _ACCELERATE_NAMES[precision]
    if AcceleratorState._shared_state.get("_mixed_precision", mixed) != mixed:
        AcceleratorState._reset_state()  # of an earlier run in this process; its process group stays
    handlers = [
        DistributedDataParallelKwargs(
            find_unused_parameters=True
        ),  # some weights may be reached by few images, or none
        InitProcessGroupKwargs(timeout=_PATIENCE),
    ]
    try:
        accelerator = Accelerator(cpu=on_cpu, mixed_precision=mixed, kwargs_handlers=handlers)
    except ValueError as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise UsageError(f"cannot train in {precision} here ({reason}); choose --precision float32") from error
    divided = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)
    if accelerator.distributed_type in divided:
        raise UsageError(
            f"fine-tuning divides the images among processes, never the network, so it cannot use "
            f"{accelerator.distributed_type.value}; run 'accelerate config' again without it"
        )
    return accelerator


def shared_batch_size(wanted: int, images: int, processes: int) -> int:
    """Images per step over all processes: `wanted`, or as many as there are if those are fewer.

    Raises:
        UsageError: if the processes cannot share them evenly.
    """
    if wanted % processes:
        raise UsageError(
            f"a batch of {wanted} images cannot be shared evenly by {processes} processes; give a --batch-size that is "
            f"a multiple of {processes}"
        )
    if images < processes:
        raise UsageError(f"{images} images are too few for {processes} processes; start fewer or give more images")
    return min(wanted, images - images % processes)


@torch.no_grad()
def equalize(network: nn.Module) -> None:
    """Give every process the first one's weights and buffers, in place."""
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.copy_(broadcast(tensor.detach().contiguous()))


def ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield what `items` yields, while a thread prepares the next one.

    >>> list(ahead(iter("abc")))
    ['a', 'b', 'c']
    """
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, items, None)
            yield item
