"""An architecture from what the user calls it: a function in a module, in a file, or a name of timm."""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from sepdeploy.errors import ToolError, UsageError

__all__ = ["Architecture", "build_architecture", "find_factory", "imported_place", "split_spec"]

# Lazy up to the first colon that a factory follows: a Windows path has one of its own, and so may an argument.
_SPEC = re.compile(r"(?P<place>.+?):(?P<factory>[A-Za-z_]\w*(?:\.\w+)*)\s*(?P<arguments>\(.*\))?", re.DOTALL)

_FORMS = (
    "models.resnet_cifar:resnet20, path/to/file.py:factory, package.module:factory or timm:NAME, "
    "with arguments as in factory(num_classes=10)"
)


@dataclass(frozen=True, slots=True)
class Architecture:
    """A network without its trained weights.

    Attributes:
        spec: As the user gave it.
        module: The network, as the factory built it.
        source_path: The `.py` file of a file spec, as given; None for the others.
        source_sha256: Hash of the module's own file; what it imports is not in it. None for timm.
    """

    spec: str
    module: nn.Module
    source_path: str | None = None
    source_sha256: str | None = None


def build_architecture(spec: str) -> Architecture:
    """Build the network that `spec` names.

    `models.X` means the networks of sepdeploy first and the user's own package `models` after that. Other modules
    are found as Python finds them, the working directory included; a file may import its neighbours. The factory is
    a function, an `nn.Module` class or an `nn.Module` itself.

    Args:
        spec: `PLACE:FACTORY`, with literal keyword arguments in brackets if the factory takes any.

    Raises:
        UsageError: if the spec is malformed, names nothing, or its factory fails or returns no `nn.Module`.
        ToolError: if it needs timm and that cannot be imported.
    """
    place, factory_name, arguments = split_spec(spec)
    if place == "timm":
        return Architecture(spec, _build_timm(spec, factory_name, arguments))
    with imported_place(spec, place) as (module, sha256):
        network = _call(spec, find_factory(module, factory_name, place), arguments)
    return Architecture(spec, network, place if _is_file(place) else None, sha256)


def split_spec(spec: str, expected: str = f"an architecture; give {_FORMS}") -> tuple[str, str, dict[str, Any]]:
    """Place, factory and arguments of a spec; nothing is imported.

    Args:
        spec: As the user gave it.
        expected: What a malformed one is not, and how it is given, for the message.

    Raises:
        UsageError: if it is malformed.

    >>> split_spec("net.py:build(width=2)")
    ('net.py', 'build', {'width': 2})
    """
    match = _SPEC.fullmatch(spec.strip())
    if match is None or "\0" in spec:
        raise UsageError(f"{spec!r} is not {expected}")
    return match["place"], match["factory"], _parse_arguments(spec, match["arguments"] or "()")


@contextmanager
def imported_place(spec: str, place: str) -> Iterator[tuple[ModuleType, str | None]]:
    """The module of a spec and the hash of its file; what it imports later is found as long as the block runs.

    Raises:
        UsageError: if there is no such module, or it fails when imported.
    """
    if _is_file(place):
        path = Path(place).expanduser()
        with _importable(path.parent):
            yield _load_file(path)
        return
    if not all(part.isidentifier() for part in place.split(".")):
        raise UsageError(f"{place!r} in {spec!r} is neither a .py file nor the name of a module")
    with _importable(Path.cwd()):
        module = _import_module(place)
        yield module, _source_sha256(module)


def _is_file(place: str) -> bool:
    return place.lower().endswith(".py")


def _source_sha256(module: ModuleType) -> str | None:
    """Hash of the file that a module came from; None for one without a file."""
    path = Path(getattr(module, "__file__", None) or "")
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _parse_arguments(spec: str, text: str) -> dict[str, Any]:
    """Literal keyword arguments of a call such as "(num_classes=10, width=0.5)"; nothing is evaluated."""
    try:
        call = ast.parse(f"factory{text}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("only keyword arguments are possible")
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        why = "they are nested too deeply" if isinstance(error, RecursionError | MemoryError) else str(error)
        raise UsageError(
            f"the arguments in {spec!r} must be plain values by keyword, as in factory(num_classes=10): {why}"
        ) from None  # Python's parser says MemoryError of what is nested too deeply


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let Python import from `folder` first while the block runs."""
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


def _load_file(path: Path) -> tuple[ModuleType, str]:
    """Run a Python file as a module of a name that no other module has; return it and the hash of what ran."""
    try:
        source = path.read_bytes()
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    sha256 = hashlib.sha256(source).hexdigest()
    location = str(path.resolve())
    name = f"_sepdeploy_arch_{hashlib.sha256(location.encode(errors='surrogateescape')).hexdigest()[:12]}_{sha256[:12]}"
    module = ModuleType(name)
    module.__file__ = location
    sys.modules[name] = module  # dataclasses and pickle look their module up here
    try:
        # Not through a loader: cached bytecode could belong to another version of the file than the one hashed.
        exec(compile(source, location, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:  # the user's code: it may raise anything
        del sys.modules[name]
        raise UsageError(f"{path} fails when imported: {type(error).__name__}: {error}") from error
    return module, sha256


def _import_module(name: str) -> ModuleType:
    candidates = (f"sepdeploy.{name}", name) if name.startswith("models.") else (name,)
    for candidate in candidates:
        try:
            return importlib.import_module(candidate)
        except ModuleNotFoundError as error:
            if f"{candidate}.".startswith(f"{error.name}."):
                continue
            raise UsageError(f"{name} needs {error.name}, which is not installed") from error
        except (Exception, SystemExit) as error:  # the user's code: it may raise anything
            raise UsageError(f"{name} fails when imported: {type(error).__name__}: {error}") from error
    hint = f" or give {name.replace('.', '/')}.py:FACTORY" if Path(f"{name.replace('.', '/')}.py").exists() else ""
    raise UsageError(f"there is no module {name}; run from the folder that it lies in{hint}")


def find_factory(module: ModuleType, name: str, place: str) -> object:
    """What a module calls `name`.

    Raises:
        UsageError: if it has none of that name; the message has names that are close.
    """
    found: object = module
    for part in name.split("."):
        if not hasattr(found, part):
            known = [key for key, value in vars(module).items() if not key.startswith("_") and callable(value)]
            close = difflib.get_close_matches(name, known)
            hint = (
                f"; did you mean {' or '.join(close)}?" if close else f"; it has {', '.join(known[:12]) or 'nothing'}"
            )
            raise UsageError(f"{place} has no {name}{hint}")
        found = getattr(found, part)
    return found


def _call(spec: str, factory: object, arguments: dict[str, Any]) -> nn.Module:
    if isinstance(factory, nn.Module):
        if arguments:
            raise UsageError(f"{spec!r} names a network that is built already and takes no arguments")
        return factory
    if not callable(factory):
        raise UsageError(
            f"{spec!r} names a {type(factory).__name__}; a function, an nn.Module class or object is needed"
        )
    _check_arguments(spec, factory, arguments)
    try:
        network = factory(**arguments)
    except (Exception, SystemExit) as error:  # the user's code: it may raise anything
        raise UsageError(f"{spec!r} fails: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise UsageError(f"{spec!r} returns a {type(network).__name__}; it must return an nn.Module")
    return network


def _check_arguments(spec: str, factory: Callable[..., object], arguments: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        return  # some callables do not tell; the call will
    try:
        signature.bind(**arguments)
    except TypeError as error:
        name = spec.strip().partition("(")[0]
        raise UsageError(
            f"{spec!r}: {error}; the factory takes {signature}: give its arguments as in {name}(name=value)"
        ) from error


def _build_timm(spec: str, name: str, arguments: dict[str, Any]) -> nn.Module:
    if "pretrained" in arguments:
        raise UsageError(f"{spec!r}: the weights come from the model file, so pretrained is not an argument")
    try:
        timm = importlib.import_module("timm")
    except ModuleNotFoundError as error:
        missing = error.name or "timm"
        raise ToolError(f"{spec!r} needs {missing}, which is not installed: pip install 'sepdeploy[timm]'") from error
    except Exception as error:  # timm imports torchvision, which raises RuntimeError where it does not fit torch
        raise ToolError(
            f"timm cannot be imported ({type(error).__name__}: {error}); install a torchvision that fits your torch, "
            "then pip install 'sepdeploy[timm]'"
        ) from error
    known: list[str] = timm.list_models()
    if name.partition(".")[0] not in known:
        close = difflib.get_close_matches(name, known)
        raise UsageError(f"timm has no model {name}" + (f"; did you mean {' or '.join(close)}?" if close else ""))
    try:
        network = timm.create_model(name, pretrained=False, **arguments)
    except Exception as error:  # another library's code, called with the user's arguments
        raise UsageError(f"{spec!r} fails: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise UsageError(f"{spec!r} returns a {type(network).__name__}; it must return an nn.Module")
    return network
