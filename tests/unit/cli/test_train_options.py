"""The training options reach the command as fields of `TrainOptions`."""

import click
import pytest
from click.testing import CliRunner

from sepdeploy.cli.train_options import train_options
from sepdeploy.core.training import TrainOptions


@pytest.fixture
def given():
    seen = {}

    @click.command()
    @train_options
    @click.option("--precision")  # another command's own, beside --train-precision
    def command(train, finetune_hook, training, precision):
        seen.update(training, train=train, hook=finetune_hook)

    def invoke(*arguments: str):
        seen.clear()
        result = CliRunner().invoke(command, arguments)
        return seen if result.exit_code == 0 else result.output

    return invoke


def test_only_what_was_given_is_passed_on(given):
    assert given() == {"train": None, "hook": None}
    found = given("--train", "x", "--epochs", "10", "--ema", "0", "--train-precision", "bfloat16")
    assert found == {"train": "x", "hook": None, "epochs": 10, "ema_decay": 0.0, "precision": "bfloat16"}
    assert TrainOptions(**{k: v for k, v in found.items() if k not in ("train", "hook")}).epochs == 10


@pytest.mark.parametrize(
    ("text", "expected"), [("auto", None), ("none", ()), ("flip", ("flip",)), ("flip,zoom", ("flip", "zoom"))]
)
def test_augmentations(given, text, expected):
    assert given("--train", "x", "--train-augment", text)["augment"] == expected


def test_options_that_nothing_reads_are_refused(given):
    assert "--batch-size belongs to --train" in given("--batch-size", "3")
    assert "no effect beside --finetune-hook" in given("--train", "x", "--finetune-hook", "a:b", "--batch-size", "3")
    assert given("--train", "x", "--finetune-hook", "a:b")["hook"] == "a:b"
    assert "--qat belongs to --train" in given("--qat")
    assert "--qat has no effect beside --finetune-hook" in given("--train", "x", "--finetune-hook", "a:b", "--qat")
    assert given("--train", "x", "--qat")["is_quantization_aware"] is True
