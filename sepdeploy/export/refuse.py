"""Why an exporter cannot write a network, said by the line of the user's code where there is one."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from sepdeploy.core.quiet import first_line
from sepdeploy.errors import UnsupportedModelError

__all__ = ["refuse_export"]

_LONGEST = 400
"""Characters of an exporter's words: some have pages in their first line."""

# What torch.export appends to its errors: the place in the network's own code, and the line there.
_PLACE = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in [^\n]+\n +(?P<code>[^\n]+)')


def refuse_export(error: BaseException, kind: str, other_format: str) -> UnsupportedModelError:
    """The error to raise for what an exporter raised.

    Args:
        error: As it was caught.
        kind: What was to be written: 'ONNX' or 'TFLite'.
        other_format: The --formats that is left without it.
    """
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    places = list(_PLACE.finditer(str(cause)))
    place = places[-1] if places else None  # the innermost
    where = f" ({Path(place['file']).name}, line {place['line']}: {place['code'].strip()})" if place else ""
    if isinstance(cause, GuardOnDataDependentSymNode):
        return UnsupportedModelError(
            f"the network cannot be exported to {kind}: its forward method decides by a value that it computes{where}, "
            "and a file has one path for every input; leave that decision out of what --arch builds"
        )
    why = textwrap.shorten(first_line(error), _LONGEST, placeholder=" ...")
    return UnsupportedModelError(
        f"the network cannot be exported to {kind}: {why}{where}; rewrite that part of its forward "
        f"method, or leave the format out with --formats {other_format}"
    )
