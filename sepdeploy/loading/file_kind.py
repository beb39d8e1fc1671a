"""What a model file is, told from its bytes before anything loads it."""

from __future__ import annotations

import zipfile
from enum import Enum
from pathlib import Path

from sepdeploy.errors import UntrustedFileError, UsageError

__all__ = ["RESAVE", "FileKind", "identify_file"]

RESAVE = 'torch.save(model.state_dict(), "weights.pt")'
"""What makes a safe file out of a network in memory."""

_LEGACY_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # the number 0x1950a86a20f9469cfc6c that torch.save wrote before 1.6

_EXPECTED = "a PyTorch checkpoint (.pt, .pth, .th) or a .safetensors file with weights is needed"

_MAGIC = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras)"),
    (b"\x93NUMPY", "a numpy array"),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"BZh", "a bzip2 archive: unpack it first"),
    (b"Rar!", "a RAR archive: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (b"GGUF", "a GGUF file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run git lfs pull"),
    (b"<", "a web page or XML: the download probably failed"),
)


class FileKind(Enum):
    """Files that weights can be read from."""

    SAFETENSORS = "safetensors"
    TORCH = "torch"


def identify_file(path: Path) -> FileKind:
    """Tell which kind of weights file lies at `path`.

    Raises:
        UsageError: if there is none, or it is of another kind; the message says of which where it can be told.
        UntrustedFileError: if it is a program (TorchScript, an exported program) or a bare pickle.
    """
    try:
        if path.is_dir():
            raise UsageError(f"{path} is a folder; {_EXPECTED}")
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}; {_EXPECTED}") from error
    except ValueError as error:  # a NUL byte in the name
        raise UsageError(f"cannot read {str(path)!r}: {error}") from error
    if not head:
        raise UsageError(f"{path} is empty; {_EXPECTED}")
    if head.startswith(b"PK\x03\x04"):
        return _identify_zip(path)
    if head[:1] == b"\x80":
        if _LEGACY_MAGIC in head[:32]:
            return FileKind.TORCH
        raise UntrustedFileError(
            f"{path} is a bare Python pickle, and loading it would run code; where the file came from, run {RESAVE} "
            "and give that file"
        )
    if 8 + int.from_bytes(head[:8], "little") <= size_bytes and head[8:9] == b"{":
        return FileKind.SAFETENSORS
    raise UsageError(f"{path} is {_name_other(path, head)}; {_EXPECTED}")


def _identify_zip(path: Path) -> FileKind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UsageError(f"{path} is damaged or incomplete ({error}); copy it again") from error
    inner = _names_inside(names)
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        raise UntrustedFileError(
            f"{path} is a TorchScript program, and loading it may run code; if you trust it, run "
            f'torch.save(torch.jit.load("{path.name}").state_dict(), "weights.pt") and give that file'
        )
    if any(
        name.startswith(("archive_format", "models/", "serialized_exported_program", "opaque_obj", "custom_obj"))
        for name in inner
    ):
        raise UntrustedFileError(
            f"{path} is an exported program (torch.export), and loading it may run code; if you trust it, run "
            f'torch.save(torch.export.load("{path.name}").module().state_dict(), "weights.pt") and give that file'
        )
    if "data.pkl" in inner:
        return FileKind.TORCH
    if any(name.endswith(".npy") for name in names):
        raise UsageError(f"{path} is a numpy .npz file; {_EXPECTED}")
    if "config.json" in inner and any(name.endswith(".h5") for name in names):
        raise UsageError(f"{path} is a Keras file; {_EXPECTED}")
    raise UsageError(f"{path} is a zip archive without PyTorch weights; {_EXPECTED}")


def _names_inside(names: list[str]) -> set[str]:
    """Names of the members below the folder that holds them all, which PyTorch names after the file: it means nothing.

    Without such a folder, as in exported programs of older versions, each name counts as it is and below its folder.
    """
    inner = {name.partition("/")[2] for name in names}
    has_root = len({name.partition("/")[0] for name in names}) == 1 and all("/" in name for name in names)
    return inner if has_root else inner | set(names)


def _name_other(path: Path, head: bytes) -> str:
    if head[4:8] == b"TFL3":
        return "a TFLite file, the result of a conversion and not a source of one"
    # ONNX has no magic number: a protobuf whose first field is the version, followed by a string.
    if (head[:1] == b"\x08" and head[2:3] in (b"\x12", b"\x1a", b"\x3a", b"\x42")) or path.suffix.lower() == ".onnx":
        return "an ONNX file, the result of a conversion and not a source of one"
    return next((what for magic, what in _MAGIC if head.startswith(magic)), "no PyTorch file, or is damaged")
