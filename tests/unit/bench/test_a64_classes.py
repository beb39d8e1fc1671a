"""The classes of the counting plugin against the disassembly of binutils, on random instructions."""

import random
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

ARM64 = Path(__file__).parents[3] / "docker" / "arm64"
OBJDUMP = "aarch64-linux-gnu-objdump"

CLASSIFY = r"""
#include <stdio.h>
#include "a64.h"
int main(void)
{
    unsigned word;
    while (scanf("%x", &word) == 1) {
        struct a64_counts counts = {0};
        a64_count(word, &counts);
        for (int i = 0; i < A64_CLASS_COUNT; i++)
            if (counts.classes[i])
                printf("%s %d %d %d\n", a64_class_names[i], (int)counts.macs, (int)counts.loaded_bytes,
                       (int)counts.stored_bytes);
    }
    return 0;
}
"""

# Everything here is by name of the instruction; the plugin goes by bits.
LOADS = re.compile(r"(ld|cas|swp)")
DIVIDES = {"fdiv", "fsqrt"}
PERMUTES = re.compile(r"(zip|uzp|trn)[12]|ext|tbl|tbx|dup|ins|smov|umov")
MATRIX = {"smmla", "ummla", "usmmla", "bfmmla"}
DOT = {"sdot", "udot", "usdot", "sudot", "bfdot"}
HALF_FMA = re.compile(r"(fmlal|fmlsl)2?|bfmlal[bt]")
INTEGER_MAC = re.compile(r"([su]|sqd)(mlal|mlsl|mull)2?|mla|mls|sqr?dmulh|sqrdml[as]h")
VECTOR_FLOAT = re.compile(r"(f|bf)[a-z0-9]+|[su]cvtf")
WIDTHS = {"b": 1, "h": 2, "s": 4, "d": 8, "q": 16, "w": 4, "x": 8}


def simd_class(mnemonic: str, operands: str) -> str:
    """Of an instruction in the space of SIMD and floating point."""
    is_vector = bool(re.match(r"\{?v\d+\.", operands))
    if mnemonic in DIVIDES:
        return "float_divide"
    if mnemonic in MATRIX:
        return "matrix"
    if mnemonic in DOT:
        return "dot"
    if HALF_FMA.fullmatch(mnemonic):
        return "half_fma"
    if PERMUTES.fullmatch(mnemonic):
        return "permute"
    if mnemonic == "mov":  # of whole registers it is orr, else dup, ins or umov
        return "vector_integer" if re.fullmatch(r"v\d+\.(16|8)b, v\d+\.(16|8)b", operands) else "permute"
    if INTEGER_MAC.fullmatch(mnemonic):
        return "integer_mac"
    if mnemonic == "mul":
        return "integer_mac"
    if mnemonic in {"fmla", "fmls", "fcmla"} and is_vector:
        is_half = re.match(r"v\d+\.[48]h", operands) and mnemonic != "fcmla"
        return "half_fma" if is_half else "vector_fma"
    if VECTOR_FLOAT.fullmatch(mnemonic):
        # Across lanes and from vectors to a scalar: the operands say what is computed on.
        across = mnemonic.endswith("v") and mnemonic.startswith("f") and "v" in operands
        return "vector_float" if is_vector or across else "scalar_float"
    return "vector_integer"


def accessed(mnemonic: str, operands: str) -> tuple[str, int | None] | None:
    """Class and bytes of a load or store; bytes are None where the name and registers do not tell."""
    if re.match(r"cpy|set|ldra[ab]|st\w*g$|ldg", mnemonic):  # copies, pointer authentication, tags: on no core of ours
        return None
    if mnemonic.startswith(("prf", "rprfm")):
        return "integer", 0
    # An atomic operation without a result is one with a result that is thrown away.
    is_atomic = re.match(r"st(add|set|clr|eor|[su]max|[su]min)", mnemonic)
    kind = "load" if LOADS.match(mnemonic) or is_atomic else "store"
    registers = re.match(r"\{?([a-z])\d*", operands)
    assert registers, (mnemonic, operands)
    first = registers[1]
    if first == "v":
        return f"vector_{kind}", _structure_bytes(mnemonic, operands)
    if mnemonic.endswith("p") and mnemonic in {"ldp", "stp", "ldnp", "stnp"}:
        return ("vector_" if first in "bhsdq" else "") + kind, 2 * WIDTHS[first]
    if first in "bhsdq" and not operands.startswith("sp"):
        return f"vector_{kind}", WIDTHS[first]
    if mnemonic in {"ldr", "str", "ldur", "stur"}:
        return kind, WIDTHS[first]
    return kind, None


def _structure_bytes(mnemonic: str, operands: str) -> int:
    listed = operands[operands.index("{") + 1 : operands.index("}")]
    arrangement = re.search(r"\.(\d*)([bhsd])", listed)
    assert arrangement
    if "-" in listed:
        low, high = (int(number) for number in re.findall(r"v(\d+)", listed))
        count = (high - low) % 32 + 1
    else:
        count = len(listed.split(","))
    if "}[" in operands or mnemonic.endswith("r"):
        return count * WIDTHS[arrangement[2]]
    return count * int(arrangement[1]) * WIDTHS[arrangement[2]]


def expected(word: int, mnemonic: str, operands: str) -> tuple[str, int | None] | None:
    """Class of an instruction and the bytes it moves; None where it is not one that we count apart."""
    group = (word >> 25) & 15
    if group & 5 == 4:
        return accessed(mnemonic, operands)
    if group & 7 == 7:
        return simd_class(mnemonic, operands), 0
    if group & 7 == 5:
        if mnemonic in {"sdiv", "udiv"}:
            return "divide", 0
        return (
            "multiply" if re.search(r"mul|madd|msub|mneg|smadd|umadd|subl$|negl$|addl$", mnemonic) else "integer"
        ), 0
    if group & 14 == 8:
        return "integer", 0
    if group & 14 == 10:
        is_branch = re.match(r"(b|bl|br|blr|cbn?z|tbn?z|ret|eret|drps)$|bc?\.|b(l?)ra[ab]z?$|e?reta[ab]$", mnemonic)
        return ("branch" if is_branch else "system"), 0
    return None


def macs_of(mnemonic: str, operands: str) -> int | None:
    """Multiply-accumulates, from the arrangement of the registers; None where none are counted or it is not told."""
    registers = re.findall(r"v\d+\.(\d+)([bhsd])", operands)
    if mnemonic in {"fmla", "fmls", "mla", "mls"} and registers:
        return int(registers[0][0])
    if mnemonic in {"sdot", "udot", "usdot", "sudot"}:
        return 4 * int(registers[0][0])
    if re.fullmatch(r"[su]ml[as]l2?|[su]mull2?|sqdml[as]l2?|sqdmull2?", mnemonic) and registers:
        return int(registers[0][0])
    if mnemonic in MATRIX - {"bfmmla"}:
        return 32
    if re.fullmatch(r"fn?madd|fn?msub", mnemonic):
        return 1
    return None


@pytest.fixture(scope="module")
def classify(tmp_path_factory):
    """From words to what the plugin counts for them."""
    folder = tmp_path_factory.mktemp("classify")
    (folder / "classify.c").write_text(CLASSIFY)
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-O1", f"-I{ARM64}"]
    subprocess.run(["gcc", *flags, "-o", folder / "classify", folder / "classify.c"], check=True)

    def run(words):
        text = "\n".join(f"{word:08x}" for word in words)
        lines = subprocess.run([folder / "classify"], input=text, capture_output=True, text=True, check=True).stdout
        return [(name, *map(int, numbers)) for name, *numbers in map(str.split, lines.splitlines())]

    return run


def disassembled(words, folder):
    path = folder / "words.bin"
    path.write_bytes(b"".join(struct.pack("<I", word) for word in words))
    command = [OBJDUMP, "-D", "-b", "binary", "-m", "aarch64", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s*[0-9a-f]+:\t([0-9a-f]{8}) \t(\S+)(?:\t(.*))?$", text, flags=re.MULTILINE)
    return [(int(word, 16), name, operands.partition(" //")[0]) for word, name, operands in found if name != ".inst"]


@pytest.mark.skipif(not shutil.which(OBJDUMP) or not shutil.which("gcc"), reason="needs gcc and binutils for aarch64")
def test_classes_are_those_of_the_disassembly(classify, tmp_path):
    rng = random.Random(0)
    groups = {7: 60_000, 15: 60_000, 4: 15_000, 6: 30_000, 12: 15_000, 14: 30_000, 5: 20_000, 13: 20_000}
    groups |= {8: 5_000, 9: 5_000, 10: 5_000, 11: 20_000}
    words = [rng.getrandbits(32) & ~(15 << 25) | group << 25 for group, count in groups.items() for _ in range(count)]
    known = disassembled(words, tmp_path)
    names = {name for _, name, _ in known}
    assert len(known) > 80_000
    assert {"sdot", "fmla", "smlal2", "ld4", "fdiv", "umlal", "ldp", "zip1", "sqrdmulh", "bl", "mrs"} <= names
    wrong = {}
    for (word, name, operands), (found, macs, loaded, stored) in zip(
        known, classify(w for w, *_ in known), strict=True
    ):
        wanted = expected(word, name, operands)
        if wanted is None:
            continue
        if (wanted[0], wanted[1]) != (found, loaded + stored if wanted[1] is not None else None):
            wrong.setdefault(f"{name}: {wanted} but {found} {loaded + stored}", f"{word:08x} {operands}")
        number = macs_of(name, operands)
        if number is not None and number != macs:
            wrong.setdefault(f"{name}: {number} MACs but {macs}", f"{word:08x} {operands}")
    assert wrong == {}, "\n".join(f"{what} ({where})" for what, where in wrong.items())
