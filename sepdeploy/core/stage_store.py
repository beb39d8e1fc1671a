"""Stages whose results are files: done once, found again after a kill, done anew when an input changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO

from sepdeploy.core.files import (
    output_error,
    remove_temporaries,
    replacing,
    sha256_of_bytes,
    sha256_of_file,
    write_text,
)
from sepdeploy.errors import UsageError

__all__ = ["StageStore", "locked", "require_usable"]

_WORK = "work"
_RECORD = "stages.json"
_LOCK = "lock"
_ASIDE = "aside"


class StageStore:
    """Remembers which files each stage made from which inputs.

    Args:
        folder: The bundle, held by `locked`; records and intermediate results go to its subfolder `work`.
        on_change: Called before the first file of the bundle changes: what depends on the old files is void.

    Raises:
        UsageError: if the records cannot be written.
    """

    def __init__(self, folder: Path, on_change: Callable[[], None]) -> None:
        self.folder = folder
        self.work = folder / _WORK
        self._on_change: Callable[[], None] | None = on_change
        self._records = _read_records(self.work / _RECORD)
        self._ran: set[str] = set()
        self._write()

    def before_change(self) -> None:
        """Every stage calls this once its result is ready, right before it replaces a file outside of `work`.

        So a run that fails before that leaves a finished bundle as it was.
        """
        if self._on_change:
            self._on_change()
            self._on_change = None

    def run(self, name: str, inputs: Mapping[str, object], files: tuple[Path, ...], make: Callable[[], None]) -> bool:
        """Run the stage `make` unless its `files` are there, made by it from the same `inputs`.

        Args:
            name: The stage.
            inputs: Everything that the result depends on, as JSON data.
            files: What `make` writes.
            make: Writes the files, each as a whole under another name that it then changes (`replacing`): never in
                place, for what was set aside may be the same file.

        Returns:
            Whether the stage ran.
        """
        if self.is_current(name, inputs, files):
            return False
        self._records.pop(name, None)
        make()
        self._ran.add(name)
        self._records[name] = {"key": _key(inputs), "files": self._hashes(files)}
        self._write()
        return True

    def is_current(self, name: str, inputs: Mapping[str, object], files: tuple[Path, ...]) -> bool:
        """Whether the stage need not run: its `files` are there, made by it from the same `inputs`."""
        record = self._records.get(name)
        return record is not None and record.get("key") == _key(inputs) and record.get("files") == self._hashes(files)

    def is_intact(self, name: str, files: tuple[Path, ...]) -> bool:
        """Whether `files` are as the stage left them, whatever its inputs are now."""
        record = self._records.get(name)
        return record is not None and record.get("files") == self._hashes(files)

    def has_run(self, name: str) -> bool:
        """Whether the stage ran since this store was opened, and not only in an earlier process."""
        return name in self._ran

    def forget(self, name: str) -> None:
        """Let the stage run once more; its files stay until it has replaced them."""
        self._records.pop(name, None)

    def set_aside(self) -> None:
        """Remember what the stages have made up to now, for `bring_back`; it takes no space until it changes."""
        self.forget_aside()
        for name in self._files():
            _link(self.folder / name, self._aside / name)
        write_text(self._aside / _RECORD, json.dumps(self._records))

    def bring_back(self) -> None:
        """Undo what changed since `set_aside`; where that was lost, the stages make it anew."""
        records = _read_records(self._aside / _RECORD)
        if not records:
            return
        self.before_change()
        self._records = records
        for name in self._files():
            _link(self._aside / name, self.folder / name)
        self._write()

    def forget_aside(self) -> None:
        """Remove what was set aside; what cannot be removed is in nobody's way."""
        with suppress(OSError):
            (self._aside / _RECORD).unlink()
        shutil.rmtree(self._aside, ignore_errors=True)

    @property
    def _aside(self) -> Path:
        return self.work / _ASIDE

    def _files(self) -> Iterator[PurePosixPath]:
        """Everything that the stages made, relative to the bundle; records that point elsewhere are not followed."""
        for record in self._records.values():
            files = record.get("files")
            names = (PurePosixPath(name) for name in (files if isinstance(files, dict) else ()))
            yield from (name for name in names if not name.is_absolute() and ".." not in name.parts)

    def _hashes(self, files: tuple[Path, ...]) -> dict[str, str | None]:
        return {
            file.relative_to(self.folder).as_posix(): sha256_of_file(file) if file.is_file() else None for file in files
        }

    def _write(self) -> None:
        write_text(self.work / _RECORD, json.dumps(self._records, indent=1) + "\n")


def _read_records(path: Path) -> dict[str, dict[str, object]]:
    """Stage -> what is known about it; nothing where the file is missing or cut off."""
    try:
        data = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return {k: v for k, v in data.items() if isinstance(v, dict)} if isinstance(data, dict) else {}


def _link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy where the file system has no links; a missing one stays so."""
    if not source.is_file():
        return
    with replacing(target) as temporary:
        try:
            temporary.hardlink_to(source)
        except OSError:
            shutil.copyfile(source, temporary)


def _key(inputs: Mapping[str, object]) -> str:
    return sha256_of_bytes(json.dumps(inputs, sort_keys=True).encode())


def require_usable(folder: Path) -> None:
    """Check that a bundle may go to `folder`: it is new, empty, or a bundle, finished or not.

    Raises:
        UsageError: if it is a file, holds other files or cannot be read.
    """
    try:
        if not folder.exists():
            return
        names = {entry.name for entry in folder.iterdir()}
        is_bundle = (folder / _WORK / _LOCK).is_file() or not names - {_WORK}
    except OSError as error:
        raise output_error(folder, error) from error
    if not is_bundle:
        raise UsageError(f"{folder} holds other files; choose another --output or empty it first")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the bundle `folder` for this process alone; the lock ends with the process, however it ends.

    Temporary files that a killed run left in it are removed.

    Raises:
        UsageError: if another process holds it, it holds other files, or it cannot be written.
    """
    require_usable(folder)
    work = folder / _WORK
    try:
        work.mkdir(parents=True, exist_ok=True)
        file = (work / _LOCK).open("w")
    except OSError as error:
        raise output_error(folder, error) from error
    with file:
        try:
            _lock(file)
        except OSError as error:
            raise UsageError(f"another run is writing to {folder}; wait for it or choose another --output") from error
        for path in (
            folder,
            folder / "original",
            *(work / part for part in ("", "quality", "int8", "finetune", "finetune_int8", "hook", "numerics")),
        ):
            remove_temporaries(path)
        yield


def _lock(file: IO[str]) -> None:
    try:
        import fcntl
    except ImportError:  # no such locks on Windows: two runs into one folder are then the user's own care
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
