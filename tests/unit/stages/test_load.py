"""Images that make every number look better than it is must be named."""

import numpy as np
import pytest
import torch

from sepdeploy.core.options import ConvertOptions
from sepdeploy.core.progress import Silent
from sepdeploy.errors import UsageError
from sepdeploy.stages.load import load_inputs

OVERLAP = "--validation holds the calibration images too"


@pytest.fixture
def options(tmp_path):
    (tmp_path / "net.py").write_text("from torch import nn\n\ndef net():\n    return nn.Conv2d(3, 4, 3)\n")
    torch.save(torch.nn.Conv2d(3, 4, 3).state_dict(), tmp_path / "w.pt")
    for name in ("one", "two"):
        pixels = np.random.default_rng(len(name) + ord(name[0])).integers(0, 256, (12, 8, 8, 3), np.uint8)
        np.savez(tmp_path / f"{name}.npz", images=pixels)

    def build(**changes) -> ConvertOptions:
        return ConvertOptions(
            model=tmp_path / "w.pt", arch=f"{tmp_path / 'net.py'}:net", calibration=str(tmp_path / "one.npz"), **changes
        )

    return build


def test_the_same_images_for_both_are_named(options, tmp_path):
    same = load_inputs(options(validation=str(tmp_path / "one.npz")), Silent())
    other = load_inputs(options(validation=str(tmp_path / "two.npz")), Silent())
    assert any(OVERLAP in note for note in same.notes)
    assert not any(OVERLAP in note for note in other.notes)


def test_without_validation_images_are_held_out_and_none_is_in_both(options):
    inputs = load_inputs(options(), Silent())
    assert (len(inputs.calibration), len(inputs.validation)) == (9, 3)
    calibration, validation = (next(s.batches(12))[0] for s in (inputs.calibration, inputs.validation))
    assert not any((image == calibration).all(axis=(1, 2, 3)).any() for image in validation)
    assert any("held out" in note for note in inputs.notes)


def test_images_held_out_of_the_calibration_are_not_trained_on(options, tmp_path):
    both = np.concatenate([np.load(tmp_path / f"{name}.npz")["images"] for name in ("two", "one")])
    np.savez(tmp_path / "both.npz", images=both)
    for name, count in (("one", 9), ("both", 21), ("two", 12)):
        inputs = load_inputs(options(train=str(tmp_path / f"{name}.npz")), Silent())
        train, validation = (next(s.batches(24))[0] for s in (inputs.train, inputs.validation))
        assert (len(train), len(validation)) == (count, 3)
        assert not any((image == train).all(axis=(1, 2, 3)).any() for image in validation)
        note = "3 images of --train are validation images too and are left out of the training"
        assert (note in inputs.notes) == (name != "two")


def test_nothing_but_validation_images_is_nothing_to_train_on(options, tmp_path):
    two = str(tmp_path / "two.npz")
    with pytest.raises(UsageError, match=r"all 12 images in .*two\.npz \(--train\) are validation images too"):
        load_inputs(options(validation=two, train=two), Silent())
