"""The whole job on the checkpoint that is shipped: one conversion, then everything that its bundle promises."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import sepdeploy
from sepdeploy.bench import files
from sepdeploy.bench.timing import measure
from sepdeploy.cli.main import run
from sepdeploy.core.codec import read_json
from sepdeploy.core.report import Report
from sepdeploy.core.stage_store import StageStore
from sepdeploy.data.images import open_images

ROOT = Path(__file__).parents[2]
ARTIFACTS = ("model.onnx", "model.int8.onnx", "model.tflite", "model.int8.tflite")
FILES = ("plan.json", "model.pt", "options.json", *ARTIFACTS, "report.json", "report.html", "manifest.json")
OPTIONS = (
    "convert", str(ROOT / "models" / "digits.pt"), "--arch", "models.digits:digits_cnn",
    "--calibration", "calibration/digits.toml", "--validation", "calibration/digits.toml", "--max-drop", "1",
    "--scheme", "depthwise_separable",
    "--no-reconstruct",  # takes a minute; tests/e2e/test_finetune_command.py has it on smaller networks
)  # fmt: skip


def hashes(bundle: Path) -> dict[str, str]:
    names = ("plan.json", "model.pt", *ARTIFACTS, *(f"original/{name}" for name in ARTIFACTS))
    return {name: hashlib.sha256((bundle / name).read_bytes()).hexdigest() for name in names}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "demo"
    assert run([*OPTIONS, "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def report(bundle):
    return json.loads((bundle / "report.json").read_bytes())


@pytest.fixture(scope="module")
def images():
    # Preprocessed again from the manifest: nothing of the run is reused.
    found = open_images("calibration/digits.toml", role="validation")
    batches = list(found.batches(100))
    return np.concatenate([x for x, _ in batches]), np.concatenate([y for _, y in batches])


def onnx_outputs(path: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"input": image[None]})[0] for image in images])


def interpreter(path: Path):
    from ai_edge_litert.interpreter import Interpreter

    found = Interpreter(str(path))
    found.allocate_tensors()
    return found


def tflite_outputs(path: Path, images: np.ndarray) -> np.ndarray:
    model = interpreter(path)
    into, out = model.get_input_details()[0], model.get_output_details()[0]
    results = []
    for image in images:
        x = image[None].transpose(0, 2, 3, 1)
        if into["dtype"] == np.int8:
            scale, zero = into["quantization"]
            x = np.clip(np.rint(x / scale) + zero, -128, 127).astype(np.int8)
        model.set_tensor(into["index"], np.ascontiguousarray(x))
        model.invoke()
        y = model.get_tensor(out["index"]).astype(np.float32)
        if out["dtype"] == np.int8:
            scale, zero = out["quantization"]
            y = (y - zero) * scale
        results.append(y)
    return np.concatenate(results)


def result_of(report: dict, name: str) -> dict:
    (found,) = (result for result in report["artifacts"] if result["artifact"]["path"] == name)
    return found


def test_every_file_is_there_and_nothing_temporary(bundle):
    assert {path.name for path in bundle.iterdir()} == {*FILES, "original", "work"}
    assert not list(bundle.rglob(".*"))


def test_manifest_hashes_the_files(bundle):
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    assert set(manifest["files"]) == {*FILES[:-1], *(f"original/{name}" for name in ARTIFACTS)}
    for name, entry in manifest["files"].items():
        data = (bundle / name).read_bytes()
        assert entry == {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["seed"] == 0
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["model_sha256"] == hashlib.sha256((ROOT / "models" / "digits.pt").read_bytes()).hexdigest()


def test_plan_decides_about_every_convolution(bundle, report):
    plan = json.loads((bundle / "plan.json").read_bytes())
    kinds = [decision["outcome"]["kind"] for decision in plan["decisions"]]
    assert len(kinds) == report["original"]["convs"] == 5
    assert kinds.count("replaced") + kinds.count("kept") == 5
    assert kinds.count("replaced") >= 3
    for decision in plan["decisions"]:
        if decision["outcome"]["kind"] == "kept":
            assert decision["outcome"]["reason"]


@pytest.mark.parametrize("runtime", ["onnx", "tflite"])
def test_float_files_compute_what_the_loaded_bundle_computes(bundle, images, runtime):
    x = images[0][:64]
    with torch.no_grad():
        expected = sepdeploy.load(bundle)(torch.from_numpy(x)).numpy()
    found = (onnx_outputs if runtime == "onnx" else tflite_outputs)(bundle / f"model.{runtime}", x)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_loaded_network_has_the_macs_and_parameters_of_the_report(bundle, report):
    network = sepdeploy.load(bundle)
    assert sum(p.numel() for p in network.parameters()) == report["converted"]["params"]
    assert report["converted"]["macs"] * 3 < report["original"]["macs"]


def test_int8_onnx_computes_its_convolutions_on_int8(bundle):
    graph = onnx.load(bundle / "model.int8.onnx").graph
    makers = {output: node for node in graph.node for output in node.output}
    constants = {value.name: value.data_type for value in graph.initializer}
    convs = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert len(convs) > 5
    for node in convs:
        activation, weight = (makers[name] for name in node.input[:2])
        assert activation.op_type == weight.op_type == "DequantizeLinear"
        assert makers[activation.input[0]].op_type == "QuantizeLinear"
        assert constants[weight.input[0]] == onnx.TensorProto.INT8
        assert constants[activation.input[2]] in (onnx.TensorProto.UINT8, onnx.TensorProto.INT8)
        (channels,) = {len(onnx.numpy_helper.to_array(v)) for v in graph.initializer if v.name == weight.input[1]}
        weights = next(v for v in graph.initializer if v.name == weight.input[0])
        assert channels in weights.dims, "per-channel scales"


def test_int8_tflite_is_int8_from_input_to_output(bundle):
    model = interpreter(bundle / "model.int8.tflite")
    assert model.get_input_details()[0]["dtype"] == np.int8
    assert model.get_output_details()[0]["dtype"] == np.int8
    types = {detail["dtype"] for detail in model.get_tensor_details()}
    assert np.float32 not in types


def test_reports_name_no_float_ops_in_int8_files(report):
    for name in ("model.int8.onnx", "model.int8.tflite"):
        assert result_of(report, name)["float_ops"] == []


@pytest.mark.parametrize("name", [*ARTIFACTS, "original/model.onnx"])
def test_reported_accuracy_is_what_the_runtimes_give(bundle, report, images, name):
    x, labels = images
    scores = (onnx_outputs if name.endswith(".onnx") else tflite_outputs)(bundle / name, x)
    quality = result_of(report, name)["quality"]
    assert quality["images"] == len(labels) == 500
    # Two images of 500 may tip where the order of additions differs; int8 files leave their rounding open.
    assert quality["accuracy_ratio"] == pytest.approx(np.mean(scores.argmax(1) == labels), abs=2 / 500)


def test_promises_hold_and_say_so(report):
    assert [check["name"] for check in report["checks"]] == ["accuracy", "speed"]
    assert all(check["is_met"] for check in report["checks"])
    target = result_of(report, "model.onnx")
    assert target["quality"]["drop_points"] <= 1
    assert target["latency"]["speedup_low"] > 1
    assert report["converted_quality"]["drop_points"] <= 1
    assert report["original_quality"]["accuracy_ratio"] > 0.97


def test_every_latency_names_its_method_and_file(bundle, report):
    for result in report["artifacts"]:
        latency = result["latency"]
        assert latency["artifact_sha256"] == result["artifact"]["sha256"]
        assert latency["environment"]["threads"] == 1
        assert latency["minimum_ms"] <= latency["median_ms"] <= latency["p90_ms"]


def test_report_json_is_readable_and_the_page_stands_alone(bundle):
    assert read_json(Report, bundle / "report.json").is_success
    page = (bundle / "report.html").read_text()
    assert "features.4.0" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "<script src" not in page


@pytest.fixture
def brief_timing(monkeypatch):
    """Where latencies are not the point, 2 s per file are too many."""
    monkeypatch.setattr(files, "measure", lambda *args, **options: measure(*args, **{**options, "seconds": 0.02}))


def test_same_seed_gives_the_same_bundle_and_json_alone_on_stdout(bundle, tmp_path, capfd, brief_timing):
    assert run([*OPTIONS, "--output", str(tmp_path / "again"), "--json"]) in (0, 1)  # 1: too briefly timed to be sure
    printed = json.loads(capfd.readouterr().out)
    assert printed["plan"] == json.loads((bundle / "plan.json").read_bytes())
    assert hashes(tmp_path / "again") == hashes(bundle)


def test_repeating_the_run_redoes_nothing(bundle, monkeypatch, brief_timing):
    ran = []
    original = StageStore.run

    def watched(self, name, inputs, files, make):
        is_new = original(self, name, inputs, files, make)
        ran.append((name, is_new))
        return is_new

    monkeypatch.setattr(StageStore, "run", watched)
    before = {name: (bundle / name).stat().st_mtime_ns for name in hashes(bundle)}
    assert run([*OPTIONS, "--output", str(bundle)]) in (0, 1)
    assert {name for name, _ in ran} >= {
        "trace",
        "plan",
        "guard",
        "export converted onnx",
        "quality converted.int8.tflite",
    }
    assert [name for name, is_new in ran if is_new] == []
    assert {name: (bundle / name).stat().st_mtime_ns for name in before} == before


def test_bench(bundle, capsys):
    paths = [str(bundle / "original" / "model.onnx"), str(bundle / "model.onnx")]
    assert run(["bench", *paths, "--seconds", "0.05", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert list(data) == paths
    assert data[paths[0]]["speedup"] is None
    assert data[paths[1]]["speedup"] > 0
    assert run(["bench", str(bundle / "model.int8.tflite"), "--seconds", "0.05"]) == 0
    assert "ai-edge-litert" in capsys.readouterr().out


def test_inspect(capsys):
    arguments = ["inspect", OPTIONS[1], "--arch", "models.digits:digits_cnn", "--input-shape", "1,32,32"]
    assert run(arguments) == 0
    table = capsys.readouterr().out
    assert "features.4.0" in table
    assert run([*arguments, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [site["name"] for site in data["trace"]["sites"]] == [f"features.{i}.0" for i in range(5)]
    shown = {"depthwise_separable", "spatial_separable", "low_rank", "optimized_separable"}
    assert set(data["candidates"]["features.4.0"]) == shown


def test_the_module_starts_without_torch_and_states_its_version():
    code = (
        "import sys, sepdeploy.cli.main as m\n"
        "commands = ('convert', 'finetune', 'bench')\n"
        "codes = [m.run(a) for a in (['--help'], ['--version'], *([c, '--help'] for c in commands))]\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'litert_torch', 'pydantic', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert codes == [0] * 5 and not heavy, (codes, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"sepdeploy, version {sepdeploy.__version__}" in done.stdout
    help_ = subprocess.run([sys.executable, "-m", "sepdeploy", "--help"], capture_output=True, text=True, timeout=60)
    assert help_.returncode == 0
    assert "Exit codes" in help_.stdout
