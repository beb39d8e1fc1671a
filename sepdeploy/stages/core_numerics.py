"""Whether the files compute on the emulated core that they are for what they compute here; work/numerics/*.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from sepdeploy.bench.arm_cores import emulated_core
from sepdeploy.bench.arm_numerics import agreement_sentence, compare_numerics, mismatch_sentence
from sepdeploy.bench.arm_root import find_root, tool_versions
from sepdeploy.core.codec import read_json, write_json
from sepdeploy.core.measurement import Numerics
from sepdeploy.core.options import ConvertOptions, target_format
from sepdeploy.core.progress import Progress
from sepdeploy.core.report import ArtifactResult, Check
from sepdeploy.core.stage_store import StageStore
from sepdeploy.render.format_numbers import plural
from sepdeploy.stages.versions import versions
from sepdeploy.version import __version__

__all__ = ["compare_on_core", "numerics_check", "numerics_notes"]


def compare_on_core(
    store: StageStore, results: list[ArtifactResult], options: ConvertOptions, progress: Progress
) -> list[ArtifactResult]:
    """The files with how far their outputs on the target's core are from those here; as they are for other targets.

    Those that are not known yet run in one emulated process, and those that could not be run. A mismatch is a result:
    the report says so.

    Raises:
        ToolError: if the emulation fails as a whole.
    """
    core = emulated_core(options.target)
    if core is None:
        return results
    emulation = {
        "core": asdict(core),
        "root": find_root(progress).name,
        "tools": tool_versions(),
        "versions": versions(),
        "version": __version__,
        "seed": options.seed,
    }
    names = [f"{r.artifact.role.value}.{r.artifact.precision.value}.{r.artifact.format.value}" for r in results]
    paths = [store.work / "numerics" / f"{name}.json" for name in names]
    keys = [{"file": result.artifact.sha256, **emulation} for result in results]
    stages = [f"numerics {name}" for name in names]
    stale = [i for i, stage in enumerate(stages) if not store.is_current(stage, keys[i], (paths[i],))]
    stale += [i for i, path in enumerate(paths) if i not in stale and read_json(Numerics, path).failure]
    if stale:
        files = [Path(results[i].artifact.path) for i in stale]
        for i, numerics in zip(stale, compare_numerics(core, files, progress, seed=options.seed), strict=True):
            paths[i].unlink(missing_ok=True)
            store.run(stages[i], keys[i], (paths[i],), partial(write_json, paths[i], numerics))
    return [replace(result, numerics=read_json(Numerics, path)) for result, path in zip(results, paths, strict=True)]


def numerics_check(results: Sequence[ArtifactResult], options: ConvertOptions) -> list[Check]:
    """Whether every file computes on the target's core what it computes here, where that was looked at.

    Files of the other format are not what the core is to run: that one does not start there is said in a note
    (`numerics_notes`). One that runs and computes something else breaks the promise like any other.
    """
    compared = [(r.artifact.path, r.numerics) for r in results if r.numerics is not None and not _is_beside(r, options)]
    if not compared:
        return []
    wrong = [mismatch_sentence(path, numerics) for path, numerics in compared if not numerics.is_same]
    sentence = "; ".join(wrong) or agreement_sentence([numerics for _, numerics in compared])
    beside = sum(_is_beside(result, options) for result in results)
    if beside:
        sentence += f"; {plural(beside, 'file')} of the other format could not be run there, as the notes say"
    return [Check("numerics", not wrong, sentence)]


def numerics_notes(results: Sequence[ArtifactResult], options: ConvertOptions) -> tuple[str, ...]:
    """Why files of the other format than the target's do not run on its core."""
    return tuple(
        f"{mismatch_sentence(r.artifact.path, r.numerics)}; {options.target} runs "
        f"{target_format(options.target).value} files, so no promise is about it"
        for r in results
        if r.numerics is not None and _is_beside(r, options)
    )


def _is_beside(result: ArtifactResult, options: ConvertOptions) -> bool:
    """Whether a file that does not run on the target's core is not of the format that it is to run."""
    numerics = result.numerics
    is_of_target = result.artifact.format is target_format(options.target)
    return numerics is not None and bool(numerics.failure) and not is_of_target
