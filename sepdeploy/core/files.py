"""Writing files so that nothing half-written ever has a final name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sepdeploy.errors import UsageError

__all__ = [
    "output_error",
    "remove_temporaries",
    "replacing",
    "sha256_of_bytes",
    "sha256_of_file",
    "write_bytes",
    "write_text",
]

_BLOCK_BYTES = 1 << 20


def sha256_of_bytes(data: bytes) -> str:
    """Hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Hexadecimal SHA-256 of the file at `path`, read as a stream."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):  # hashlib.file_digest is not in the Python 3.10 of many boards
            found.update(block)
    return found.hexdigest()


def output_error(path: Path, error: OSError) -> UsageError:
    """The sentence for an output that cannot be written."""
    reason = error.strerror or str(error)
    return UsageError(f"cannot write {path}: {reason}; free space there or choose another --output")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` and rename it to `path` when the block ends without an error.

    On any error the temporary file is removed and a file that was at `path` stays as it was. The temporary name keeps
    the suffix of `path`, which exporters look at.

    Raises:
        UsageError: if the file cannot be written (no permission, disk full, ...).
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        with suppress(OSError):  # a folder that is none: nothing was written there
            temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Remove what `replacing` left in `folder` when its process was killed; no process may be writing there."""
    for path in folder.glob(".*.tmp*"):
        path.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` as a whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8 as a whole or not at all."""
    write_bytes(path, text.encode())
