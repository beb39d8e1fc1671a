"""Open a finished bundle again, to train on from where its conversion left it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sepdeploy.core.codec import read_json
from sepdeploy.core.conv import Trace
from sepdeploy.core.manifest import ArchitectureSource, RunRecord
from sepdeploy.core.options import ConvertOptions, MovedInputs
from sepdeploy.core.plan import Plan
from sepdeploy.core.stage_store import StageStore
from sepdeploy.core.training import TrainOptions
from sepdeploy.data.toml_files import find_file
from sepdeploy.errors import UsageError
from sepdeploy.stages.guard import GuardRecord, guard_files, trace_key
from sepdeploy.stages.load import Inputs

__all__ = [
    "RECORD",
    "absolute_options",
    "open_record",
    "read_conversion",
    "read_plan",
    "require_unchanged",
    "with_training",
]

RECORD = "options.json"
"""What the bundle says of how it was made."""


def absolute_options(options: ConvertOptions, architecture: ArchitectureSource) -> ConvertOptions:
    """The same options from any working directory, without the bundle's own place.

    Names of modules and of files that come with sepdeploy stay as they are.
    """
    return replace(
        options,
        model=options.model.expanduser().resolve(),
        arch=_absolute_spec(options.arch, architecture.path),
        calibration=_absolute(options.calibration),
        validation=None if options.validation is None else _absolute(options.validation),
        preprocess=None if options.preprocess is None else Path(_absolute(str(options.preprocess))),
        train=None if options.train is None else _absolute(options.train),
        finetune_hook=None if options.finetune_hook is None else _absolute_spec(options.finetune_hook),
        output=None,
    )


def with_training(record: RunRecord, train: str | None, training: TrainOptions, hook: str | None) -> RunRecord:
    """The record with another training and no other change."""
    return replace(record, options=replace(record.options, train=train, training=training, finetune_hook=hook))


def open_record(bundle: Path, moved: MovedInputs) -> RunRecord:
    """How a bundle was made, with its inputs where they are now.

    Raises:
        UsageError: if the folder is no bundle that `convert` finished, or one of its inputs is gone.
    """
    path = bundle / RECORD
    if not path.is_file():
        raise UsageError(f"{bundle} is no finished bundle of 'sepdeploy convert': it has no {RECORD}; convert first")
    record = read_json(RunRecord, path)
    options = replace(
        record.options,
        output=bundle,
        model=moved.model or record.options.model,
        arch=moved.arch or record.options.arch,
        calibration=moved.calibration or record.options.calibration,
        validation=moved.validation or record.options.validation,
        preprocess=moved.preprocess or record.options.preprocess,
    )
    for name in ("model", "calibration", "validation", "preprocess"):
        value = getattr(options, name)
        if value is not None and not find_file(Path(value)).exists():
            raise UsageError(f"{value} is gone since {bundle} was made; say with --{name} where it is now")
    place, colon, _ = options.arch.rpartition(".py:")
    if colon and not Path(f"{place}.py").is_file():
        raise UsageError(f"{place}.py is gone since {bundle} was made; say with --arch where it is now")
    return replace(record, options=options)


def require_unchanged(store: StageStore, options: ConvertOptions, inputs: Inputs) -> None:
    """Check that the network is still the one that was converted, and run by the same versions.

    Raises:
        UsageError: if it is not.
    """
    if not store.is_current("trace", trace_key(options, inputs), (store.work / "trace.json",)):
        raise UsageError(
            f"the checkpoint, the architecture's code, the input's shape, or the version of torch or sepdeploy is no "
            f"longer what {store.folder} was made with; run its 'sepdeploy convert' again"
        )


def read_conversion(store: StageStore) -> tuple[Trace, Plan, GuardRecord]:
    """What trace and guard have left; no decision is made again.

    Raises:
        UsageError: if a file is missing or has changed.
    """
    files = guard_files(store.folder)
    if not store.is_intact("guard", files):
        raise UsageError(f"the plan or its weights in {store.folder} have changed; run its 'sepdeploy convert' again")
    return *read_plan(store.folder), read_json(GuardRecord, files[2])


def read_plan(bundle: Path) -> tuple[Trace, Plan]:
    """The trace and the plan of a bundle, unchecked.

    Raises:
        UsageError: if one of them cannot be read.
    """
    return read_json(Trace, bundle / "work" / "trace.json"), read_json(Plan, guard_files(bundle)[0])


def _absolute(path: str) -> str:
    here = Path(path).expanduser()
    return str(here.resolve()) if here.exists() else path


def _absolute_spec(spec: str, path: str | None = None) -> str:
    """'file.py:name' with the file's full path; names of modules as they are."""
    place, colon, name = spec.rpartition(".py:")
    return f"{path or Path(f'{place}.py').expanduser().resolve()}:{name}" if colon else spec
