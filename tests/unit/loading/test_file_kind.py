import pytest
import torch

from sepdeploy.errors import UntrustedFileError
from sepdeploy.loading.checkpoint import load_state_dict
from sepdeploy.loading.file_kind import FileKind, identify_file

# torch.save names the folder inside a file after the file; these are also names inside programs.
NAMES = [
    "archive_format", "code", "constants.pkl", "custom_obj", "models", "opaque_obj", "opaque_object",
    "serialized_exported_program",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_name_of_a_checkpoint_means_nothing(tmp_path, name):
    path = tmp_path / f"{name}.pt"
    torch.save({"weight": torch.ones(2)}, path)
    assert identify_file(path) is FileKind.TORCH
    assert torch.equal(load_state_dict(path).tensors["weight"], torch.ones(2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["weights", *NAMES])
def test_torchscript_is_refused_under_any_name(tmp_path, name):
    path = tmp_path / f"{name}.pt"
    torch.jit.script(torch.nn.ReLU()).save(path)
    with pytest.raises(UntrustedFileError, match="is a TorchScript program"):
        identify_file(path)


@pytest.mark.parametrize("name", ["weights", "models", "data"])
def test_exported_program_is_refused_under_any_name(tmp_path, name):
    path = tmp_path / f"{name}.pt2"
    torch.export.save(torch.export.export(torch.nn.ReLU(), (torch.ones(1),)), path)
    with pytest.raises(UntrustedFileError, match="is an exported program"):
        identify_file(path)
