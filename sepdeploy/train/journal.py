"""The record of a training run: a line of JSON per epoch, and TensorBoard events where that is installed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from sepdeploy.core.files import write_text
from sepdeploy.core.training import EpochMetrics

__all__ = ["Journal"]


class Journal:
    """Writes the metrics of each epoch as soon as it is over.

    Args:
        folder: Gets `metrics.jsonl` and, with TensorBoard, the events in `tensorboard/`.
        done: Epochs of an earlier process whose checkpoint this run goes on from; later ones are forgotten.
    """

    def __init__(self, folder: Path, done: Sequence[EpochMetrics]) -> None:
        self._path = folder / "metrics.jsonl"
        self._epochs = list(done)
        self._write()
        self._events = _open_events(folder / "tensorboard", first_epoch=len(done) + 1)

    def add(self, metrics: EpochMetrics) -> None:
        """Record one more epoch.

        Raises:
            UsageError: if the file cannot be written.
        """
        self._epochs.append(metrics)
        self._write()
        if self._events is not None:
            for field in fields(metrics):
                value = getattr(metrics, field.name)
                if field.name != "epoch" and value is not None:
                    self._events.add_scalar(f"fine-tuning/{field.name}", value, metrics.epoch)
            self._events.flush()

    def close(self) -> None:
        """Finish the events."""
        if self._events is not None:
            self._events.close()

    def _write(self) -> None:
        write_text(self._path, "".join(json.dumps(asdict(metrics)) + "\n" for metrics in self._epochs))


def _open_events(folder: Path, first_epoch: int) -> Any:
    """A TensorBoard writer that takes the place of events from `first_epoch` on; None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=first_epoch)
