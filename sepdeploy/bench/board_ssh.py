"""Boards that OpenSSH reaches: keys only, known hosts only."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sepdeploy.bench.board_run import PYTHON_PROGRAM, BoardOptions, Work, run_on_board
from sepdeploy.bench.outside_programs import find_program, last_line
from sepdeploy.core.readiness import Need
from sepdeploy.core.ssh_address import SCHEME, SshAddress
from sepdeploy.errors import SepdeployError, ToolError, UsageError

__all__ = ["CONFIG_VARIABLE", "PYTHON_VARIABLE", "SshBoard", "ssh_needs"]

PYTHON_VARIABLE = "SEPDEPLOY_BOARD_PYTHON"
"""Names the Python on the board, where the target's name is all that is given."""

CONFIG_VARIABLE = "SEPDEPLOY_SSH_CONFIG"
"""Names a configuration of ssh in the place of the user's."""

# Words that must stay in the command line of ssh whatever the user's configuration says.
_OPTIONS = (
    "BatchMode=yes",
    "PasswordAuthentication=no",
    "KbdInteractiveAuthentication=no",
    "StrictHostKeyChecking=yes",
    "UpdateHostKeys=no",
    "ForwardAgent=no",
    "ForwardX11=no",
    "ClearAllForwardings=yes",
    "PermitLocalCommand=no",
    "RequestTTY=no",
    "EscapeChar=none",
    "RemoteCommand=none",
    "ConnectTimeout=15",
    "ServerAliveInterval=15",
    "ServerAliveCountMax=4",
    "LogLevel=ERROR",
)
_REMOTE_COMMAND = f'exec python3 -c "{PYTHON_PROGRAM}"'
_SSH_FAILED = 255


@dataclass(frozen=True, slots=True)
class SshBoard:
    """A board that ssh reaches; see `Board`.

    Attributes:
        address: Where.
        config: Configuration of ssh to use in the place of the user's; None is the user's.
    """

    address: SshAddress
    config: Path | None = None

    @classmethod
    def of_target(cls, target: str) -> SshBoard:
        """The board of a target, ssh://USER@HOST[:PORT][:ort], with the configuration that the environment names.

        Raises:
            UsageError: if it is no such target.
        """
        config = os.environ.get(CONFIG_VARIABLE)
        return cls(SshAddress.parse(target.removesuffix(":ort")), Path(config) if config else None)

    @property
    def name(self) -> str:
        """As on the command line."""
        return str(self.address)

    def command(self) -> list[str]:
        """The ssh client with its arguments; what it runs there is a constant."""
        path = find_program("ssh")
        if path is None:
            raise ToolError("ssh is not installed; run apt-get install openssh-client")
        config = ["-F", str(self.config.resolve())] if self.config else []
        options = [word for option in _OPTIONS for word in ("-o", option)]
        return [path, "-T", *config, *options, *self.address.arguments(), _REMOTE_COMMAND]

    def explain(self, code: int, errors: str) -> ToolError:
        """What went wrong, from what ssh or the shell there says."""
        problem, advice = self._diagnosis(code, errors)
        return ToolError(f"{self.name}: {problem}{f'; {advice}' if advice else ''}", stderr=errors)

    def _diagnosis(self, code: int, errors: str) -> tuple[str, str]:
        text = errors.lower()
        login = self.address.login()
        key_name = f"[{self.address.host}]:{self.address.port}" if self.address.port else self.address.host
        if "identification has changed" in text or ("host key" in text and "has changed" in text):
            return (
                "its host key is not the one that you know, so it may not be your board",
                f"if it was set up anew, run ssh-keygen -R '{key_name}', then ssh {login} and compare the fingerprint",
            )
        if "host key verification failed" in text or "host key is known" in text:
            return (
                "its host key is not known",
                f"run ssh {login} once, and answer yes if the fingerprint is that of `ssh-keygen -lf "
                "/etc/ssh/ssh_host_ed25519_key.pub` on the board",
            )
        if "permission denied" in text and code == _SSH_FAILED:
            return "it accepts none of your keys", f"run ssh-copy-id {login}"
        if code == _SSH_FAILED:
            return last_line(errors), f"see whether ssh {login} works"
        if code == 127 or "not found" in text:
            return "there is no python3", "run there: apt-get install python3"
        return (
            f"python3 did not start (exit code {code}): {last_line(errors)}",
            f"see whether ssh {login} python3 works",
        )


def ssh_needs(target: str) -> tuple[Need, ...]:
    """The client; for the address of a board, also that it can be reached and what is installed there."""
    board = None if target == f"{SCHEME}*" else SshBoard.of_target(target)
    client = find_program("ssh")
    if client is None:
        return (Need("ssh", problem="ssh is not installed", packages=("openssh-client",)),)
    found = Need("ssh", found=client)
    if board is None:
        return (found,)
    try:
        reply = run_on_board(board, Work("describe"), BoardOptions(60, os.environ.get(PYTHON_VARIABLE) or None))
    except UsageError:
        raise
    except SepdeployError as error:
        problem, _, fix = str(error).removeprefix(f"{board.name}: ").partition("; ")
        return found, Need("the board", problem=problem, fix=fix)
    runtimes = ", ".join(reply.outcome.values())
    python = ".".join(map(str, reply.python))
    where = Need("the board", found=f"{reply.environment['cpu']}, {reply.machine}, Python {python}")
    if not runtimes:
        problem = "neither onnxruntime nor ai-edge-litert is installed there"
        fix = "python3 -m pip install numpy onnxruntime ai-edge-litert   # on the board"
        return found, where, Need("a runtime", problem=problem, fix=fix)
    suffix, package = (".onnx", "onnxruntime") if target.endswith(":ort") else (".tflite", "ai-edge-litert")
    if suffix not in reply.outcome:
        problem = f"{target} needs {package}, not installed there; bench runs files of what is: {runtimes}"
        fix = f"python3 -m pip install numpy {package}   # on the board"
        return found, where, Need("a runtime", problem=problem, fix=fix)
    return found, where, Need("a runtime", found=runtimes)
