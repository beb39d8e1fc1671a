"""Numbers and names as people read them; plain ASCII, so that any terminal can show them."""

from __future__ import annotations

import math

__all__ = [
    "change_text",
    "count_text",
    "error_text",
    "is_about_the_same",
    "percent_text",
    "plural",
    "points_text",
    "printable",
    "size_text",
    "three_digits",
    "times_text",
]


def three_digits(value: float) -> str:
    """`value` with three significant digits and without an exponent.

    >>> three_digits(0.14159), three_digits(12.345), three_digits(98765.4), three_digits(0.99996)
    ('0.142', '12.3', '98765', '1.00')
    """
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")  # 0.9999 becomes 1 before its digits are counted
    magnitude = math.floor(math.log10(abs(rounded)))
    return f"{value:.{max(0, 2 - magnitude)}f}"


def count_text(count: int) -> str:
    """A count with its prefix.

    >>> count_text(40_551_000), count_text(1296), count_text(0), count_text(4_100_000_000)
    ('40.6 M', '1.30 k', '0', '4.10 G')
    """
    for divisor, prefix in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= divisor:
            return f"{three_digits(count / divisor)} {prefix}"
    return str(count)


def size_text(size_bytes: int) -> str:
    """A file size in decimal megabytes, or kilobytes where it is small.

    >>> size_text(913_408), size_text(8_200), size_text(51)
    ('0.913 MB', '8.20 kB', '51 B')
    """
    if size_bytes >= 100_000:
        return f"{three_digits(size_bytes / 1e6)} MB"
    if size_bytes >= 1000:
        return f"{three_digits(size_bytes / 1e3)} kB"
    return f"{size_bytes} B"


def percent_text(ratio: float) -> str:
    """A share of one in percent.

    >>> percent_text(0.8855)
    '88.55%'
    """
    return f"{100 * ratio:.2f}%"


def points_text(points: float) -> str:
    """A signed difference between two percentages.

    >>> points_text(-0.4), points_text(0.001), points_text(-1)
    ('-0.40 points', '0.00 points', '-1.00 points')
    """
    rounded = round(points, 2)
    return "0.00 points" if rounded == 0 else f"{rounded:+.2f} points"


def times_text(factor: float) -> str:
    """A ratio, such as a speedup.

    >>> times_text(1.8449), times_text(0.0271), times_text(12.61)
    ('1.84x', '0.03x', '12.6x')
    """
    return f"{factor:.2f}x" if factor < 9.995 else f"{three_digits(factor)}x"


def error_text(error: float) -> str:
    """An absolute error, in scientific notation: its magnitude is what matters.

    >>> error_text(2.44e-5)
    '2.4e-05'
    """
    return "0" if error == 0 else f"{error:.1e}"


def change_text(before: float, after: float, *, less: str, more: str) -> str:
    """How `after` compares to `before` as a factor above one and the word for its direction.

    >>> change_text(40, 10, less="smaller", more="larger"), change_text(10, 12, less="fewer", more="more")
    ('4.00x smaller', '1.20x more')
    """
    if before == after:
        return "unchanged"
    if is_about_the_same(before, after):
        return "about the same"
    if min(before, after) <= 0:
        return f"{three_digits(after - before)} {more if after > before else less}"
    factor, word = (before / after, less) if after < before else (after / before, more)
    return f"{times_text(factor)} {word}"


def is_about_the_same(before: float, after: float) -> bool:
    """Whether no factor that can be told from 1 lies between two values.

    >>> is_about_the_same(10, 10), is_about_the_same(1000, 1004), is_about_the_same(10, 12), is_about_the_same(0, 1)
    (True, True, False, False)
    """
    low, high = sorted((before, after))
    return low == high or (low > 0 and high / low < 1.005)


def plural(count: int, noun: str) -> str:
    """A count with its noun.

    >>> plural(1, "thread"), plural(2000, "image")
    ('1 thread', '2,000 images')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def printable(text: str) -> str:
    r"""`text` with control, direction-changing and undecodable characters written as escapes.

    File and layer names come from outside: one with a terminal sequence in it must not reach the terminal.

    >>> printable("layer\x1b[2J"), printable("größe")
    ('layer\\x1b[2J', 'größe')
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )
