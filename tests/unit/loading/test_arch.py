import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sepdeploy.errors import ToolError, UsageError
from sepdeploy.loading.arch import build_architecture

NET = """
from torch import nn

def tiny(num_classes=10, width=0.5, *, name="x"):
    net = nn.Linear(3, num_classes)
    net.width = width
    net.name = name
    return net

class Net(nn.Linear):
    def __init__(self, classes=4):
        super().__init__(2, classes)

class Zoo:
    inner = Net

built = nn.Linear(1, 1)
number = 3

def needs(width, depth=1):
    return nn.Linear(1, width)

def fails():
    raise KeyError("no such layer")

def leaves():
    raise SystemExit(2)

def returns_list():
    return [built]
"""


@pytest.fixture
def net_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "nets.py"
    path.write_text(NET)
    return path


def test_file_spec(net_file):
    before = list(sys.path)
    found = build_architecture(f"{net_file}:tiny")
    assert found.module.out_features == 10
    assert found.source_path == str(net_file)
    assert len(found.source_sha256) == 64
    assert sys.path == before
    assert build_architecture("nets.py:tiny").source_sha256 == found.source_sha256


@pytest.mark.parametrize("factory", ["tiny", "Net", "Zoo.inner", "built", "tiny()", "tiny ( ) "])
def test_functions_classes_and_modules_are_factories(net_file, factory):
    assert isinstance(build_architecture(f"nets.py:{factory}").module, nn.Linear)


def test_literal_arguments(net_file):
    built = build_architecture("nets.py:tiny(num_classes=7, width=-0.25, name='a:b(c=1)')").module
    assert (built.out_features, built.width, built.name) == (7, -0.25, "a:b(c=1)")


def test_a_changed_file_is_read_again(net_file):
    first = build_architecture("nets.py:tiny")
    net_file.write_text(NET.replace("num_classes=10", "num_classes=11"))
    second = build_architecture("nets.py:tiny")
    assert second.module.out_features == 11
    assert first.source_sha256 != second.source_sha256


def test_a_file_imports_its_neighbours_from_anywhere(tmp_path, monkeypatch):
    folder = tmp_path / "dir with (brackets)"
    folder.mkdir()
    (folder / "arch_test_neighbour.py").write_text("SIZE = 5")
    (folder / "net.py").write_text(
        "from torch import nn\nfrom arch_test_neighbour import SIZE\ndef make():\n    return nn.Linear(1, SIZE)\n"
    )
    assert build_architecture(f"{folder}/net.py:make").module.out_features == 5


def test_dataclasses_work_in_a_file(tmp_path):
    (tmp_path / "net.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom torch import nn\n"
        "@dataclass\nclass Config:\n    width: int = 3\n"
        "def make():\n    return nn.Linear(1, Config().width)\n"
    )
    assert build_architecture(f"{tmp_path}/net.py:make").module.out_features == 3


def test_module_spec_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "arch_test_package").mkdir()
    (tmp_path / "arch_test_package" / "net.py").write_text(NET)
    found = build_architecture("arch_test_package.net:tiny(num_classes=3)")
    assert found.module.out_features == 3
    assert found.source_path is None


def test_models_is_the_users_own_package_where_ours_has_no_such_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "models"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("")
    (tmp_path / "models" / "arch_test_own_net.py").write_text(NET)
    assert build_architecture("models.arch_test_own_net:Net").module.out_features == 4
    for name in [name for name in sys.modules if name.partition(".")[0] == "models"]:
        del sys.modules[name]


@pytest.mark.skipif(
    not (Path(__file__).resolve().parents[3] / "models/resnet_cifar.py").exists(), reason="no reference networks here"
)
def test_models_is_ours_first_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "resnet_cifar.py").write_text("raise RuntimeError('shadowed')")
    module = build_architecture("models.resnet_cifar:resnet20").module
    assert type(module).__module__ == "sepdeploy.models.resnet_cifar"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "is not an architecture"),
        ("resnet20", "is not an architecture; give models.resnet_cifar:resnet20"),
        ("nets.py:", "is not an architecture"),
        ("nets.py:\0", "is not an architecture"),
        ("a/b:make", "is neither a .py file nor the name of a module"),
        ("none.py:make", "cannot read none.py: No such file"),
        ("no_such_module_here:make", "there is no module no_such_module_here"),
        ("torch.no_such_part:make", "there is no module torch.no_such_part"),
        ("models.no_such_net:make", "there is no module models.no_such_net"),
        ("nets.py:tiny2", "has no tiny2; did you mean tiny"),
        ("nets.py:zzz", "has no zzz; it has tiny, Net"),
        ("nets.py:Zoo.zzz", "has no Zoo.zzz"),
        ("nets.py:number", "names a int"),
        ("nets.py:built(x=1)", "is built already and takes no arguments"),
        ("nets.py:needs", "missing a required argument: 'width'.*takes .width, depth=1."),
        ("nets.py:tiny(classes=3)", "unexpected keyword argument 'classes'"),
        ("nets.py:tiny(3)", "must be plain values by keyword"),
        ("nets.py:tiny(**{})", "must be plain values by keyword"),
        ("nets.py:tiny(width=open('x'))", "must be plain values by keyword"),
        ("nets.py:tiny(width=)", "must be plain values by keyword"),
        ("nets.py:tiny(width=1)(2)", "must be plain values by keyword"),
        ("nets.py:tiny(width=" + "-" * 7000 + "1)", "plain values by keyword, .*: they are nested too deeply$"),
        ("nets.py:fails", "fails: KeyError: 'no such layer'"),
        ("nets.py:leaves", "fails: SystemExit: 2"),
        ("nets.py:returns_list", "returns a list; it must return an nn.Module"),
    ],
)
def test_bad_specs_say_what_is_wrong(net_file, spec, message):
    with pytest.raises(UsageError, match=message):
        build_architecture(spec)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def broken(:", "SyntaxError"),
        ("import no_such_package_here", "ModuleNotFoundError: No module named 'no_such_package_here'"),
        ("1 / 0", "ZeroDivisionError"),
        ("import sys; sys.exit('usage: train.py')", "SystemExit: usage: train.py"),
    ],
)
def test_files_that_fail_on_import(tmp_path, code, message):
    (tmp_path / "net.py").write_text(code)
    before = set(sys.modules)
    with pytest.raises(UsageError, match=rf"net\.py fails when imported: {message}"):
        build_architecture(f"{tmp_path}/net.py:make")
    assert not {name for name in set(sys.modules) - before if "arch" in name}


def test_modules_that_need_another_package_name_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "arch_test_needy.py").write_text("import no_such_package_here.part")
    with pytest.raises(UsageError, match="arch_test_needy needs no_such_package_here"):
        build_architecture("arch_test_needy:make")


def test_a_module_run_from_the_wrong_folder_is_hinted_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="run from the folder that it lies in"):
        build_architecture("my_nets:make")


FAKE_TIMM = """
from torch import nn
def list_models():
    return ["resnet18", "mobilenetv3_small_100"]
def create_model(name, pretrained, num_classes=1000):
    assert pretrained is False
    net = nn.Linear(1, num_classes)
    net.name = name
    return net
"""


@pytest.fixture
def fake_timm(tmp_path, monkeypatch):
    """A stand-in with timm's two functions: the real one is an optional extra."""

    def install(code: str) -> None:
        (tmp_path / "timm.py").write_text(code)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "timm", raising=False)

    yield install
    sys.modules.pop("timm", None)


def test_timm_spec(fake_timm):
    fake_timm(FAKE_TIMM)
    assert build_architecture("timm:resnet18").module.out_features == 1000
    found = build_architecture("timm:mobilenetv3_small_100.lamb_in1k(num_classes=5)").module
    assert (found.out_features, found.name) == (5, "mobilenetv3_small_100.lamb_in1k")
    with pytest.raises(UsageError, match="timm has no model resnet19; did you mean resnet18"):
        build_architecture("timm:resnet19")
    with pytest.raises(UsageError, match="pretrained is not an argument"):
        build_architecture("timm:resnet18(pretrained=True)")
    with pytest.raises(UsageError, match="fails: TypeError"):
        build_architecture("timm:resnet18(depth=3)")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "import no_such_package_here",
            r"no_such_package_here, which is not installed: pip install 'sepdeploy\[timm\]'",
        ),
        (
            "raise RuntimeError('operator torchvision::nms does not exist')",
            "install a torchvision that fits your torch",
        ),
    ],
)
def test_timm_that_does_not_import(fake_timm, code, message):
    fake_timm(code)
    with pytest.raises(ToolError, match=message):
        build_architecture("timm:resnet18")


def test_missing_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ToolError, match=r"pip install 'sepdeploy\[timm\]'"):
        build_architecture("timm:resnet18")


def test_the_random_state_of_the_weights_is_the_callers(net_file):
    torch.manual_seed(3)
    first = build_architecture("nets.py:tiny").module.weight
    torch.manual_seed(3)
    assert torch.equal(first, build_architecture("nets.py:tiny").module.weight)
