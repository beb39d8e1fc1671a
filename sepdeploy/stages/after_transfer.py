"""What follows the transfer, and in which order: recovery without labels, then the user's training or sepdeploy's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sepdeploy.core.options import ConvertOptions
from sepdeploy.core.progress import Progress
from sepdeploy.stages.load import Inputs
from sepdeploy.stages.recover import Recovered, Recovery
from sepdeploy.train.hooks import FinetuneHook, Hook, hook_of, opened_hook

__all__ = ["given_hook", "recover_without_labels", "require_training", "train_network"]


@contextmanager
def given_hook(function: FinetuneHook | None, spec: str | None) -> Iterator[Hook | None]:
    """The user's training, given as a callable or by name; None if there is none."""
    if function is not None:
        yield hook_of(function)
    elif spec is not None:
        with opened_hook(spec) as hook:
            yield hook
    else:
        yield None


def require_training(options: ConvertOptions, inputs: Inputs, progress: Progress) -> None:
    """See that the training that was asked for will not fail at its last step."""
    if options.training.is_quantization_aware:
        from sepdeploy.stages.quantize_aware import require_simulation

        progress.stage("simulating int8")
        require_simulation(inputs)


def recover_without_labels(
    recovery: Recovery, options: ConvertOptions, transferred: Recovered, *, is_recovering: bool
) -> Recovered:
    """What wins accuracy back without labels; a transfer without data stays without."""
    if options.transfer == "data-free" or not recovery.replaces_anything:
        return transferred
    recalibrated = recovery.recalibrate(transferred)
    return recovery.reconstruct(recalibrated) if is_recovering and options.reconstructs else recalibrated


def train_network(
    recovery: Recovery, inputs: Inputs, before: Recovered, hook: Hook | None, *, is_quantization_aware: bool
) -> Recovered:
    """The user's own training, or else fine-tuning, then through rounding if that is asked for, or nothing."""
    if not recovery.replaces_anything:
        return before
    if hook is not None:
        return recovery.run_hook(before, hook)
    if inputs.train is None:
        return before
    tuned = recovery.finetune(before)
    return recovery.train_for_int8(tuned) if is_quantization_aware else tuned
