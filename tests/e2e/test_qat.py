"""Training through the rounding of the int8 files, from the command line to the scales in the file."""

from dataclasses import replace

import pytest

import sepdeploy
from sepdeploy.core.artifact import Format, Precision, Role
from sepdeploy.core.codec import read_json
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.core.training import TrainOptions
from sepdeploy.quantize.agreement import affines_of_onnx
from sepdeploy.stages.recover import _Record

# A single epoch: what it leaves to be learned is learned through the rounding.
TRAINING = TrainOptions(
    epochs=1, batch_size=16, learning_rate=1e-2, ema_decay=0, augment=(), is_quantization_aware=True
)


@pytest.fixture(scope="module")
def options(workplace):
    return workplace.options(
        "Classifier",
        model=workplace.trained(),
        train=workplace.images(count=256),
        scheme_options=SchemeOptions(terms=1),
        training=TRAINING,
        precision=Precision.INT8,
    )


def test_the_file_has_the_scales_that_were_trained_with(options):
    report = sepdeploy.convert(options)
    names = [step.name for step in report.recovery]
    assert names[-2:] == ["fine-tuning", "quantization-aware training"]
    step = report.recovery[-1]
    assert step.is_kept
    assert step.damage_after < step.damage_before
    folder = options.output_folder
    record = read_json(_Record, folder / "work" / "finetuned_int8.json")
    trained = {(round(p.affine.scale, 9), p.affine.zero_point) for p in record.ranges}
    in_file = {(round(a.scale, 9), a.zero_point) for a in affines_of_onnx(folder / "model.int8.onnx").values()}
    assert trained == in_file
    assert (folder / "work" / "finetune_int8" / "checkpoint.pt").is_file()
    result = report.result(Format.ONNX, Precision.INT8, Role.CONVERTED)
    assert result.quality.relative_error < 1
    again = sepdeploy.convert(replace(options, bench_seconds=0.01))
    assert again.recovery == report.recovery
    network = sepdeploy.load(folder)
    assert sum(p.numel() for p in network.parameters()) >= report.converted.params - 100
