"""Frozen dataclasses to JSON and back, validated on the way in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sepdeploy.core.files import write_text
from sepdeploy.errors import ContractError, UsageError

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

__all__ = ["from_json", "read_json", "to_data", "to_json", "write_json"]

T = TypeVar("T")


def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter  # heavy: only when a file is read or written

    return TypeAdapter(kind)


def to_data(value: object) -> Any:
    """The dataclass `value` as dictionaries, lists and scalars that JSON can hold."""
    return _adapter(type(value)).dump_python(value, mode="json")


def to_json(value: object) -> str:
    """The dataclass `value` as indented JSON with a final newline; equal values give equal text.

    Raises:
        ContractError: if it has a NaN or an infinite number, which JSON cannot hold.
    """
    try:
        return json.dumps(to_data(value), indent=1, allow_nan=False) + "\n"
    except ValueError as error:
        raise ContractError(f"a {type(value).__name__} with a number that is not finite cannot be written") from error


def from_json(kind: type[T], text: str | bytes, *, name: str = "the JSON text") -> T:
    """Parse JSON text into the dataclass `kind`.

    Raises:
        UsageError: if the text is no JSON or does not fit `kind`; the message has the place in the text.
    """
    from pydantic import ValidationError

    try:
        value: T = _adapter(kind).validate_json(text)
    except ValidationError as error:
        place, message = _first_fault(error)
        raise UsageError(f"{name} is not a valid {kind.__name__}: at {place}: {message}") from error
    except UsageError as error:  # raised by the dataclasses' own checks
        raise UsageError(f"{name} is not a valid {kind.__name__}: {error}") from error
    return value


def _first_fault(error: ValidationError) -> tuple[str, str]:
    """Place and message of the first fault, passing over the members of a union that the text's `kind` rules out."""
    faults = error.errors(include_url=False)
    ruled_out = [
        fault["loc"][:-1] for fault in faults if fault["type"] == "literal_error" and fault["loc"][-1] == "kind"
    ]
    relevant = [fault for fault in faults if not any(fault["loc"][: len(loc)] == loc for loc in ruled_out)]
    first = (relevant or faults)[0]
    return ".".join(str(part) for part in first["loc"]) or "the top level", first["msg"]


def read_json(kind: type[T], path: Path) -> T:
    """Read the dataclass `kind` from the JSON file at `path`.

    Raises:
        UsageError: if the file cannot be read or does not fit `kind`.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    return from_json(kind, text, name=str(path))


def write_json(path: Path, value: object) -> None:
    """Write the dataclass `value` to `path` as JSON, as a whole or not at all."""
    write_text(path, to_json(value))
