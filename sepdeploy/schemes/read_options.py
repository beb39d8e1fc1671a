"""Hyper-parameters as users give them: by name, each only where a scheme reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from sepdeploy.core.plan import SchemeOptions
from sepdeploy.errors import UsageError
from sepdeploy.schemes.scheme import SCHEMES, find_scheme

__all__ = ["read_options"]


def read_options(schemes: Sequence[str], given: Mapping[str, Any], defaults: SchemeOptions) -> SchemeOptions:
    """The hyper-parameters for `schemes`: what is `given` by field name, `defaults` for the rest.

    Raises:
        UsageError: if there is no such hyper-parameter, none of the schemes reads it, or a value is out of range.

    >>> read_options(["depthwise_separable"], {"terms": 3}, SchemeOptions()).terms
    3
    """
    known = [field.name for field in fields(SchemeOptions)]
    read = {name for scheme in schemes for name in find_scheme(scheme).option_names}
    for name in given:
        if name not in known:
            raise UsageError(f"there is no hyper-parameter '{name}'; choose from {', '.join(known)}")
        if name not in read:
            readers = [scheme for scheme in SCHEMES if name in find_scheme(scheme).option_names]
            raise UsageError(
                f"--{name.replace('_', '-')} belongs to --scheme {' or '.join(readers)}, not to {', '.join(schemes)}"
            )
    return replace(defaults, **given)
