"""What a target needs on this machine, and how to get what is missing."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Need", "Readiness"]


@dataclass(frozen=True, slots=True)
class Need:
    """One thing that a target cannot do without.

    Attributes:
        name: What it is, such as 'qemu-aarch64 with plugins'.
        found: What is there, such as a version or a path; empty if it is missing.
        problem: Why it does not do, as a sentence without a full stop; empty if it does.
        packages: Debian packages that bring it.
        fix: Command that puts it right where that is no package.
    """

    name: str
    found: str = ""
    problem: str = ""
    packages: tuple[str, ...] = ()
    fix: str = ""

    @property
    def is_met(self) -> bool:
        """Whether it is there and works."""
        return not self.problem


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether a target can be used here.

    Attributes:
        target: Its name, or what names of its kind look like.
        summary: What it is, in one line.
        needs: What it needs, in the order in which to get it.
    """

    target: str
    summary: str
    needs: tuple[Need, ...]

    @property
    def is_ready(self) -> bool:
        """Whether nothing is missing."""
        return all(need.is_met for need in self.needs)

    def commands(self, sudo: str = "") -> tuple[str, ...]:
        """What to run, in order: one line for all packages, then the rest, each once.

        Args:
            sudo: What to put before the installation of packages: 'sudo ' where the user is not root.

        >>> Readiness("x", "", (Need("a", problem="no a", packages=("a", "b")),)).commands("sudo ")
        ('sudo apt-get install -y --no-install-recommends a b',)
        """
        unmet = [need for need in self.needs if not need.is_met]
        packages = dict.fromkeys(package for need in unmet for package in need.packages)
        install = [f"{sudo}apt-get install -y --no-install-recommends {' '.join(packages)}"] if packages else []
        return tuple(dict.fromkeys((*install, *(need.fix for need in unmet if need.fix))))
