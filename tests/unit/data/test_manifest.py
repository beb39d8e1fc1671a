import sys
from pathlib import Path

import numpy as np
import pytest

from sepdeploy.data.images import open_images
from sepdeploy.data.manifest import read_manifest_preprocess
from sepdeploy.data.preprocess import Preprocess
from sepdeploy.errors import UsageError

SPLITS = """
[splits.calibration]
stop = 4
[splits.validation]
start = 4
step = 2
"""


def write_manifest(folder, text: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "pixels.npz", images=np.zeros((10, 2, 2), np.uint8), labels=np.arange(10))
    (folder / "set.toml").write_text(text)
    return str(folder / "set.toml")


def test_splits_select_from_the_order_of_the_source(tmp_path):
    path = write_manifest(tmp_path / "data", '[source]\npath = "pixels.npz"' + SPLITS)
    assert open_images(path, role="validation").labels.tolist() == [4, 6, 8]
    assert sorted(open_images(path, role="calibration").labels) == [0, 1, 2, 3]


def test_without_splits_both_roles_take_all(tmp_path):
    path = write_manifest(tmp_path, '[source]\npath = "pixels.npz"')
    assert len(open_images(path, role="validation")) == 10
    assert len(open_images(path, role="calibration")) == 10


def test_the_manifests_preprocessing_is_used_unless_another_is_given(tmp_path):
    path = write_manifest(
        tmp_path, '[source]\npath = "pixels.npz"\n[preprocess]\ncolor = "L"\nscale = 16\nsize = [3, 3]'
    )
    assert read_manifest_preprocess(Path(path)) == Preprocess(color="L", scale=16, size=(3, 3))
    assert open_images(path, role="validation").preprocess == Preprocess(color="L", scale=16, size=(3, 3))
    assert open_images(path, role="validation", preprocess=Preprocess()).preprocess == Preprocess(
        color="L", size=(2, 2)
    )


def test_no_preprocessing_without_a_table_or_a_manifest(tmp_path):
    assert read_manifest_preprocess(Path(write_manifest(tmp_path, '[source]\npath = "pixels.npz"'))) is None
    assert read_manifest_preprocess(tmp_path) is None


def test_loader_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "manifest_test_loader.py").write_text(
        "import numpy as np\ndef load():\n    return np.zeros((3, 4, 4, 1), np.uint8), np.arange(3)\n"
    )
    path = write_manifest(tmp_path, '[source]\nloader = "manifest_test_loader:load"')
    before = list(sys.path)
    assert open_images(path, role="validation").input_shape == (1, 4, 4)
    assert sys.path == before


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def other(): pass", "has no function load"),
        ("def load(): return 3", r"must return \(images, labels\), got int"),
        ("def load(): return [1], [2]", "images must be a uint8 array"),
        ("def load(): raise RuntimeError('no network')", "failed: RuntimeError: no network"),
        ("import sklearn.no_such_part", r"pip install 'sepdeploy\[digits\]'"),
        ("import no_such_package", "install no_such_package"),
        ("syntax error", "failed: SyntaxError"),
    ],
)
def test_loaders_that_fail_are_named(tmp_path, monkeypatch, request, body, message):
    monkeypatch.chdir(tmp_path)
    name = f"broken_loader_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(body)
    path = write_manifest(tmp_path, f'[source]\nloader = "{name}:load"')
    with pytest.raises(UsageError, match=message):
        open_images(path, role="validation")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"needs a \[source\] table"),
        ("source = 3", r"needs a \[source\] table"),
        ('[source]\npath = "a"\nloader = "b:c"', r"needs a \[source\] table"),
        ("[source]\npath = 3", "source.path must be a string"),
        ('[source]\npath = "none.npz"', r"none\.npz does not exist"),
        ('[source]\npath = "set.toml"', "is not a folder"),
        ('[source]\nloader = "nocolon"', "must look like 'module:function'"),
        ('[source]\nloader = "no.such.module:f"', "cannot run because No module named"),
        ('[source]\nloader = "models.no_such_net:f"', "cannot run because No module named"),
        ('[source]\npath = "pixels.npz"\n[splits.validation]\nstep = 0', "step must be a whole number of at least 1"),
        ('[source]\npath = "pixels.npz"\n[splits.validation]\nstart = -1', "start must be a whole number"),
        ('[source]\npath = "pixels.npz"\n[splits.validation]\nfirst = 1', "takes start, stop and step"),
        ('[source]\npath = "pixels.npz"\n[splits.calibration]\nstop = 1', r"has no \[splits.validation\]"),
        ('[source]\npath = "pixels.npz"\n[splits.test]\nstop = 1', "splits must be the tables"),
        ('[source]\npath = "pixels.npz"\n[splits.validation]\nstart = 99', "selects none of its 10 images"),
        ('[source]\npath = "pixels.npz"\n[extra]', "unknown table extra"),
    ],
)
def test_bad_manifests_are_refused(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        open_images(write_manifest(tmp_path, text), role="validation")
