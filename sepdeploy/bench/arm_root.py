"""What Arm programs are emulated with: tools of the system, the counting plugin, an arm64 root with the runtimes.

Plugin and root are made on first use, in the folder SEPDEPLOY_ARM64_DIR or else in the user's cache directory, by the
files of docker/arm64. Nothing is installed on the system: what is missing there is named with the command for it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType

from sepdeploy.bench.outside_programs import run_program
from sepdeploy.core.files import sha256_of_bytes
from sepdeploy.core.progress import Progress
from sepdeploy.errors import ToolError

__all__ = [
    "INSTALL_TOOLS",
    "TOOLS",
    "arm64_files",
    "arm_folder",
    "find_plugin",
    "find_root",
    "missing_tools",
    "require_tools",
    "root_packages",
    "tool_versions",
]

TOOLS: Mapping[str, str] = MappingProxyType(
    {
        "qemu-aarch64": "qemu-user",
        "llvm-mc-19": "llvm-19",
        "llvm-mca-19": "llvm-19",
        "gcc": "gcc libc6-dev",
        "mmdebstrap": "mmdebstrap",
        "setarch": "util-linux",
        "tar": "tar",
    }
)
"""Program -> Debian package that has it."""

INSTALL_TOOLS = f"apt-get install {' '.join(dict.fromkeys(TOOLS.values()))}"

_FOLDER_VARIABLE = "SEPDEPLOY_ARM64_DIR"
_PACKAGES = ("onnxruntime", "ai-edge-litert", "numpy")
_BUILD_SECONDS = 900


def missing_tools() -> tuple[str, ...]:
    """Programs that are not there."""
    return tuple(tool for tool in TOOLS if shutil.which(tool) is None)


def require_tools() -> None:
    """See that every program is there.

    Raises:
        ToolError: if one is missing, with the command that installs all that is.
    """
    missing = missing_tools()
    if missing:
        packages = " ".join(dict.fromkeys(TOOLS[tool] for tool in missing))
        raise ToolError(
            f"Arm cores are emulated with {', '.join(missing)}, not found here: apt-get install {packages} (Debian 12)"
        )


def arm64_files() -> Path:
    """The folder docker/arm64, wherever it was installed to."""
    return Path(str(files("sepdeploy.docker") / "arm64"))


def arm_folder() -> Path:
    """Where plugin and root are kept."""
    folder = os.environ.get(_FOLDER_VARIABLE)
    if folder:
        return Path(folder)
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("sepdeploy", appauthor=False)) / "arm64"


def find_plugin() -> Path:
    """The counting plugin, compiled if it is not there yet.

    Raises:
        ToolError: if the compiler fails or the file cannot be written.
    """
    sources = [arm64_files() / name for name in ("armcount.c", "a64.h", "qemu-plugin.h")]
    digest = _digest(b"".join(source.read_bytes() for source in sources))
    path = arm_folder() / f"armcount-{digest}.so"
    if path.is_file():
        return path
    with _locked("plugin"), _made(path) as temporary:
        if not path.is_file():
            command = ["gcc", "-std=c11", "-O2", "-fPIC", "-shared", "-o", str(temporary), str(sources[0])]
            _run(command, "the counting plugin cannot be compiled")
    return path


def root_packages() -> tuple[str, ...]:
    """What the root holds besides Debian: the runtimes of this machine in the same versions, as pip has them."""
    packages = []
    for name in _PACKAGES:
        try:
            packages.append(f"{name}=={version(name)}")
        except PackageNotFoundError:  # not here, so no version to agree with
            packages.append(name)
    return tuple(packages)


def find_root(progress: Progress) -> Path:
    """The folder with an arm64 root and a view of it for each core (`link_cores.sh`), made if it is not there yet.

    Raises:
        ToolError: if it cannot be made: no network, no space.
    """
    scripts = [arm64_files() / name for name in ("make_root.sh", "link_cores.sh")]
    recipe = [*scripts, *sorted((arm64_files() / "cpuinfo").iterdir())]
    digest = _digest(b"".join(path.read_bytes() for path in recipe) + " ".join(root_packages()).encode())
    path = arm_folder() / f"arm64-{digest}"
    if path.is_dir():
        return path
    with _locked("root"), _made(path) as temporary:
        if not path.is_dir():
            progress.stage("building the arm64 root, once: 200 MB, about half a minute")
            environment = {**os.environ, "PIP": f"{sys.executable} -m pip"}
            command = ["sh", str(scripts[0]), str(temporary), *root_packages()]
            _run(command, f"the arm64 root cannot be built in {arm_folder()}", environment)
    return path


@cache
def tool_versions() -> dict[str, str]:
    """Versions of what counts and models: QEMU, llvm-mca, the plugin and the program in the guest, by name.

    Raises:
        ToolError: if one does not say.
    """
    first_words = {"qemu": ["qemu-aarch64", "--version"], "llvm-mca": ["llvm-mca-19", "--version"]}
    versions = {}
    for name, command in first_words.items():
        text = _run(command, f"{command[0]} does not run")
        words = [word for word in text.split() if word[:1].isdigit()]
        versions[name] = words[0] if words else "unknown"
    program = arm64_files() / "bench.py"
    return versions | {"plugin": find_plugin().stem, "program": f"bench-{_digest(program.read_bytes())}"}


def _digest(data: bytes) -> str:
    return sha256_of_bytes(data)[:12]


@contextmanager
def _locked(name: str) -> Iterator[None]:
    """Let one process at a time make something."""
    folder = arm_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise ToolError(
            f"cannot write {folder}: {error.strerror or error}; free space there or name another folder in "
            f"{_FOLDER_VARIABLE}"
        ) from error


@contextmanager
def _made(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` for a file or folder that takes its place when all went well."""
    with tempfile.TemporaryDirectory(prefix=".making-", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        if temporary.exists():
            temporary.rename(path)


def _run(command: list[str], failure: str, environment: Mapping[str, str] | None = None) -> str:
    """Output of a program that has to succeed."""
    own = None if environment is None else dict(environment)
    try:
        done = run_program(
            command, limit_seconds=_BUILD_SECONDS, purpose=f"running {Path(command[0]).name}", environment=own
        )
    except ToolError as error:
        raise ToolError(f"{failure}: {error}") from error
    if done.code:
        lines = [line for line in done.errors.splitlines() if line.strip() and not line.startswith("WARNING")]
        reason = lines[-1].strip() if lines else f"exit code {done.code}"
        raise ToolError(f"{failure}: {reason}", stderr=done.errors)
    return done.output
