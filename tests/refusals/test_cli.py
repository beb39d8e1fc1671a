"""What the worst users do at the command line: one sentence, the right exit code, nothing left behind."""

import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sepdeploy.cli.main import run

ROOT = Path(__file__).parents[2]
DIGITS = str(ROOT / "models" / "digits.pt")
ARCH = "models.digits:digits_cnn"
MANIFEST = "calibration/digits.toml"

NETWORKS = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=4, channels=3, kernel=3):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 8, 3, 2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.conv = nn.Conv2d(8, 16, kernel)
        self.linear = nn.Linear(16, num_classes)

    def forward(self, x):
        return self.linear(self.conv(self.stem(x)).relu().mean((2, 3)))

def wide_kernel():
    return Net(kernel=9)

def narrow(width=1.0):
    if width >= 2:
        raise ValueError(f"width {width} is too much")
    return nn.Sequential(nn.Conv2d(3, int(16 * width), 3), nn.Conv2d(16, 16, 3))

def fails():
    raise ValueError("no such\\nfactory")
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory: nets.py, net.pt, wide.pt, images.npz."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(textwrap.dedent(NETWORKS))
    names: dict = {}
    exec(NETWORKS, names)
    torch.manual_seed(0)
    torch.save(names["Net"]().state_dict(), "net.pt")
    torch.save(names["wide_kernel"]().state_dict(), "wide.pt")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (32, 16, 16, 3), np.uint8)
    np.savez("images.npz", images=images, labels=rng.integers(0, 4, 32))
    return tmp_path


def convert(*arguments, model="net.pt", arch="nets.py:Net", calibration="images.npz", output="out"):
    scheme = () if {"--scheme", "--plan", "--objective"} & set(arguments) else ("--scheme", "depthwise_separable")
    return [
        "convert", str(model), "--arch", arch, "--calibration", str(calibration), "--output", str(output),
        "--formats", "onnx", "--no-reconstruct", *scheme, *arguments,
    ]  # fmt: skip


def refusal(capfd, arguments, code) -> str:
    """The one sentence on standard error; standard output is empty."""
    assert run(arguments) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err
    lines = err.splitlines()
    if lines[0].startswith("Usage: "):  # click's way: how to call it, and the sentence
        assert lines[-1].startswith("Error: ")
        return lines[-1].removeprefix("Error: ")
    assert len(lines) == 1, err
    assert lines[0].startswith("sepdeploy: ")
    return lines[0].removeprefix("sepdeploy: ")


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def write_bad_model(kind: str) -> str:
    good = torch.load("net.pt", weights_only=True)
    if kind == "corrupt":
        Path("bad.pt").write_bytes(Path("net.pt").read_bytes()[:2000])
    elif kind == "malicious":
        Path("bad.pt").write_bytes(pickle.dumps({"state_dict": RunsCode()}))
    elif kind == "incomplete":
        del good["conv.weight"], good["linear.bias"]
        torch.save({**good, "extra.weight": torch.zeros(1)}, "bad.pt")
    elif kind == "ten classes":
        torch.save({**good, "linear.weight": torch.zeros(10, 16), "linear.bias": torch.zeros(10)}, "bad.pt")
    elif kind == "nan":
        good["conv.weight"][0, 0, 0, 0] = float("nan")
        torch.save(good, "bad.pt")
    elif kind == "folder":
        Path("bad.pt").mkdir()
    return "bad.pt"


@pytest.mark.parametrize(
    ("kind", "code", "parts"),
    [
        ("missing", 2, ["bad.pt", "No such file"]),
        ("folder", 2, ["bad.pt is a folder"]),
        ("corrupt", 2, ["bad.pt", "damaged"]),
        ("malicious", 5, ["bad.pt", "would run code"]),
        ("incomplete", 2, ["2 missing (conv.weight, linear.bias)", "1 unexpected (extra.weight)"]),
        ("ten classes", 2, ["nets.py:Net(num_classes=10)"]),
        ("nan", 3, ["NaN", "check its weights"]),
    ],
)
def test_models(place, capfd, kind, code, parts):
    message = refusal(capfd, convert(model=write_bad_model(kind)), code)
    for part in parts:
        assert part in message
    assert not (place / "executed").exists()
    assert not (place / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("arch", "code", "part"),
    [
        ("nets.py", 2, "nets.py"),
        ("nets.py:Missing", 2, "Missing"),
        ("none.py:Net", 2, "none.py"),
        ("nets.py:fails", 2, "no such"),
        ("no_such_package.models:Net", 2, "no_such_package"),
        ("models.resnet_cifar:resnet20", 2, "another architecture"),
        ("nets.py:Net(channels=1)", 2, "3 input channels"),
    ],
)
def test_architectures(place, capfd, arch, code, part):
    assert part in refusal(capfd, convert(arch=arch), code)
    assert not (place / "out").exists()


def test_input_too_small_for_the_network(place, capfd):
    message = refusal(capfd, convert("--input-shape", "3,8,8", model="wide.pt", arch="nets.py:wide_kernel"), 2)
    assert "does not run on an input of shape (1, 3, 8, 8)" in message
    assert "--input-shape" in message


def test_input_with_other_channels(place, capfd):
    assert "1" in refusal(capfd, convert("--input-shape", "1,16,16"), 2)
    assert "color RGB has 3 channels, but the network takes 5" in refusal(capfd, convert("--input-shape", "5,16,16"), 2)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--scheme", "spatial_separable", "--terms", "2"], "--terms belongs to --scheme depthwise_separable"),
        (["--rank-ratio", "0.5"], "--rank-ratio belongs to --scheme spatial_separable or low_rank, not to depthwise"),
        (
            ["--factors", "3"],
            "--factors belongs to --scheme optimized_separable or spatial_optimized, not to",
        ),
        (["--scheme", "optimized_separable", "--factors", "0"], "--factors must be 1 to 12 or 'optimal', got 0"),
        (["--scheme", "optimized_separable", "--overlap", "nan"], "--overlap must be a number above 0"),
        (["--scheme", "optimized_separable", "--groups", "0,auto"], "must be at least 1"),
        (["--scheme", "optimized_separable", "--groups", "8,x"], "G[,G...]"),
        (["--scheme", "optimized_separable", "--kernel-sizes", "3,3"], "3x1,1x3"),
        (["--scheme", "depthwise", "--min-group-channels", "8"], "--min-group-channels belongs to --scheme grouped or"),
        (["--rank-ratio", "nan", "--scheme", "spatial_separable"], "rank-ratio"),
        (["--target", "litert"], "--target litert runs tflite files, which --formats leaves out"),
        (["--target", "cortex-a53:ort", "--threads", "2"], "models one core: --threads must be 1, got 2"),
        (["--formats", "onnx,coreml"], "onnx, tflite"),
        (["--formats", ","], "onnx, tflite"),
        (["--max-drop", "nan"], "--max-drop"),
        (["--max-drop", "101"], "--max-drop"),
        (["--max-drop", "-1"], "--max-drop"),
        (["--input-shape", "3,16"], "C,H,W"),
        (["--input-shape", "3,0,16"], "below 1"),
        (["--scheme", "magic"], "magic"),
        (["--seed", "-1"], "--seed"),
        (["--threads", "0"], "--threads"),
        (["--preprocess", "none.toml"], "none.toml"),
        (["--no-such-option"], "--no-such-option"),
        (["--validation", "nowhere"], "nowhere does not exist"),
        (["--train", "nowhere"], "nowhere does not exist"),
        (["--epochs", "3"], "--epochs belongs to --train: give both or neither"),
        (["--train", "images.npz", "--finetune-hook", "nets.py:Net", "--ema", "0"], "--ema has no effect beside"),
        (["--train", "images.npz", "--train-augment", "auto,flip"], "auto and none stand alone"),
        (["--train", "images.npz", "--train-augment", "rotate"], "'rotate' is not a list of auto, none, flip"),
        (["--train", "images.npz", "--learning-rate", "0"], "--learning-rate"),
        (["--train", "images.npz", "--epochs", "0"], "--epochs"),
        (["--recoverable", "3"], "--recoverable adds to --max-drop: give both or neither"),
        (["--max-drop", "1", "--recoverable", "-1"], "--recoverable"),
        (["--transfer", "data-free", "--reconstruct"], "--reconstruct needs images"),
        (["--finetune-hook", "nets.py"], "'nets.py' is not a hook; give path/to/file.py:function"),
        (["--finetune-hook", "none.py:train"], "cannot read none.py: No such file"),
        (["--finetune-hook", "nets.py:trian"], "nets.py has no trian"),
    ],
)
def test_options(place, capfd, arguments, part):
    assert part in refusal(capfd, convert(*arguments), 2)
    assert not (place / "out").exists()


def test_finetune(place, capfd):
    (place / "other").mkdir()
    for bundle in ("nowhere", "other", "net.pt"):
        arguments = ["finetune", bundle, "--train", "images.npz"]
        assert f"{bundle} is no finished bundle of 'sepdeploy convert'" in refusal(capfd, arguments, 2)
    assert "there is nothing to train" in refusal(capfd, ["finetune", "other"], 2)
    assert "--epochs belongs to --train" in refusal(capfd, ["finetune", "other", "--epochs", "3"], 2)
    assert list((place / "other").iterdir()) == []


def test_a_hook_that_fails_is_named_with_its_line_and_with_debug_its_traceback(place, capfd):
    (place / "loop.py").write_text("def train(model, teacher, context):\n    return model.no_such_layer\n")
    arguments = convert("--finetune-hook", "loop.py:train", "--max-drop", "100")
    message = refusal(capfd, arguments, 2)
    assert message.startswith("the hook loop.py:train fails at ")
    assert "loop.py:2: AttributeError: 'Net' object has no attribute 'no_such_layer'" in message
    assert run([*arguments, "--debug"]) == 2
    assert "return model.no_such_layer" in capfd.readouterr().err


def test_json_has_the_error_on_standard_output(place, capfd):
    for arguments, code in ((["--json"], 2), (["--json", "--terms", "x"], 2)):
        assert run(convert(*arguments, model="none.pt")) == code
        out, err = capfd.readouterr()
        error = json.loads(out)["error"]
        assert error["exit_code"] == code
        assert error["message"] in err
        assert error["type"] == "UsageError"


@pytest.mark.parametrize(
    ("name", "part"),
    [("empty", "holds no images"), ("one.png", "is not a folder"), ("labels.npz", "label 7 is no class")],
)
def test_images(place, capfd, name, part):
    (place / "empty").mkdir()
    Image.new("RGB", (16, 16)).save("one.png")
    np.savez("labels.npz", images=np.zeros((16, 16, 16, 3), np.uint8), labels=np.full(16, 7))
    assert part in refusal(capfd, convert(calibration=name), 2)
    assert not (place / "out" / "manifest.json").exists()


def test_too_few_images_to_hold_some_out(place, capfd):
    np.savez("three.npz", images=np.zeros((3, 16, 16, 3), np.uint8))
    assert "too few to hold some out" in refusal(capfd, convert(calibration="three.npz"), 2)


def test_unreadable_images_are_skipped_counted_and_named(place, capfd):
    rng = np.random.default_rng(0)
    (place / "photos").mkdir()
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(f"photos/{i:02}.png")
    (place / "photos" / "empty.png").write_bytes(b"")
    (place / "photos" / "cut.png").write_bytes((place / "photos" / "03.png").read_bytes()[:200])
    # Unlabelled on top: agreement with the original takes the place of accuracy.
    assert run([*convert(calibration="photos"), "--validation", "photos", "--max-drop", "100", "--json"]) in (0, 1)
    report = json.loads(capfd.readouterr().out)
    assert report["calibration"]["images"] == report["validation"]["images"] == 20
    assert sorted(report["validation"]["skipped"]) == ["cut.png", "empty.png"]
    (note,) = (note for note in report["notes"] if "cannot be read" in note)
    assert note.startswith("2 files in photos")
    assert "cut.png" in note
    assert report["validation"]["is_labelled"] is False
    assert report["converted_quality"]["drop_basis"] == "agreement"
    assert report["converted_quality"]["accuracy_ratio"] is None


def test_output_with_other_files_is_left_alone(place, capfd):
    (place / "mine").mkdir()
    (place / "mine" / "thesis.txt").write_text("important")
    assert "mine holds other files" in refusal(capfd, convert(output="mine"), 2)
    assert "holds other files" in refusal(capfd, convert(output="."), 2)
    assert [path.name for path in (place / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("output", ["net.pt", "net.pt/below", "/proc/sepdeploy", "/dev/null"])
def test_output_that_cannot_be_a_folder(place, capfd, output):
    before = (place / "net.pt").read_bytes()
    assert "write" in refusal(capfd, convert(output=output), 2)
    assert (place / "net.pt").read_bytes() == before


@pytest.mark.parametrize("limit_bytes", [3000, 12000])
def test_full_disk(place, limit_bytes):
    """A limit on the size of a file fails like a full disk: 3000 bytes stop the weights, 12000 the export."""

    code = (
        "import resource, sys; from sepdeploy.cli.main import main\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit_bytes}, {limit_bytes})); main(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", code, *convert()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "cannot write out/" in done.stderr
    assert "free space" in done.stderr
    assert list((place / "out").rglob(".*")) == []
    assert not (place / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [("none.onnx", None), ("bad.onnx", b"junk"), ("bad.tflite", b"junk"), ("net.pt", None), ("empty.tflite", b"")],
)
def test_bench(place, capfd, name, content):
    if content is not None:
        (place / name).write_bytes(content)
    assert name in refusal(capfd, ["bench", name], 2)


def test_inspect(place, capfd):
    arguments = ["inspect", "net.pt", "--arch", "nets.py:Net", "--input-shape"]
    assert "does not run on an input of shape (1, 5, 16, 16)" in refusal(capfd, [*arguments, "5,16,16"], 2)
    assert "No such file" in refusal(capfd, ["inspect", "none.pt", "--arch", "nets.py:Net"], 2)

    network = [*arguments, "3,16,16", "--scheme"]
    assert "--terms belongs to --scheme depthwise_separable" in refusal(
        capfd, [*network, "low_rank", "--terms", "1"], 2
    )
    assert "'dense' is not a list of depthwise" in refusal(capfd, [*network, "dense"], 2)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--arch", "nets.py:Net"], "no argument that scales its channels"),
        (["--arch", "nets.py:Net", "--width-argument", "depth"], "has no argument 'depth'; it takes num_classes"),
        (["--arch", "nets.py:Net", "--multiplier", "0"], "--multiplier"),
        (["--arch", "nets.py:Net", "--multiplier", "nan"], "--multiplier"),
        (["--arch", "nets.py:Net", "--step", "0"], "--step"),
        (["--arch", "nets.py:Net", "--scheme", "dense"], "'dense' is not a list of all, depthwise"),
        (["--arch", "nets.py:Net", "--scheme", "all", "--output", "out"], "--output takes one variant"),
        (["--arch", "nets.py:Net", "--match", "latency"], "'latency' is not one of"),
        (["--arch", "nets.py:Net", "--middle", "relu"], "'relu' is not one of"),
        (
            ["--arch", "nets.py:Net", "--terms", "2"],
            "--terms belongs to --scheme depthwise_separable, not",
        ),
        (
            ["--arch", "nets.py:Net", "--multiplier", "1", "--input-shape", "5,16,16"],
            "does not run on an input of shape",
        ),
        (["--arch", "nets.py:Net", "--multiplier", "1", "--output", "net.pt"], "write"),
        (["--arch", "nets.py:Net", "--multiplier", "1", "--kernel-position", "3"], "--kernel-position 3 is beyond"),
        (["--arch", "nets.py:Net", "--factors", "3", "--groups", "8,8"], "--groups 2, --factors 3; make them agree"),
        (["--arch", "nets.py:Net", "--policy", "linear", "--middle-channels", "8"], "--policy has no effect beside"),
        (["--arch", "nets.py:Net", "--kernel-position", "1", "--kernel-sizes", "3x1,1x3"], "give one of them"),
        (["--arch", "nets.py:Net", "--multiplier", "1", "--match", "macs"], "leave out --match"),
        (["--arch", "nets.py:Net", "--activation", "silu"], "give both or neither"),
        (["--arch", "nets.py:Net", "--multiplier", "1", "--seed", str(2**64)], "--seed"),
        (["--arch", "nets.py:narrow", "--multiplier", "0.5"], "does not run as optimized_separable: RuntimeError"),
        (["--arch", "nets.py:narrow"], "width 2.0 is too much; give a --multiplier"),
        (["--arch", "nets.py:Gone"], "nets.py has no Gone"),
        (["--arch", "timm:no_such_net"], "timm"),
        ([], "--arch"),
    ],
)
def test_design(place, capfd, arguments, part):
    shape = [] if "--input-shape" in arguments else ["--input-shape", "3,16,16"]
    code = 4 if "timm" in part else 2
    assert part in refusal(capfd, ["design", *arguments, *shape], code)
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--channels", "0"], "--channels"),
        (["--kernel-size", "x"], "--kernel-size"),
        (["--input-size", "-3"], "--input-size"),
        (["--scheme", "dense"], "No such option"),
    ],
)
def test_schemes(capfd, arguments, part):
    assert part in refusal(capfd, ["schemes", *arguments], 2)


def test_unknown_commands_and_none(capfd):
    assert "frobnicate" in refusal(capfd, ["frobnicate"], 2)
    assert "Missing argument" in refusal(capfd, ["convert"], 2)
    assert run([]) == 2


def plan(*arguments, calibration="images.npz"):
    return ["plan", "net.pt", "--arch", "nets.py:Net", "--calibration", str(calibration), "--output", "out", *arguments]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "net.pt", "--arch", "nets.py:Net"], "give --calibration, or --explain LAYER with a plan"),
        (["plan", "net.pt"], "give --arch and --calibration"),
        (["plan", "net.pt", "--explain", "conv"], "net.pt is not a valid Selection"),
        (plan("--pareto", "front.txt"), "a picture is written as .png or .svg, not as '.txt'"),
        (plan("--max-ratio", "2"), "'--max-ratio'"),
        (plan("--max-size", "banana"), "'banana' is not a size above 0"),
        (plan(calibration="empty"), "empty holds no images"),
        (convert("--plan", "nothing.json"), "cannot read nothing.json"),
        (convert("--plan", "corrupt.json"), "corrupt.json is not a valid Plan"),
        (convert("--plan", "corrupt.json", "--scheme", "low_rank"), "leave out --scheme"),
    ],
)
def test_plans_are_refused_before_anything_takes_long(place, capfd, arguments, message):
    (place / "empty").mkdir()
    (place / "corrupt.json").write_text('{"layers": [')
    assert message in refusal(capfd, arguments, 2)
    assert not (place / "out").exists()
