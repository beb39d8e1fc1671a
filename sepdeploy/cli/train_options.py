"""The training as options of the command line, for every command that has it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast, get_args

import click
from click.core import ParameterSource

from sepdeploy.cli.parameters import CommaList
from sepdeploy.core.training import AugmentName, BatchNormMode, OptimizerName, TrainOptions, TrainPrecision

__all__ = ["train_options"]

_T = TypeVar("_T", bound=Callable[..., Any])

_DEFAULTS = TrainOptions()

_PREFIX = "training_"
"""Of the parameters' names in click: a command may have a precision of its own."""

_OPTIONS: dict[str, tuple[str, Any, str | None, str]] = {
    "epochs": ("--epochs", click.IntRange(min=1), "N", "Passes over the images of --train "
               f"(default {_DEFAULTS.epochs})"),
    "batch_size": ("--batch-size", click.IntRange(min=1), "N", "Images per step, over all processes together "
                   f"(default {_DEFAULTS.batch_size})"),
    "optimizer": ("--optimizer", click.Choice(get_args(OptimizerName)), None, f"(default {_DEFAULTS.optimizer})"),
    "learning_rate": ("--learning-rate", click.FloatRange(0, 10, min_open=True, max_open=True), "RATE", "At its "
                      "highest; a cosine brings it down to 0 (default 3e-3 for adamw, 0.05 for sgd)"),
    "weight_decay": ("--weight-decay", click.FloatRange(min=0), "D", "(default 1e-2 for adamw, 5e-4 for sgd)"),
    "ema_decay": ("--ema", click.FloatRange(0, 1, max_open=True), "DECAY", "Keep a moving average of the weights; 0 "
                  f"keeps those of the last step (default {_DEFAULTS.ema_decay})"),
    "precision": ("--train-precision", click.Choice(get_args(TrainPrecision)), None, "Of the activations; auto is half "
                  f"precision on GPUs only (default {_DEFAULTS.precision})"),
    "augment": ("--train-augment", CommaList(("auto", "none", *get_args(AugmentName))), None, "What is done to the "
                f"images: one or more of {', '.join(get_args(AugmentName))}, or none; auto takes what the original "
                "network tolerates (default auto)"),
    "batch_norm": ("--batch-norm", click.Choice(get_args(BatchNormMode)), None, "Whether batch norms adapt to the "
                   f"training images or keep their statistics (default {_DEFAULTS.batch_norm})"),
}  # fmt: skip
"""Field of `TrainOptions` -> flag, type, metavar and help of its option."""

_QAT = "is_quantization_aware"
_QAT_HELP = (
    "After that, train through the rounding of the int8 files (quantization-aware training), a quarter as many epochs "
    "at a thousandth of the rate; the files keep the scales that were trained with."
)

_TRAIN_HELP = (
    "Images to fine-tune on, best with labels: the converted network learns from the original; of a manifest its "
    "calibration split."
)
_HOOK_HELP = (
    "Your own training in place of sepdeploy's, called as FUNCTION(model, teacher, context), returning the model; "
    "context.train has the images of --train."
)


def train_options(command: _T) -> _T:
    """Give a command the options --train, --finetune-hook and everything about fine-tuning.

    The command takes `train`, `finetune_hook` and `training`, a dictionary of the fields of `TrainOptions` that were
    given.
    """

    @functools.wraps(command)
    def collecting(**arguments: Any) -> Any:
        context = click.get_current_context()
        values = {name: arguments.pop(_PREFIX + name) for name in (*_OPTIONS, _QAT)}
        given = {
            name: value
            for name, value in values.items()
            if context.get_parameter_source(_PREFIX + name) is not ParameterSource.DEFAULT
        }
        _require_consistent(given, arguments["train"], arguments["finetune_hook"])
        if "augment" in given:
            given["augment"] = _augmentations(given["augment"])
        return command(training=given, **arguments)

    decorated: Any = collecting
    for name, (flag, kind, metavar, text) in reversed(_OPTIONS.items()):
        decorated = click.option(flag, _PREFIX + name, type=kind, metavar=metavar, help=f"{text}.")(decorated)
    decorated = click.option("--qat", _PREFIX + _QAT, is_flag=True, default=None, help=_QAT_HELP)(decorated)
    decorated = click.option("--finetune-hook", metavar="FILE.py:FUNCTION", help=_HOOK_HELP)(decorated)
    decorated = click.option("--train", metavar="PATH", help=_TRAIN_HELP)(decorated)
    return cast("_T", decorated)


def _require_consistent(given: dict[str, Any], train: str | None, hook: str | None) -> None:
    """Refuse options that nothing would read."""
    if not given:
        return
    first = next(iter(given))
    flag = "--qat" if first == _QAT else _OPTIONS[first][0]
    if hook is not None:
        raise click.UsageError(
            f"{flag} has no effect beside --finetune-hook, which trains in its own way: leave it out"
        )
    if train is None:
        raise click.UsageError(f"{flag} belongs to --train: give both or neither")


def _augmentations(names: tuple[str, ...]) -> tuple[str, ...] | None:
    if len(names) > 1 and {"auto", "none"} & set(names):
        raise click.UsageError("--train-augment auto and none stand alone")
    return {"auto": None, "none": ()}.get(names[0], names)
