import hashlib
import os

import pytest

from sepdeploy.core.artifact import Artifact, Format, Precision, Role
from sepdeploy.core.files import replacing, sha256_of_bytes, sha256_of_file, write_bytes, write_text
from sepdeploy.errors import UsageError


def test_hashes(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc" * 100_000)
    assert sha256_of_file(path) == sha256_of_bytes(b"abc" * 100_000) == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_text_is_utf_8(tmp_path):
    write_text(tmp_path / "a.txt", "größer → ✓")
    assert (tmp_path / "a.txt").read_bytes().decode() == "größer → ✓"


def _fail_half_way(path):
    with replacing(path) as temporary:
        assert temporary.suffix == ".onnx"
        temporary.write_bytes(b"half")
        raise RuntimeError("exporter failed")


def test_failure_inside_the_block_leaves_nothing_new(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="exporter failed"):
        _fail_half_way(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="cannot write"), replacing(tmp_path / "a.onnx"):
        pass


@pytest.mark.parametrize("name", ["file/below", "folder"])
def test_places_that_cannot_be_written(tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    with pytest.raises(UsageError, match="free space there or choose another --output"):
        write_bytes(tmp_path / name, b"data")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
def test_disk_full(tmp_path):
    (tmp_path / f".full.{os.getpid()}.tmp.bin").symlink_to("/dev/full")
    with pytest.raises(UsageError, match="No space left on device"):
        write_bytes(tmp_path / "full.bin", b"data")
    assert not list(tmp_path.iterdir())


def test_artifact_describes_its_file(tmp_path):
    path = tmp_path / "a.tflite"
    path.write_bytes(b"abc")
    artifact = Artifact.of_file(path, format=Format.TFLITE, precision=Precision.INT8, role=Role.CONVERTED)
    assert (artifact.size_bytes, artifact.sha256) == (3, sha256_of_bytes(b"abc"))
    assert (artifact.path, artifact.is_channels_last) == (str(path), False)
