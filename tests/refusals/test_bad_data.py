import io
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from sepdeploy.data.images import open_images
from sepdeploy.errors import UsageError


def refusal_of(path) -> str:
    with pytest.raises(UsageError) as caught:
        open_images(str(path), role="validation")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_path(tmp_path):
    assert "does not exist" in refusal_of(tmp_path / "none")
    assert "does not exist" in refusal_of("a\0b")
    assert "cannot read" in refusal_of(tmp_path / "none.toml")


def test_empty_folder(tmp_path):
    assert "holds no images" in refusal_of(tmp_path)


def test_folder_of_other_files(tmp_path):
    (tmp_path / "readme.txt").write_text("hello")
    message = refusal_of(tmp_path)
    assert ".jpg" in message
    assert ".eps" not in message


def test_a_single_image_file(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    assert "is not a folder of images" in refusal_of(tmp_path / "a.png")


def test_loose_images_beside_class_folders(tmp_path):
    for name in ("loose.png", "cat.d/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    message = refusal_of(tmp_path)
    assert "mixes loose images (loose.png) with class folders (cat.d)" in message


def test_nothing_readable(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.jpg").write_bytes(os.urandom(300))
    assert "none of the 2 images" in refusal_of(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folder_without_permission(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0)
    assert "cannot read" in refusal_of(locked)


@pytest.mark.parametrize("limit", [0, -5])
def test_limit_below_one(tmp_path, limit):
    with pytest.raises(UsageError, match="limit of images must be at least 1"):
        open_images(str(tmp_path), role="validation", limit=limit)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pixels": np.zeros((2, 2, 2), np.uint8)}, "has no array 'images'; it has pixels"),
        ({}, "has no array 'images'; it has nothing"),
        ({"images": np.zeros((2, 4, 4, 3), np.float32)}, "uint8 array of pixels from 0 to 255, got float32"),
        ({"images": np.zeros((2, 3, 4, 4), np.uint8)}, "looks like (N, C, H, W)"),
        ({"images": np.zeros((4, 4), np.uint8)}, "got (4, 4)"),
        ({"images": np.zeros((0, 4, 4, 3), np.uint8)}, "holds no images"),
        ({"images": np.zeros((2, 0, 4, 3), np.uint8)}, "got (2, 0, 4, 3)"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(3, int)}, "got int64 (3,)"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(2)}, "got float64 (2,)"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, -1])}, "at least 0, got -1"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, 2**63], np.uint64)}, "at least 0"),
    ],
)
def test_npz_with_wrong_arrays(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    assert message in refusal_of(tmp_path / "a.npz")


def test_npz_with_pickled_objects_does_not_run_them(tmp_path):
    marker = tmp_path / "executed"

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    np.savez(tmp_path / "a.npz", images=np.array([Attack()], object))
    assert "not a readable .npz file" in refusal_of(tmp_path / "a.npz")
    assert not marker.exists()


def test_damaged_npz(tmp_path):
    np.savez_compressed(tmp_path / "whole.npz", images=np.random.default_rng(0).integers(0, 9, (50, 9, 9), np.uint8))
    whole = (tmp_path / "whole.npz").read_bytes()
    broken = bytearray(whole)
    broken[300:340] = bytes(40)
    single = io.BytesIO()
    np.save(single, np.zeros(3))
    for content in (b"", b"random bytes", whole[: len(whole) // 2], bytes(broken), single.getvalue()):
        (tmp_path / "bad.npz").write_bytes(content)
        assert "not a readable .npz file" in refusal_of(tmp_path / "bad.npz")


def test_npz_that_claims_more_than_memory(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 10**5, 10**3, 3)}
    )
    with zipfile.ZipFile(tmp_path / "big.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue())
    message = refusal_of(tmp_path / "big.npz")
    assert "memory" in message or "not a readable" in message
