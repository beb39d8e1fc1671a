"""What the pipeline asks of its stages."""

from dataclasses import replace
from pathlib import Path

import pytest

from sepdeploy import pipeline
from sepdeploy.core.artifact import Format, Precision
from sepdeploy.core.int8 import Int8Options
from sepdeploy.core.looser_plan import LooserOutcome, LooserPlan, TriedPlan
from sepdeploy.core.options import ConvertOptions
from sepdeploy.core.progress import Silent
from sepdeploy.core.stage_store import StageStore
from sepdeploy.core.training import TrainOptions
from sepdeploy.errors import ContractError, UsageError
from sepdeploy.stages.attempts import Attempt, Attempts, Held


def test_what_is_only_timed_is_quantized_the_quickest_way():
    given = ConvertOptions(
        Path("m.pt"), "a:b", "c", target="litert", precision=Precision.INT8, int8=Int8Options("auto", io="uint8"),
        train="t", training=TrainOptions(is_quantization_aware=True),
    )  # fmt: skip
    found = pipeline._for_timing(given)
    assert found.int8 == Int8Options("minmax", io="uint8", equalizes=False, corrects_bias=False)
    assert (found.formats, found.precisions) == ((Format.TFLITE,), (Precision.FLOAT32, Precision.INT8))
    assert pipeline._for_timing(replace(given, precision=Precision.FLOAT32)).precisions == (Precision.FLOAT32,)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UsageError("the training diverged"), "the training diverged"),
        (MemoryError(), "MemoryError: no message"),
        (RuntimeError("CUDA out of memory."), "RuntimeError: CUDA out of memory."),
        (RuntimeError("index out of range"), None),
        (ContractError("a bug"), None),
    ],
)
def test_what_fails_in_a_looser_attempt_and_is_no_bug_gives_back_what_was_finished(tmp_path, error, told):
    plan = TriedPlan("ms", 10.0, 8.0)
    looser = Attempt(5.0, is_recovering=True, held=Held(3.0, 1.0, plan))
    attempts = Attempts(StageStore(tmp_path, on_change=lambda: None), {}, looser, resumes=False)

    def tried(attempt):
        if attempt.held is not None:
            attempts.obstacle(replace(plan, cost=6.0))
            raise error
        return attempt

    def settled():
        return pipeline._settled(attempts, tried, 1.0, may_loosen=True, progress=Silent())

    if told is None:
        with pytest.raises(type(error), match=str(error)):
            settled()
        return
    final = settled()
    assert final.looser == LooserPlan(LooserOutcome.FAILED, 1.0, 5.0, plan, replace(plan, cost=6.0), told)
    assert (final.limit_points, final.is_last) == (3.0, True)
