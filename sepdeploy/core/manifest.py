"""What a bundle is made of and how it came about: enough to check it, load it, and repeat the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sepdeploy.core.looser_plan import LooserPlan
from sepdeploy.core.options import ConvertOptions

__all__ = ["ArchitectureSource", "FileEntry", "Manifest", "RunRecord"]


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of the bundle.

    Attributes:
        size_bytes: Its size.
        sha256: Hash of its bytes, in hexadecimal.
    """

    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ArchitectureSource:
    """Where the network's Python code is.

    Attributes:
        spec: As given with --arch.
        path: The file of a `file.py:factory` spec, absolute; None for importable modules.
        sha256: Hash of the file that the factory is in, when the bundle was made; None if there is no such file.
    """

    spec: str
    path: str | None
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Manifest:
    """The bundle's table of contents, written last: a bundle without one is unfinished.

    Attributes:
        version: Version of sepdeploy.
        command: The command line.
        seed: Seed of the run.
        model: The checkpoint, as given.
        model_sha256: Hash of the checkpoint file.
        arch: The architecture.
        input_shape: Of the network's input, (1, C, H, W) or (1, H, W, C).
        versions: Package -> version of everything that had a hand in the files.
        files: Path in the bundle -> size and hash.
    """

    version: str
    command: str
    seed: int
    model: str
    model_sha256: str
    arch: ArchitectureSource
    input_shape: tuple[int, ...]
    versions: dict[str, str]
    files: dict[str, FileEntry]
    format_version: Literal[1] = 1


@dataclass(frozen=True, slots=True)
class RunRecord:
    """How the bundle was made, so that its training can be continued: options.json.

    Attributes:
        options: What `convert` was told, paths absolute and without the bundle's own; training as it was told last.
        untrained: The network before any training: its file in work/, without suffix.
        is_adopted: Whether weights from elsewhere took its place.
        looser_plan: What became of the cheaper plan that recovery left room for; None where none was tried.
    """

    options: ConvertOptions
    untrained: str
    is_adopted: bool = False
    looser_plan: LooserPlan | None = None
    format_version: Literal[1] = 1

    @property
    def start(self) -> str:
        """The network that training starts from, likewise."""
        return "adopted" if self.is_adopted else self.untrained
