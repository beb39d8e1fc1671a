import dataclasses
import inspect
import subprocess
import sys

import click
import pytest

import sepdeploy
from sepdeploy.cli import convert, design
from sepdeploy.cli import inspect as inspect_command
from sepdeploy.core.design import FROM_SCRATCH, DesignOptions
from sepdeploy.core.options import ConvertOptions
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.schemes.scheme import SCHEMES

SCHEME_FIELDS = [field.name for field in dataclasses.fields(SchemeOptions)]


def test_all_names():
    assert sepdeploy.__all__ == [
        "ConvertOptions", "DesignOptions", "SeparableConv2d", "__version__", "convert", "design", "load",
    ]  # fmt: skip
    for name in sepdeploy.__all__:
        assert getattr(sepdeploy, name) is not None
    assert sepdeploy.__version__.count(".") == 2


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sepdeploy.nothing  # noqa: B018
    assert not hasattr(sepdeploy, "no_such_name")


def test_signatures():
    assert list(inspect.signature(sepdeploy.convert).parameters) == ["options", "progress"]
    assert list(inspect.signature(sepdeploy.design).parameters) == ["options", "progress"]
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
    by_name = {parameter.name: parameter for parameter in convert.command.params}
    same = {
        "scheme": defaults.scheme, "target": defaults.target, "precision": defaults.precision.value,
        "formats": ",".join(f.value for f in defaults.formats), "transfer": defaults.transfer,
        "calibration_images": defaults.calibration_images, "threads": defaults.threads, "seed": defaults.seed,
    }  # fmt: skip
    for name, value in same.items():
        assert by_name[name].default == value, name
    python = {f.name for f in dataclasses.fields(ConvertOptions)} - {"bench_seconds", "command", "scheme_options"}
    renamed = {"max_drop": "max_drop_points"}
    options = {renamed.get(name, name) for name in by_name} - {"as_json", *SCHEME_FIELDS}
    assert options == python


def test_the_design_command_and_python_have_the_same_options_and_defaults():
    defaults = DesignOptions(arch="a:b")
    parsed = design.command.make_context("design", ["--arch", "a:b"]).params
    for name in ("match", "multiplier", "step", "width_argument", "middle", "activation", "seed", "output"):
        assert parsed[name] == getattr(defaults, name), name
    assert parsed["schemes"] == (defaults.scheme,)
    assert parsed["input_shape"] == defaults.input_shape
    renamed = {"replace_pointwise": "replaces_pointwise", "schemes": "scheme"}
    options = {renamed.get(name, name) for name in parsed} - {"as_json", *SCHEME_FIELDS}
    assert options == {f.name for f in dataclasses.fields(DesignOptions)} - {"command", "scheme_options"}


@pytest.mark.parametrize("module", [convert, inspect_command, design])
def test_every_hyper_parameter_of_the_schemes_is_an_option(module):
    names = [parameter.name for parameter in module.command.params]
    assert [name for name in names if name in SCHEME_FIELDS] == SCHEME_FIELDS


def test_the_command_line_offers_every_scheme():
    (scheme,) = (parameter for parameter in convert.command.params if parameter.name == "scheme")
    assert isinstance(scheme.type, click.Choice)
    assert set(scheme.type.choices) == set(SCHEMES)


@pytest.mark.parametrize(
    ("module", "defaults"), [(convert, SchemeOptions()), (inspect_command, SchemeOptions()), (design, FROM_SCRATCH)]
)
def test_help_of_scheme_options_states_the_real_defaults(module, defaults):
    texts = {parameter.name: getattr(parameter, "help", "") for parameter in module.command.params}
    for name in ("terms", "rank_ratio", "factors", "overlap", "policy", "min_group_channels", "group_rounding"):
        value = getattr(defaults, name)
        text = f"{value:.3g}" if isinstance(value, float) else str(value)
        assert f"(default {text})" in texts[name], name
