"""A real sshd on this machine, with one key for each kind of board that it plays."""

from __future__ import annotations

import getpass
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from sepdeploy.bench.arm_root import find_root
from sepdeploy.core.progress import Silent

LIMIT_SECONDS = 20.0

_RUN = 'exec /bin/sh -c "$SSH_ORIGINAL_COMMAND"'

COMMANDS = {
    "native": f"TMPDIR={{tmp}} PATH={{bin}}/bin-native:$PATH {_RUN}",
    "chatty": f"echo Welcome; echo 12; TMPDIR={{tmp}} PATH={{bin}}/bin-native:$PATH {_RUN}",
    "bare": f"TMPDIR={{tmp}} PATH={{bin}}/bin-bare:$PATH {_RUN}",
    "emulated": f"TMPDIR={{tmp}} PATH={{bin}}/bin-emulated:$PATH {_RUN}",
    "pythonless": f"PATH={{bin}}/bin-none {_RUN}",
    "hanging": "sleep 60",
}
"""Boards: with this Python, with a login script that talks, with a Python without packages, in the emulated arm64
root, without a Python, and one that never answers."""


@dataclass(frozen=True)
class SshServer:
    """What a test needs to know.

    Attributes:
        folder: Of keys, configuration and logs.
        port: Where it listens.
        config: Configuration of the client: a host of each name, and '...-unknown' and '...-changed' of it, whose
            host key is not known, or is another.
        boards: Name -> folder in which that board makes its temporary files.
    """

    folder: Path
    port: int
    config: Path
    boards: Mapping[str, Path]

    def left_behind(self, name: str) -> list[str]:
        """Names of what is in the board's folder for temporary files, once it had time to clean up."""
        place = self.boards[name]
        wait_for(lambda: not list(place.iterdir()), fails=False)
        return sorted(path.name for path in place.iterdir())

    def still_running(self, name: str) -> list[str]:
        """Command lines of the board's processes, once they had time to end."""
        wait_for(lambda: not self.processes(name), fails=False)
        return self.processes(name)

    def processes(self, name: str) -> list[str]:
        """Command lines of processes that run in the board's folder for temporary files."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has just ended, or is another user's
                if str((process / "cwd").readlink()).startswith(str(self.boards[name])):
                    found.append((process / "cmdline").read_text())
        return found


def wait_for(condition: Callable[[], object], *, fails: bool = True) -> None:
    """Wait until the condition holds; most of the time it does at once."""
    end = time.monotonic() + LIMIT_SECONDS
    while not condition():
        if time.monotonic() > end:
            assert not fails, "waited in vain"
            return
        time.sleep(0.02)


@contextmanager
def ssh_server(sshd: str, folder: Path, commands: Mapping[str, str]) -> Iterator[SshServer]:
    """A server that knows the keys of some boards, and ends with the block.

    Args:
        sshd: The program.
        folder: Where to put everything.
        commands: Name of a board -> shell command that it runs what was sent with, '{tmp}' for its folder of temporary
            files; what was sent is in $SSH_ORIGINAL_COMMAND.
    """
    boards = {name: folder / f"tmp-{name}" for name in commands}
    for key in ("host", "other-host", "stranger", *commands):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
    keys = []
    for name, command in commands.items():
        boards[name].mkdir()
        quoted = command.replace("{tmp}", str(boards[name])).replace('"', '\\"')
        keys.append(f'command="{quoted}" {(folder / name).with_suffix(".pub").read_text()}')
    (folder / "authorized_keys").write_text("".join(keys))
    port = _free_port()
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\nStrictModes no\nUsePAM no\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
        "KbdInteractiveAuthentication no\nMaxStartups 100\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # it wants this folder, which Debian makes at boot
    host_keys = {"known": "host", "changed": "other-host"}
    for name, key in host_keys.items():
        words = (folder / key).with_suffix(".pub").read_text().split()[:2]
        (folder / f"{name}_hosts").write_text(f"[127.0.0.1]:{port} {' '.join(words)}\n")
    config = folder / "ssh_config"
    config.write_text(_client_config(folder, port, commands))
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([sshd, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log)
        try:
            _await_port(port, server, folder / "log")
            yield SshServer(folder, port, config, boards)
        finally:
            server.terminate()
            server.wait()


def _client_config(folder: Path, port: int, names: Mapping[str, str]) -> str:
    blocks = []
    for name in names:
        for alias, hosts in ((name, "known"), (f"{name}-unknown", "no"), (f"{name}-changed", "changed")):
            blocks.append(
                f"Host {alias}\n  IdentityFile {folder / name}\n  UserKnownHostsFile {folder}/{hosts}_hosts\n"
            )
    return "".join(blocks) + (
        f"Host stranger\n  IdentityFile {folder}/stranger\n  UserKnownHostsFile {folder}/known_hosts\n"
        f"Host *\n  HostName 127.0.0.1\n  Port {port}\n  User {getpass.getuser()}\n  IdentitiesOnly yes\n"
        "  GlobalKnownHostsFile /dev/null\n  IdentityAgent none\n"
    )


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _await_port(port: int, server: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + LIMIT_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.02)
        else:
            return


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="session")
def ssh_boards(program: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    """Boards for every occasion; see `COMMANDS`."""
    program("ssh")
    folder = tmp_path_factory.mktemp("ssh")
    folders = {
        "native": f'exec {sys.executable} "$@"',
        "bare": f'exec {sys.executable} -S "$@"',
        "emulated": None,
        "none": None,
    }
    for name, text in folders.items():
        (folder / f"bin-{name}").mkdir()
        if text is not None:
            wrapper = folder / f"bin-{name}" / "python3"
            wrapper.write_text(f"#!/bin/sh\n{text}\n")
            wrapper.chmod(0o755)
    commands = {name: command.replace("{bin}", str(folder)) for name, command in COMMANDS.items()}
    with ssh_server(program("sshd"), folder, commands) as server:
        yield server


@pytest.fixture(scope="session")
def emulated_board(ssh_boards: SshServer, program: Callable[[str], str]) -> str:
    """Name of the board whose Python is that of the arm64 root, under the emulator."""
    view = find_root(Silent()) / "cortex-a72"
    wrapper = ssh_boards.folder / "bin-emulated" / "python3"
    wrapper.write_text(
        f"#!/bin/sh\nexport PYTHONPATH={view}/opt/site\n"
        f'exec {program("qemu-aarch64")} -cpu cortex-a72 -L {view} {view}/usr/bin/python3.11 "$@"\n'
    )
    wrapper.chmod(0o755)
    return "emulated"
