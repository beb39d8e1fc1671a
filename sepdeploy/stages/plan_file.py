"""Plans that the user brings: files of `sepdeploy plan`, edited or not, and plan.json of other bundles."""

from __future__ import annotations

import json
from pathlib import Path

from sepdeploy.core.codec import read_json
from sepdeploy.core.conv import Trace
from sepdeploy.core.plan import Plan, lowered_for
from sepdeploy.core.selection import Selection
from sepdeploy.errors import UsageError
from sepdeploy.planning.select import plan_of

__all__ = ["read_given_plan", "read_plan_file"]


def read_plan_file(path: Path) -> Selection | Plan:
    """What a file of `sepdeploy plan`, or a bundle's plan.json, says.

    Raises:
        UsageError: if it cannot be read or is neither.
    """
    return read_json(Selection, path) if _is_selection(path) else read_json(Plan, path)


def read_given_plan(path: Path, traced: Trace, model_sha256: str) -> Plan:
    """The plan in a file, for the network that was traced.

    Args:
        path: A file of `sepdeploy plan`, or a bundle's plan.json.
        traced: The network.
        model_sha256: Hash of its checkpoint.

    Raises:
        UsageError: if the file cannot be read, or is about another network.
    """
    given = read_plan_file(path)
    named = given.layers if isinstance(given, Selection) else given.decisions
    sites = {site.name: site for site in traced.sites}
    unknown = {each.name for each in named} - sites.keys()
    if unknown:
        raise UsageError(
            f"{path} decides about {', '.join(sorted(unknown))}, which the network does not have (linear layers count "
            "with --linear); make it anew with 'sepdeploy plan'"
        )
    if isinstance(given, Selection):
        if given.model_sha256 != model_sha256:
            raise UsageError(f"{path} was made for another checkpoint; make it anew with 'sepdeploy plan'")
        suits = lowered_for(given.target, given.precision)
        plan = plan_of(traced, given.layers, given.choices, given.unit, suits)
    else:
        plan = given
    for name, candidate in plan.replaced.items():
        spec = sites[name].spec
        form = candidate.form
        if spec is None or (spec.in_channels, spec.out_channels) != (form.in_channels, form.out_channels):
            raise UsageError(f"{path} gives {name} a form for other channels than it has; make it anew")
    return plan


def _is_selection(path: Path) -> bool:
    """Whether a file looks like one of `sepdeploy plan`; what is wrong with it is said when it is read."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and "layers" in data
