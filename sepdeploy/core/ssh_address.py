"""Addresses of boards: nothing passes that ssh, or a shell that it starts, could take for an option or a command."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sepdeploy.errors import UsageError

__all__ = ["SCHEME", "SshAddress"]

SCHEME = "ssh://"

_ADDRESS = re.compile(
    r"(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9_.-]*)@)?"
    r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+(?:%[A-Za-z0-9_.-]+)?)\]|(?P<host>[A-Za-z0-9_][A-Za-z0-9_.-]*))"
    r"(?::(?P<port>[0-9]{1,5}))?/?"
)


@dataclass(frozen=True, slots=True)
class SshAddress:
    """Where a board is.

    Attributes:
        host: Name or address, or an alias from the configuration of ssh.
        user: None is what ssh takes by itself.
        port: None is what ssh takes by itself.
    """

    host: str
    user: str | None = None
    port: int | None = None

    @classmethod
    def parse(cls, target: str) -> SshAddress:
        """Read 'ssh://user@host:port'.

        Nothing passes that ssh, or a shell that it starts, could take for an option or a command.

        Raises:
            UsageError: if it is no such address.

        >>> SshAddress.parse("ssh://pi@raspberrypi.local:2222")
        SshAddress(host='raspberrypi.local', user='pi', port=2222)
        """
        found = _ADDRESS.fullmatch(target.removeprefix(SCHEME)) if target.startswith(SCHEME) else None
        port = int(found["port"]) if found and found["port"] else None
        if found is None or (port is not None and not 1 <= port <= 65535):
            raise UsageError(
                f"{target!r} is no board: give ssh://user@host or ssh://user@host:port, with letters, digits, dots, "
                "hyphens and underscores, and an IPv6 address in brackets"
            )
        return cls(found["ipv6"] or found["host"], found["user"], port)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        user = f"{self.user}@" if self.user else ""
        return f"{SCHEME}{user}{host}{f':{self.port}' if self.port else ''}"

    def arguments(self) -> list[str]:
        """The address as arguments of ssh, the host last and after '--'."""
        port = ["-p", str(self.port)] if self.port else []
        user = ["-l", self.user] if self.user else []
        return [*port, *user, "--", self.host]

    def login(self) -> str:
        """How a person would connect."""
        user = f"{self.user}@" if self.user else ""
        return f"{f'-p {self.port} ' if self.port else ''}{user}{self.host}"
