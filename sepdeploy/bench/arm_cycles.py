"""Cycles that a model of an Arm core's pipeline gives to what was executed: llvm-mca, block by block."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence

from sepdeploy.errors import ToolError

__all__ = ["CycleModel"]

_COVERAGE = 0.99
"""Share of the executed instructions whose blocks are modelled, the most executed first; the rest is scaled up."""

_LEAST_COVERAGE = 0.95
"""Below this too little could be modelled."""

_ITERATIONS = 100
_TOGETHER = 400
_SECONDS = 600
_TARGET = ("-mtriple=aarch64", "-mattr=+all")


class CycleModel:
    """Prices blocks of A64 instructions on one core.

    A block is modelled as if it were repeated, as inner loops are, with all loads in the first cache, and branches
    predicted. Blocks that were priced are remembered.

    Args:
        mca_cpu: `-mcpu` of llvm-mca.
    """

    def __init__(self, mca_cpu: str) -> None:
        self._cpu = mca_cpu
        self._known: dict[str, float | None] = {}  # None: llvm-mca has no model of one of its instructions

    def cycles(self, executed: Mapping[str, int]) -> float:
        """Modelled cycles of all that was executed.

        Args:
            executed: Instructions of a block in hexadecimal, 8 digits each -> how often.

        Raises:
            ToolError: if llvm-mca fails, or cannot model enough of it.
        """
        instructions = {words: count * (len(words) // 8) for words, count in executed.items()}
        total = sum(instructions.values())
        picked, sought = [], 0
        for words in sorted(instructions, key=lambda words: -instructions[words]):
            if sought >= _COVERAGE * total:
                break
            picked.append(words)
            sought += instructions[words]
        self._learn([words for words in picked if words not in self._known])
        cycles, covered = 0.0, 0
        for words in picked:
            price = self._known[words]
            if price is not None:
                cycles += executed[words] * price
                covered += instructions[words]
        if covered < _LEAST_COVERAGE * total or not covered:
            raise ToolError(
                f"llvm-mca models only {100 * covered / max(total, 1):.1f}% of the executed instructions on {self._cpu}"
            )
        return cycles * total / covered

    def _learn(self, blocks: Sequence[str]) -> None:
        for start in range(0, len(blocks), _TOGETHER):
            some = blocks[start : start + _TOGETHER]
            assembly = _disassembled({word for block in some for word in _words_of(block)})
            listings = [[assembly.get(word) for word in _words_of(block)] for block in some]
            self._known.update(dict.fromkeys(some))
            self._known |= self._modelled(
                {block: "\n".join(map(str, lines)) for block, lines in zip(some, listings, strict=True) if all(lines)}
            )

    def _modelled(self, assembly: Mapping[str, str]) -> dict[str, float | None]:
        """Block -> cycles of one run through it, from the assembly of each; None where llvm-mca has no model."""
        if not assembly:
            return {}
        blocks = list(assembly)
        text = "".join(
            f"# LLVM-MCA-BEGIN b{place}\n{assembly[block]}\n# LLVM-MCA-END b{place}\n"
            for place, block in enumerate(blocks)
        )
        views = ("--instruction-info=false", "--resource-pressure=false", "--call-latency=1")
        skip = "--skip-unsupported-instructions=lack-sched"
        command = ["llvm-mca-19", *_TARGET, f"-mcpu={self._cpu}", f"-iterations={_ITERATIONS}", *views, skip]
        done = _run(command, text)
        if done.returncode == 0:
            pattern = r"Code Region - b(\d+)\s+Iterations:\s+(\d+)\s+Instructions:\s+\d+\s+Total Cycles:\s+(\d+)"
            return {blocks[int(m[1])]: int(m[3]) / int(m[2]) for m in re.finditer(pattern, done.stdout)}
        if len(blocks) == 1:
            return {blocks[0]: None}
        # One block of which nothing can be modelled ends it for all: it is found by halves.
        halves = (blocks[: len(blocks) // 2], blocks[len(blocks) // 2 :])
        first, second = (self._modelled({block: assembly[block] for block in half}) for half in halves)
        return first | second


def _words_of(block: str) -> Iterable[str]:
    return (block[i : i + 8] for i in range(0, len(block), 8))


def _disassembled(words: set[str]) -> dict[str, str]:
    """Word -> its assembly; words that are no instruction are left out."""
    ordered = sorted(words)
    lines = [" ".join(f"0x{word[i : i + 2]}" for i in (6, 4, 2, 0)) for word in ordered]
    command = ["llvm-mc-19", "--disassemble", "--triple=aarch64", "-mattr=+all"]
    done = _run(command, "\n".join(lines))
    assembly = [
        line.strip() for line in done.stdout.splitlines() if line.startswith("\t") and not line.startswith("\t.")
    ]
    bad = {int(number) - 1 for number in re.findall(r"^<stdin>:(\d+):\d+: warning", done.stderr, flags=re.MULTILINE)}
    known = [word for place, word in enumerate(ordered) if place not in bad]
    if len(assembly) != len(known):
        raise ToolError(f"llvm-mc gave {len(assembly)} lines for {len(known)} instructions", stderr=done.stderr)
    return dict(zip(known, assembly, strict=True))


def _run(command: Sequence[str], text: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolError(f"{command[0]} does not run: {error}") from error
