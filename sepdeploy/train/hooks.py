"""The user's own training: called with both networks and the images, its result checked before it is believed."""

from __future__ import annotations

import copy
import inspect
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sepdeploy.analyze.trace import output_tensors
from sepdeploy.core.files import sha256_of_bytes, sha256_of_file
from sepdeploy.core.progress import Progress
from sepdeploy.core.quiet import error_summary
from sepdeploy.data.images import ImageSet
from sepdeploy.data.preprocess import Preprocess
from sepdeploy.errors import SepdeployError, UsageError
from sepdeploy.loading.arch import find_factory, imported_place, split_spec
from sepdeploy.loading.mismatch import Mismatch, find_mismatch

__all__ = ["FinetuneContext", "FinetuneHook", "Hook", "hook_of", "opened_hook", "run_hook", "take_weights"]

_FORMS = "path/to/file.py:function or package.module:function, with arguments as in function(epochs=10)"

_NOT_THE_USERS = (str(Path(__file__).parents[1]), sysconfig.get_paths()["stdlib"])
"""Where code lies that no user wrote, besides site-packages."""

_TOLERANCE = 1e-3
"""Largest difference of outputs, relative to the largest, that memory layouts and rounding may make."""


@dataclass(frozen=True, slots=True)
class FinetuneContext:
    """What a training loop needs besides the two networks.

    Attributes:
        train: Images of --train; None without.
        calibration: Three quarters of the calibration images, on which the steps after the transfer were computed;
            without labels if they have none.
        held_out: The other quarter, by which the result is judged, as those steps were; not to be trained on. The
            transfer has used it, too. Fewer than four images are not split.
        preprocess: What turns pixels into inputs; the images above are preprocessed already.
        replaced: Names of the layers that were replaced.
        blocks: Names of modules that both networks have and whose outputs can be compared, for feature distillation.
        seed: Of the training; torch's generators start from it.
        folder: For the hook's own files: checkpoints, logs. It is kept between runs.
        progress: Told what is going on: `stage(text)`, `step(done, total)`.
    """

    train: ImageSet | None
    calibration: ImageSet
    held_out: ImageSet
    preprocess: Preprocess
    replaced: tuple[str, ...]
    blocks: tuple[str, ...]
    seed: int
    folder: Path
    progress: Progress


FinetuneHook = Callable[[nn.Module, nn.Module, FinetuneContext], nn.Module]
"""Takes the converted network (in eval mode, to be trained), the original and the context; returns the trained one."""


@dataclass(frozen=True, slots=True)
class Hook:
    """A training loop of the user.

    Attributes:
        function: The loop.
        name: For messages.
        key: What its result depends on besides networks and images; None if nobody can tell, so that it runs each time.
    """

    function: FinetuneHook
    name: str
    key: dict[str, object] | None


def hook_of(function: FinetuneHook) -> Hook:
    """A Python callable as a hook.

    A function of a module is known by its name and the code in its folder. Closures, decorated functions, lambdas,
    methods and objects depend on more than their source: they have no key.
    """
    name = getattr(function, "__qualname__", type(function).__qualname__)
    is_plain = inspect.isfunction(function) and name.isidentifier()
    is_plain = is_plain and function.__closure__ is None and not hasattr(function, "__wrapped__")
    sha256 = _folder_sha256(inspect.getsourcefile(function)) if is_plain else None
    return Hook(function, name, None if sha256 is None else {"name": name, "sha256": sha256})


def _folder_sha256(source: str | None) -> str | None:
    """Hash of all Python files in the folder of `source`, which may import them; None where there is no such file."""
    if source is None or not Path(source).is_file():
        return None
    files = sorted(path for path in Path(source).parent.glob("*.py") if path.is_file())
    try:
        hashes = [(path.name, sha256_of_file(path)) for path in files]
    except OSError:
        return None
    return sha256_of_bytes(repr(hashes).encode())


@contextmanager
def opened_hook(spec: str) -> Iterator[Hook]:
    """The hook that `--finetune-hook` names; its file may import its neighbours as long as the block runs.

    Args:
        spec: 'file.py:function' or 'package.module:function', with plain arguments in brackets if it takes any more.

    Raises:
        UsageError: if there is no such function, or the file fails when imported.
    """
    place, name, arguments = split_spec(spec, f"a hook; give {_FORMS}")
    with imported_place(spec, place) as (module, own_sha256):
        function = find_factory(module, name, place)
        if not callable(function):
            raise UsageError(f"{spec!r} names a {type(function).__name__}; a function is needed")
        folder = _folder_sha256(getattr(module, "__file__", None))
        key: dict[str, object] = {"name": name, "arguments": repr(arguments), "sha256": own_sha256, "folder": folder}
        yield Hook(partial(function, **arguments) if arguments else function, spec, None if folder is None else key)


def run_hook(hook: Hook, student: nn.Module, teacher: nn.Module, context: FinetuneContext) -> nn.Module:
    """Let the user's loop train a copy of the student.

    Args:
        hook: The loop.
        student: The converted network in eval mode; not changed.
        teacher: The original network in eval mode; not changed.
        context: What the loop is given besides.

    Returns:
        The converted network with the weights that the loop found, in eval mode on the CPU.

    Raises:
        UsageError: if the loop raises anything, or returns something else than the trained network.
    """
    context.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(context.seed)
    frozen = copy.deepcopy(teacher).requires_grad_(False)
    try:
        with torch.enable_grad():
            returned = hook.function(copy.deepcopy(student), frozen, context)
    except SepdeployError:
        raise
    except (Exception, SystemExit) as error:  # the user's code: it may raise anything
        raise UsageError(f"the hook {hook.name} fails{_place_of(error)}: {error_summary(error)}") from error
    if not isinstance(returned, nn.Module):
        raise UsageError(
            f"the hook {hook.name} returned a {type(returned).__name__}; it must return the trained nn.Module"
        )
    example = torch.from_numpy(next(context.held_out.batches(1))[0])
    return take_weights(returned, student, example, f"the network that the hook {hook.name} returned")


def _place_of(error: BaseException) -> str:
    """Where in the hook's file an error came from: that of the outermost code that is neither ours nor installed."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith(_NOT_THE_USERS) and "site-packages" not in f.filename]
    lines = [frame.lineno for frame in own if frame.filename == own[0].filename]
    return f" at {own[0].filename}:{lines[-1]}" if own else ""


def take_weights(
    given: nn.Module | Mapping[str, Tensor], network: nn.Module, example: Tensor, source: str
) -> nn.Module:
    """A copy of the converted network with weights that were trained elsewhere.

    What wraps the network (DataParallel, torch.compile, a Lightning module) is looked through: the weights are those
    whose names and shapes, behind a common prefix, are exactly the converted network's.

    Args:
        given: A network or a state dict; not changed.
        network: The converted network, in eval mode.
        example: Images as it takes them.
        source: What `given` is, for messages.

    Raises:
        UsageError: if a name, shape or type differs, a weight is not finite, or a given network computes something else
            with these weights than the converted one.
    """
    state = given.state_dict() if isinstance(given, nn.Module) else given
    expected = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    prefix = _find_prefix(tensors, expected, source)
    weights = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    for name, value in weights.items():
        if value.is_floating_point() != expected[name].is_floating_point():
            raise UsageError(f"{source} has {value.dtype} values in {name} where {expected[name].dtype} is needed")
        if value.is_floating_point() and not bool(torch.isfinite(value.float()).all()):
            raise UsageError(f"{source} has NaN or infinite values in {name}: the training diverged")
    result = copy.deepcopy(network)
    result.load_state_dict(weights, strict=False)
    if isinstance(given, nn.Module):
        _check_same_function(given.get_submodule(prefix.rstrip(".")), result, example, source)
    return result


def _find_prefix(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> str:
    """The prefix behind which the names and shapes of `expected` stand, and nothing else.

    Raises:
        UsageError: if there is none; names the first difference of the nearest. Or if there are several, with different
            values.
    """
    first = next((name for name in expected if not name.endswith("num_batches_tracked")), "")
    prefixes = dict.fromkeys(["", *(name.removesuffix(first) for name in tensors if name.endswith(f".{first}"))])
    fitting: list[str] = []
    mismatches: list[Mismatch] = []
    for prefix in prefixes:
        behind = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        mismatch = find_mismatch(behind, expected)
        if mismatch is None:
            fitting.append(prefix)
        else:
            mismatches.append(mismatch)
    if fitting:
        different = [p for p in fitting[1:] if not _are_equal_copies(tensors, expected, fitting[0], p)]
        if different:
            names = " and ".join(repr(prefix.rstrip(".")) for prefix in (fitting[0], *different))
            raise UsageError(
                f"{source} holds the converted network more than once, with different weights: as {names}; give the "
                "one that is meant, by itself"
            )
        return fitting[0]
    nearest = max(mismatches, key=lambda mismatch: (mismatch.matching, -len(mismatch.unexpected)))
    raise UsageError(
        f"{source} is not the converted network: {_first_difference(nearest)}; train what sepdeploy.load or the hook "
        "was given, without adding, renaming or folding layers"
    )


def _are_equal_copies(tensors: Mapping[str, Tensor], names: Iterable[str], one: str, other: str) -> bool:
    """Whether the tensors `names` are the same behind both prefixes, apart from counters that nothing depends on."""
    pairs = [
        (tensors[one + name].detach().cpu().double(), tensors[other + name].detach().cpu().double())
        for name in names
        if not name.endswith("num_batches_tracked")
    ]
    return all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in pairs)


def _first_difference(mismatch: Mismatch) -> str:
    if mismatch.missing:
        return f"it has no {mismatch.missing[0]}"
    if mismatch.unexpected:
        return f"it has {mismatch.unexpected[0]}, which that has not"
    name, have, want = mismatch.wrong_shape[0]
    return f"{name} has the shape {have}, not {want}"


@torch.no_grad()
def _check_same_function(given: nn.Module, result: nn.Module, example: Tensor, source: str) -> None:
    """Only weights are taken, so nothing else may have changed: no other activation, no other forward method."""
    try:
        trained = copy.deepcopy(given).cpu().float().eval()
        outputs: list[Any] = [output_tensors(model(example.clone())) for model in (trained, result)]
    except Exception as error:  # the user's code: it may raise anything
        raise UsageError(f"{source} does not run on one image: {error_summary(error)}") from error
    shapes = [[tuple(output.shape) for output in tensors] for tensors in outputs]
    if shapes[0] != shapes[1]:
        raise UsageError(f"{source} returns the shapes {shapes[0]}, not {shapes[1]}")
    for found, wanted in ((f.double(), w.double()) for f, w in zip(*outputs, strict=True) if w.numel()):
        if not float((found - wanted).abs().max()) <= _TOLERANCE * max(float(wanted.abs().max()), 1e-2):
            raise UsageError(
                f"{source} computes something else than the converted network with its weights: only weights can be "
                "taken over, so leave its layers and its forward method as they are"
            )
