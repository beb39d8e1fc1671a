import argparse
import collections
import os
import pathlib
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sepdeploy.errors import UntrustedFileError, UsageError
from sepdeploy.loading.checkpoint import load_state_dict

SHARED_WEIGHTS = Path(__file__).resolve().parents[3] / "../shared/weights"

STATE = {"conv.weight": torch.arange(4.0).reshape(1, 1, 2, 2), "conv.bias": torch.ones(1)}


def save(path: Path, content: object, **options) -> Path:
    torch.save(content, path, **options)
    return path


def assert_is_state(tensors) -> None:
    assert tensors.keys() == STATE.keys()
    for name, value in STATE.items():
        assert torch.equal(tensors[name], value)
        assert not tensors[name].requires_grad


@pytest.mark.parametrize("is_zip", [True, False])
def test_plain_state_dict(tmp_path, is_zip):
    path = save(tmp_path / "w.pt", collections.OrderedDict(STATE), _use_new_zipfile_serialization=is_zip)
    weights = load_state_dict(path)
    assert_is_state(weights.tensors)
    assert (weights.nested_under, weights.stripped_prefix, weights.notes) == (None, "", ())
    assert len(weights.sha256) == 64


def test_safetensors_whatever_the_name(tmp_path):
    for name in ("w.safetensors", "w.pt"):
        save_file(STATE, tmp_path / name)
        assert_is_state(load_state_dict(tmp_path / name).tensors)


@pytest.mark.parametrize(
    ("wrap", "nested_under"),
    [
        (lambda s: {"state_dict": s, "epoch": 3}, "state_dict"),
        (lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}, "model"),
        (lambda s: {"model_state_dict": s, "loss": torch.tensor(0.1)}, "model_state_dict"),
        (lambda s: {"net": s}, "net"),
        (lambda s: {"weights": s}, "weights"),
        (lambda s: {"params": s}, "params"),
        (lambda s: {"module": s}, "module"),
        (lambda s: {"model": {"state_dict": s}}, "model.state_dict"),
        (lambda s: {"ema": {"module": s, "decay": 0.9}}, "ema.module"),
        (lambda s: {"model_ema": s}, "model_ema"),
        (lambda s: {"state_dict_ema": s}, "state_dict_ema"),
    ],
)
def test_training_checkpoints(tmp_path, wrap, nested_under):
    weights = load_state_dict(save(tmp_path / "w.pt", wrap(STATE)))
    assert_is_state(weights.tensors)
    assert weights.nested_under == nested_under
    assert bool(weights.notes) == ("ema" in nested_under)


def test_plain_weights_are_preferred_to_averaged_ones(tmp_path):
    averaged = {name: value + 1 for name, value in STATE.items()}
    weights = load_state_dict(save(tmp_path / "w.pt", {"state_dict_ema": averaged, "state_dict": STATE}))
    assert_is_state(weights.tensors)
    assert weights.notes == (
        "the weights under 'state_dict' were taken; the averaged ones under 'state_dict_ema' were not",
    )


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapper_prefixes_are_stripped(tmp_path, prefix):
    weights = load_state_dict(save(tmp_path / "w.pt", {prefix + name: value for name, value in STATE.items()}))
    assert_is_state(weights.tensors)
    assert weights.stripped_prefix == prefix


def test_averaged_model_of_torch(tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 3))
    weights = load_state_dict(save(tmp_path / "w.pt", averaged.state_dict()))
    assert set(weights.tensors) == {"weight", "bias"}


def test_prefixes_that_not_all_names_share_stay(tmp_path):
    content = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert load_state_dict(save(tmp_path / "w.pt", content)).tensors.keys() == content.keys()


def test_parameters_and_other_entries(tmp_path):
    content = {name: torch.nn.Parameter(value) for name, value in STATE.items()} | {"epoch": 3}
    weights = load_state_dict(save(tmp_path / "w.pt", content))
    assert_is_state(weights.tensors)
    assert weights.notes == ("entries of the checkpoint that are not tensors were left out: epoch",)


@pytest.mark.parametrize("is_zip", [True, False])
def test_harmless_classes_of_training_scripts(tmp_path, is_zip):
    content = {
        "state_dict": STATE,
        "args": argparse.Namespace(lr=0.1, nested=types.SimpleNamespace(a=1)),
        "path": pathlib.Path("x"),
        "best": np.float64(91.5),
        "scalars": [np.float32(1), np.int64(2), np.bool_(True), np.uint8(3)],
        "dtypes": [np.dtype("float32"), np.dtype("int64"), np.dtype("<U3")],
        "arrays": [np.arange(3), np.array(["text"]), np.ones((2, 2), np.float16)],
    }
    path = save(tmp_path / "w.pt", content, _use_new_zipfile_serialization=is_zip)
    assert_is_state(load_state_dict(path).tensors)


def test_names_of_numpy_1(tmp_path):
    content = {"state_dict": STATE, "best": np.float64(3), "array": np.arange(2)}
    path = save(tmp_path / "w.pt", content, _use_new_zipfile_serialization=False)
    stored = path.read_bytes()
    assert b"numpy._core.multiarray" in stored
    path.write_bytes(stored.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert_is_state(load_state_dict(path).tensors)


def test_numpys_own_unpickling_is_never_called(tmp_path):
    # An object array's state is a list of pickled objects, which numpy's __setstate__ would take as it comes.
    content = {"state_dict": STATE, "objects": np.array([{"a": 1}], dtype=object)}
    assert_is_state(load_state_dict(save(tmp_path / "w.pt", content)).tensors)


def test_allowed_names_are_allowed_only_while_loading(tmp_path):
    path = save(tmp_path / "w.pt", {"state_dict": STATE, "args": argparse.Namespace()})
    before = set(torch.serialization.get_safe_globals())
    load_state_dict(path)
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "it is an empty dictionary"),
        ({"epoch": 3, "generator": {"w": torch.ones(1)}}, "its keys are epoch, generator, and none of them"),
        (torch.ones(2), "it is a single tensor"),
        ([torch.ones(2)], "it is a list"),
        ({"state_dict": {}}, "its keys are state_dict"),
    ],
)
def test_files_without_weights_are_described(tmp_path, content, message):
    with pytest.raises(UsageError, match=message):
        load_state_dict(save(tmp_path / "w.pt", content))


def test_a_whole_pickled_module_is_refused_with_what_to_do(tmp_path):
    path = save(tmp_path / "w.pt", {"model": torch.nn.Conv2d(1, 1, 1)})
    with pytest.raises(UntrustedFileError, match=r"torch\.nn\.modules\.conv\.Conv2d.*torch\.save\(model\.state_dict"):
        load_state_dict(path)


@pytest.mark.skipif(not SHARED_WEIGHTS.is_dir(), reason="the reference checkpoints are not here")
def test_checkpoints_of_real_users():
    weights = load_state_dict(SHARED_WEIGHTS / "resnet20-12fca82f.th")
    assert weights.nested_under == "state_dict"
    assert weights.stripped_prefix == "module."
    assert weights.tensors["conv1.weight"].shape == (16, 3, 3, 3)
    assert load_state_dict(SHARED_WEIGHTS / "resnet20_jpeg.pt").nested_under is None


def test_the_environment_cannot_switch_safety_off(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = tmp_path / "executed"

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    with pytest.raises(UntrustedFileError):
        load_state_dict(save(tmp_path / "w.pt", {"state_dict": Attack()}))
    assert not marker.exists()
