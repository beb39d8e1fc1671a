import contextlib
import io
import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save

from sepdeploy.errors import SepdeployError, UntrustedFileError, UsageError
from sepdeploy.loading.checkpoint import load_state_dict

STATE = {"weight": torch.ones(64, 64), "bias": torch.zeros(64)}


def refusal(path, kind=UsageError) -> str:
    with pytest.raises(kind) as caught:
        load_state_dict(path)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def torch_bytes(content: object, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


class MakesFolder:
    """Unpickling it would make a folder, which is how the tests see that code ran."""

    def __init__(self, path, function=os.mkdir) -> None:
        self.path = str(path)
        self.function = function

    def __reduce__(self):
        argument = f"mkdir {self.path}" if self.function is os.system else self.path
        return self.function, (argument,)


@pytest.mark.parametrize("function", [os.system, os.mkdir])
@pytest.mark.parametrize("nesting", ["root", "value", "beside"])
@pytest.mark.parametrize("is_zip", [True, False])
def test_malicious_checkpoints_do_not_run(tmp_path, function, nesting, is_zip):
    marker = tmp_path / "executed"
    attack = MakesFolder(marker, function)
    content = {"root": attack, "value": {"state_dict": attack}, "beside": {**STATE, "extra": attack}}[nesting]
    path = tmp_path / "evil.pt"
    path.write_bytes(torch_bytes(content, _use_new_zipfile_serialization=is_zip))
    message = refusal(path, UntrustedFileError)
    assert "posix." in message or "nt." in message
    assert not marker.exists()


def test_the_attack_works_where_files_are_trusted(tmp_path):
    # Without this, the tests above could pass because the attack itself is broken.
    marker = tmp_path / "executed"
    pickle.loads(pickle.dumps(MakesFolder(marker, os.system)))
    assert marker.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_bare_pickles_do_not_run(tmp_path, protocol):
    marker = tmp_path / "executed"
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"state_dict": MakesFolder(marker)}, protocol=protocol))
    refusal(path, UntrustedFileError if protocol >= 2 else UsageError)
    assert not marker.exists()


def test_allowed_names_cannot_be_used_as_a_way_in(tmp_path):
    # numpy's functions are allowed by name; what stands behind the names must not run what they are given.
    marker = tmp_path / "executed"
    code = f"cnumpy._core.multiarray\nscalar\n(cposix\nmkdir\n(S'{marker}'\ntRtR."
    buffer = io.BytesIO(torch_bytes(STATE))
    path = tmp_path / "evil.pt"
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, code.encode() if name.endswith("data.pkl") else source.read(name))
    refusal(path, UntrustedFileError)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused_before_loading(tmp_path):
    path = tmp_path / "scripted.pt"
    torch.jit.script(torch.nn.Conv2d(1, 1, 1)).save(path)
    message = refusal(path, UntrustedFileError)
    assert "TorchScript" in message
    assert 'torch.jit.load("scripted.pt").state_dict()' in message


def test_exported_programs_are_refused_before_loading(tmp_path):
    path = tmp_path / "program.pt2"
    torch.export.save(torch.export.export(torch.nn.Conv2d(1, 1, 1), (torch.ones(1, 1, 2, 2),)), path)
    assert "exported program" in refusal(path, UntrustedFileError)


@pytest.mark.parametrize("member", ["x/opaque_obj_0", "x/data/custom_obj_1", "serialized_exported_program.json"])
def test_exported_programs_of_other_versions(tmp_path, member):
    path = tmp_path / "program.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/archive_format" if "custom" in member else member, b"pt2")
    assert "exported program" in refusal(path, UntrustedFileError)


def test_paths_that_are_no_files(tmp_path):
    assert "No such file" in refusal(tmp_path / "none.pt")
    assert "is a folder" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pt", b"", "is empty"),
        ("a.pt", b"hello, world", "is no PyTorch file, or is damaged"),
        ("a.onnx", b"\x08\x09\x12\x07pytorch", "an ONNX file"),
        ("a.pt", b"\x08\x09\x12\x07pytorch", "an ONNX file"),
        ("a.tflite", b"\x1c\0\0\0TFL3" + bytes(40), "a TFLite file"),
        ("a.h5", b"\x89HDF\r\n\x1a\n" + bytes(40), "an HDF5 file (Keras)"),
        ("a.npy", b"\x93NUMPY\x01\x00", "a numpy array"),
        ("a.pt.gz", b"\x1f\x8b\x08", "gzip"),
        ("a.pt", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.pt", b"<!DOCTYPE html><html>", "a web page"),
        ("a.safetensors", bytes(8) + b"{", "is damaged"),
    ],
)
def test_other_files_are_called_what_they_are(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    assert message in refusal(path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (["images.npy"], "a numpy .npz file"),
        (["config.json", "model.weights.h5"], "a Keras file"),
        (["readme.txt"], "a zip archive without PyTorch weights"),
    ],
)
def test_other_archives_are_called_what_they_are(tmp_path, members, message):
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for member in members:
            archive.writestr(member, "")
    assert message in refusal(path)


FORMATS = {
    "zip": torch_bytes(STATE),
    "legacy": torch_bytes(STATE, _use_new_zipfile_serialization=False),
    "safetensors": save(STATE),
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files(tmp_path, kind, share):
    whole = FORMATS[kind]
    path = tmp_path / "cut.pt"
    path.write_bytes(whole[: max(1, int(len(whole) * share))])
    with pytest.raises((UsageError, UntrustedFileError)):
        load_state_dict(path)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("seed", range(25))
def test_flipped_bytes_never_escape_as_another_error(tmp_path, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    content = bytearray(FORMATS[kind])
    for place in torch.randint(0, min(len(content), 900), (8,), generator=generator).tolist():
        content[place] ^= 1 + place % 255
    path = tmp_path / "flipped.pt"
    path.write_bytes(bytes(content))
    with contextlib.suppress(SepdeployError):  # anything else fails the test; a flip in the values still loads
        assert load_state_dict(path).tensors


def test_random_bytes_behind_every_magic(tmp_path):
    noise = torch.randint(0, 256, (2000,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for head in (b"", b"PK\x03\x04", b"\x80\x02", FORMATS["legacy"][:20], b"\x20\0\0\0\0\0\0\0{"):
        path = tmp_path / "noise.pt"
        path.write_bytes(head + noise.numpy().tobytes())
        with pytest.raises((UsageError, UntrustedFileError)):
            load_state_dict(path)
