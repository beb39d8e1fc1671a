from pathlib import Path

import numpy as np
import pytest

from sepdeploy.data.preprocess import Preprocess, read_preprocess
from sepdeploy.data.toml_files import find_file
from sepdeploy.errors import UsageError

PROJECT = Path(__file__).resolve().parents[3]


def pixel_image(red: int, green: int, blue: int) -> np.ndarray:
    return np.array([[[[red, green, blue]]]], np.uint8)


def test_normalisation_is_scale_then_mean_then_std_per_channel():
    preprocess = Preprocess(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    batch = preprocess.to_input(pixel_image(255, 51, 0))
    assert batch.dtype == np.float32
    np.testing.assert_allclose(batch[0, :, 0, 0], [(1 - 0.1) / 0.5, (0.2 - 0.2) / 0.25, (0 - 0.3) / 2], atol=1e-6)


def test_bgr_turns_the_channels_before_the_mean():
    preprocess = Preprocess(color="BGR", scale=1.0, mean=(1.0, 2.0, 3.0))
    np.testing.assert_array_equal(preprocess.to_input(pixel_image(10, 20, 30))[0, :, 0, 0], [29, 18, 7])


def test_layouts_hold_the_same_values():
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8)
    nchw = Preprocess(layout="NCHW").to_input(images)
    nhwc = Preprocess(layout="NHWC").to_input(images)
    assert nchw.shape == (2, 3, 4, 5)
    assert nhwc.shape == (2, 4, 5, 3)
    assert nchw.flags.c_contiguous
    np.testing.assert_array_equal(nchw, nhwc.transpose(0, 3, 1, 2))


def test_input_is_left_unchanged():
    images = np.full((1, 2, 2, 3), 100, np.uint8)
    Preprocess(mean=(0.5,)).to_input(images)
    assert (images == 100).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": (0, 4)}, "size must be two positive"),
        ({"size": (4, 4, 4)}, "size must be two positive"),
        ({"size": (4.0, 4)}, "size must be two positive"),
        ({"size": (True, 4)}, "size must be two positive"),
        ({"resize": "fit"}, "resize must be one of stretch, crop, got 'fit'"),
        ({"crop_ratio": 0.875}, 'needs resize = "crop"'),
        ({"resize": "crop", "crop_ratio": 1.5}, "crop_ratio must be above 0"),
        ({"interpolation": "cubic"}, "interpolation must be one of bilinear, bicubic, nearest, lanczos"),
        ({"color": "rgb"}, "color must be one of RGB, BGR, L"),
        ({"scale": 0}, "scale must be a positive number"),
        ({"scale": float("nan")}, "scale must be a positive number"),
        ({"scale": "255"}, "scale must be a positive number"),
        ({"mean": (0.5, 0.5)}, "mean has 2 values, but color RGB has 3"),
        ({"mean": ("a",)}, "mean must hold finite numbers"),
        ({"std": (0.0,)}, "std must be positive"),
        ({"color": "L", "std": (1.0, 1.0, 1.0)}, "std has 3 values, but color L has 1"),
        ({"layout": "NWHC"}, "layout must be one of NCHW, NHWC"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(UsageError, match=message):
        Preprocess(**values)


def test_wrong_channels_are_refused():
    with pytest.raises(UsageError, match="needs images"):
        Preprocess().to_input(np.zeros((1, 2, 2, 1), np.uint8))


ALL_KEYS = """
size = [224, 192]
resize = "crop"
crop_ratio = 0.875
interpolation = "bicubic"
color = "BGR"
scale = 1
mean = [103.5, 116.3, 123.7]
std = [57]
layout = "NHWC"
"""


@pytest.mark.parametrize("header", ["", "[preprocess]\n"])
def test_every_key_is_read_from_the_top_or_a_table(tmp_path, header):
    file = tmp_path / "p.toml"
    file.write_text(header + ALL_KEYS)
    assert read_preprocess(file) == Preprocess(
        size=(224, 192),
        resize="crop",
        crop_ratio=0.875,
        interpolation="bicubic",
        color="BGR",
        scale=1,
        mean=(103.5, 116.3, 123.7),
        std=(57,),
        layout="NHWC",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour = 'RGB'", "unknown key colour; allowed are size, resize, crop_ratio"),
        ("size = 224", "size must be a list"),
        ("mean = 0.5", "mean must be a list"),
        ("preprocess = 3", "preprocess must be a table"),
        ("size = [1,", "not valid TOML"),
        ("mean = [0.5]\n[preprocess]\nstd = [1]", "put mean into the"),
        ("color = ['RGB']", "color must be one of"),
        ("a = " + "[" * 5000, "not valid TOML"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, text, message):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        read_preprocess(file)
    assert "bad.toml" in str(caught.value)


def test_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot read"):
        read_preprocess(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not valid TOML"):
        read_preprocess(tmp_path / "binary.toml")


def test_packaged_calibration_files_are_found_from_anywhere(tmp_path, monkeypatch):
    packaged = sorted((PROJECT / "calibration").glob("*.toml"))
    if not packaged:
        pytest.skip("calibration/ has no files")
    monkeypatch.chdir(tmp_path)
    name = packaged[0].name
    assert find_file(Path("calibration", name)).read_bytes() == packaged[0].read_bytes()
    (tmp_path / "calibration").mkdir()
    (tmp_path / "calibration" / name).write_text("color = 'L'")
    assert find_file(Path("calibration", name)) == Path("calibration", name)


def test_other_missing_paths_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (Path("calibration/no-such-file.toml"), Path("elsewhere/x.toml"), Path("x.toml")):
        assert find_file(path) == path
