import dataclasses
import inspect
import subprocess
import sys

import click
import pytest

import sepdeploy
from sepdeploy.cli.convert import command
from sepdeploy.core.options import ConvertOptions
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.schemes.scheme import SCHEMES


def test_all_names():
    assert sepdeploy.__all__ == ["ConvertOptions", "__version__", "convert", "load"]
    for name in sepdeploy.__all__:
        assert getattr(sepdeploy, name) is not None
    assert sepdeploy.__version__.count(".") == 2


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sepdeploy.nothing  # noqa: B018
    assert not hasattr(sepdeploy, "no_such_name")


def test_signatures():
    assert list(inspect.signature(sepdeploy.convert).parameters) == ["options", "progress"]
    assert list(inspect.signature(sepdeploy.load).parameters) == ["bundle", "arch"]
    required = [
        f.name for f in dataclasses.fields(ConvertOptions) if f.default is f.default_factory is dataclasses.MISSING
    ]
    assert required == ["model", "arch", "calibration"]


def test_import_is_light():
    code = "import sys, sepdeploy; sepdeploy.ConvertOptions; assert not {'torch', 'numpy', 'click'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_command_line_and_python_have_the_same_options_and_defaults(tmp_path):
    defaults = ConvertOptions(model=tmp_path, arch="a:b", calibration="c")
    by_name = {parameter.name: parameter for parameter in command.params}
    same = {
        "scheme": defaults.scheme, "target": defaults.target, "precision": defaults.precision.value,
        "formats": ",".join(f.value for f in defaults.formats), "transfer": defaults.transfer,
        "calibration_images": defaults.calibration_images, "threads": defaults.threads, "seed": defaults.seed,
    }  # fmt: skip
    for name, value in same.items():
        assert by_name[name].default == value, name
    python = {f.name for f in dataclasses.fields(ConvertOptions)} - {"bench_seconds", "command", "scheme_options"}
    renamed = {"max_drop": "max_drop_points"}
    options = {renamed.get(name, name) for name in by_name} - {"as_json", "terms", "rank_ratio"}
    assert options == python
    assert {f.name for f in dataclasses.fields(SchemeOptions)} == {"terms", "rank_ratio"}


def test_the_command_line_offers_every_scheme():
    (scheme,) = (parameter for parameter in command.params if parameter.name == "scheme")
    assert isinstance(scheme.type, click.Choice)
    assert set(scheme.type.choices) == set(SCHEMES)


def test_help_of_scheme_options_states_the_real_defaults():
    texts = {parameter.name: getattr(parameter, "help", "") for parameter in command.params}
    assert f"(default {SchemeOptions().terms})" in texts["terms"]
    assert f"(default {SchemeOptions().rank_ratio})" in texts["rank_ratio"]
