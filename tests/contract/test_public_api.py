import dataclasses
import inspect
import subprocess
import sys

import click
import pytest

import sepdeploy
from sepdeploy.cli import convert, design
from sepdeploy.cli import finetune as finetune_command
from sepdeploy.cli import inspect as inspect_command
from sepdeploy.cli import plan as plan_command
from sepdeploy.core.design import FROM_SCRATCH, DesignOptions
from sepdeploy.core.int8 import Int8Options
from sepdeploy.core.options import ConvertOptions, MovedInputs, SelectionOptions
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.core.training import TrainOptions
from sepdeploy.schemes.scheme import SCHEMES

SELECTION = {
    "objective": "goal", "max_latency": "max_latency", "max_ratio": "max_latency_ratio", "max_size": "max_size_bytes",
    "max_memory": "max_memory_bytes", "pricing_time": "pricing_seconds",
}  # fmt: skip
INT8 = {
    "calibration_method": "calibration_method", "io": "io", "equalize": "equalizes", "bias_correction": "corrects_bias",
    "adaptive_rounding": "rounds_adaptively",
}  # fmt: skip
SCHEME_FIELDS = [field.name for field in dataclasses.fields(SchemeOptions)]


def test_all_names():
    assert sepdeploy.__all__ == [
        "ConvertOptions", "DesignOptions", "FinetuneContext", "Int8Options", "MovedInputs", "ReconstructOptions",
        "SelectionOptions", "SeparableConv2d", "TrainOptions", "__version__", "adopt", "convert", "design", "finetune",
        "load", "plan",
    ]  # fmt: skip
    for name in sepdeploy.__all__:
        assert getattr(sepdeploy, name) is not None
    assert sepdeploy.__version__.count(".") == 2


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sepdeploy.nothing  # noqa: B018
    assert not hasattr(sepdeploy, "no_such_name")


def test_signatures():
    assert list(inspect.signature(sepdeploy.convert).parameters) == ["options", "progress", "finetune"]
    finetune = ["bundle", "train", "training", "finetune", "moved", "command", "progress"]
    assert list(inspect.signature(sepdeploy.finetune).parameters) == finetune
    assert list(inspect.signature(sepdeploy.adopt).parameters) == ["bundle", "model", "moved", "progress"]
    assert list(inspect.signature(sepdeploy.design).parameters) == ["options", "progress"]
    assert list(inspect.signature(sepdeploy.plan).parameters) == ["options", "folder", "front_points", "progress"]
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
    grouped = {"int8", "scheme_options", "selection", "training"}
    python = {f.name for f in dataclasses.fields(ConvertOptions)} - {"bench_seconds", "command", *grouped}
    renamed = {"max_drop": "max_drop_points", "recoverable": "recoverable_points"}
    options = {renamed.get(name, name) for name in by_name} - {"as_json", *INT8, *SCHEME_FIELDS, *SELECTION}
    assert {name for name in options if not name.startswith("training_")} == python


def test_every_command_that_selects_has_all_fields_of_the_selection():
    assert set(SELECTION.values()) == {f.name for f in dataclasses.fields(SelectionOptions)} - {"seconds_per_block"}
    defaults = SelectionOptions()
    for module in (convert, plan_command):
        context = module.command.make_context("x", ["m.pt", "--arch", "a:b", "--calibration", "c"])
        assert {name: context.params[name] for name in SELECTION} == {
            name: getattr(defaults, field) for name, field in SELECTION.items()
        }


def test_convert_has_all_fields_of_int8():
    assert set(INT8.values()) == {f.name for f in dataclasses.fields(Int8Options)}
    params = convert.command.make_context("x", ["m.pt", "--arch", "a:b", "--calibration", "c"]).params
    assert {INT8[name]: params[name] for name in INT8} == dataclasses.asdict(Int8Options())


def test_finetune_and_convert_have_the_same_training_and_finetune_can_be_told_of_every_moved_input():
    names = [[p.name for p in module.command.params] for module in (convert, finetune_command)]
    of_convert, of_finetune = ([name for name in each if name.startswith("training_")] for each in names)
    assert of_convert == of_finetune
    assert {name.removeprefix("training_") for name in of_convert} <= {f.name for f in dataclasses.fields(TrainOptions)}
    moved = {f.name for f in dataclasses.fields(MovedInputs)}
    others = {"bundle", "train", "finetune_hook", "seed", "as_json"}
    assert set(names[1]) == moved | others | set(of_finetune)


@pytest.mark.parametrize("module", [convert, finetune_command])
def test_help_of_training_options_states_the_real_defaults(module):
    texts = {parameter.name: getattr(parameter, "help", "") for parameter in module.command.params}
    defaults = TrainOptions()
    for name in ("epochs", "batch_size", "optimizer", "ema_decay", "precision", "batch_norm"):
        assert f"default {getattr(defaults, name)})" in texts[f"training_{name}"], name


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
    assert set(scheme.type.choices) == {"auto", *SCHEMES}


@pytest.mark.parametrize(
    ("module", "defaults"), [(convert, SchemeOptions()), (inspect_command, SchemeOptions()), (design, FROM_SCRATCH)]
)
def test_help_of_scheme_options_states_the_real_defaults(module, defaults):
    texts = {parameter.name: getattr(parameter, "help", "") for parameter in module.command.params}
    for name in ("terms", "rank_ratio", "factors", "overlap", "policy", "min_group_channels", "group_rounding"):
        value = getattr(defaults, name)
        text = f"{value:.3g}" if isinstance(value, float) else str(value)
        assert f"(default {text})" in texts[name], name
