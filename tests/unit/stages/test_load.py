"""Images that make every number look better than it is must be named."""

import numpy as np
import pytest
import torch

from sepdeploy.core.options import ConvertOptions
from sepdeploy.core.progress import Silent
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
