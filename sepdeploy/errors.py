"""The exception tree: every failure that a user can meet is one of these.

    SepdeployError
    +-- UsageError             2   a wrong option, path, shape or file: the user can put it right
    +-- UnsupportedModelError  3   the network does something that sepdeploy cannot handle
    +-- ToolError              4   an outside exporter, runtime, compiler, emulator or board failed
    +-- UntrustedFileError     5   loading the file would run code from inside it
    +-- ContractError         70   a promise of our own code was broken: a bug in sepdeploy

Only `sepdeploy.cli.main` turns them into exit codes. Exit code 1 is not an error: the run finished, but the
network that it made breaks a promise (it is not faster, or it loses more than `--max-drop` allows).
"""

from __future__ import annotations

__all__ = [
    "ContractError",
    "SepdeployError",
    "ToolError",
    "UnsupportedModelError",
    "UntrustedFileError",
    "UsageError",
]


class SepdeployError(Exception):
    """Base of every error that sepdeploy raises on purpose; its text is one sentence for the user."""

    exit_code = 70


class UsageError(SepdeployError):
    """The request cannot be met as given; the message names the value and what to do next."""

    exit_code = 2


class UnsupportedModelError(SepdeployError):
    """The network cannot be traced, converted or exported; the message names the part at fault."""

    exit_code = 3


class ToolError(SepdeployError):
    """An outside tool failed or is not installed.

    Attributes:
        stderr: What the tool printed, for `--debug`; empty when it printed nothing.
    """

    exit_code = 4

    def __init__(self, message: str, *, stderr: str = "") -> None:
        super().__init__(message)
        self.stderr = stderr


class UntrustedFileError(SepdeployError):
    """The file can only be loaded by running code that it carries."""

    exit_code = 5


class ContractError(SepdeployError):
    """A check of our own output failed: a bug in sepdeploy, never the user's fault."""

    exit_code = 70
