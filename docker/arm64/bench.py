"""Runs ONNX and TFLite files where they will live: in an emulated Arm root, a container or on a board.

Needs Python 3.8, numpy and the runtime of the files (onnxruntime, ai-edge-litert or tflite-runtime), nothing of
sepdeploy. Prints one JSON object per file, in order, and `{"end": true}` at last: so a reader knows which file a crash
is about.

    {"file": "a.onnx", "threads": 1, "burst": 1, "warmup": 2, "runs_ns": [5151, ...], "regions": 8, "runtime": "..."}
    {"file": "b.onnx", "threads": 1, "burst": 1, "warmup": 0, "runs_ns": [], "regions": 0, "error": "..."}

`runs_ns` are wall-clock times of `burst` inferences each: on a real processor they are latencies, under emulation they
mean nothing. With --marks every burst stands between two marks of the counting plugin (armcount.c): for each warm-up a
pair around nothing and one around a burst, then one around nothing, then those that count. `regions` counts the pairs,
for files that failed as well.
"""

import argparse
import collections
import ctypes
import functools
import gc
import itertools
import json
import os
import sys
import time
from pathlib import Path

MARK = 0x5344
BEGIN, END, NEITHER = 0, 1, 2

PYTHON_WARMUP = 64
"""Python rewrites functions after some calls of them; after so many it is done with that, before anything counts."""

ONNX_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(int16)": "int16",
    "tensor(uint16)": "uint16",
    "tensor(int32)": "int32",
    "tensor(uint32)": "uint32",
    "tensor(int64)": "int64",
    "tensor(uint64)": "uint64",
    "tensor(bool)": "bool",
}


def main():
    """Run every file that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=2, help="runs before the first that counts")
    parser.add_argument("--repeats", type=int, default=3, help="runs that count, at least")
    parser.add_argument("--seconds", type=float, default=0.0, help="go on with timed runs for so long")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs")
    parser.add_argument(
        "--outputs", type=Path, help="folder for 0.npz, 1.npz, ... of the files' outputs, '0', '1', ..."
    )
    parser.add_argument("--bursts", default="", help="runs in a row that make one that counts, for each file: 1,8,...")
    parser.add_argument("--first", type=int, default=0, help="number of the first file there")
    parser.add_argument("--marks", action="store_true", help="mark runs for the counting plugin")
    arguments = parser.parse_args()
    bursts = [int(number) for number in arguments.bursts.split(",") if number]
    for place, path in enumerate(arguments.files, arguments.first):
        burst = bursts[place - arguments.first] if bursts else 1
        report = {
            "file": str(path),
            "threads": arguments.threads,
            "burst": burst,
            "warmup": 0,
            "runs_ns": [],
            "regions": 0,
        }
        try:
            run_file(path, place, arguments, report)
        except Exception as error:  # one bad file of many: the others are run
            report["error"] = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
        print(json.dumps(report), flush=True)
    print(json.dumps({"end": True}), flush=True)


def run_file(path, place, arguments, report):
    """Warm one file up, run it as often as asked, and say how it went in `report`."""
    import numpy as np

    network = OnnxNetwork(path, arguments.threads) if path.suffix == ".onnx" else LitertNetwork(path, arguments.threads)
    report["runtime"] = network.runtime
    rng = np.random.default_rng(arguments.seed)
    network.set_inputs([random_input(shape, np.dtype(dtype), rng) for shape, dtype in network.inputs])
    report["warmup"] = max(1, arguments.warmup)
    measure_runs(network.run if report["burst"] == 1 else repeated(network.run, report["burst"]), arguments, report)
    if arguments.outputs is not None:
        outputs = {str(i): output for i, output in enumerate(network.outputs())}
        np.savez(arguments.outputs / f"{place}.npz", **outputs)


def measure_runs(run, arguments, report):
    """Add the nanoseconds of each run that counts, and how many regions were marked."""
    if arguments.marks:
        syscall = ctypes.CDLL(None).syscall
        syscall.argtypes = [ctypes.c_long, ctypes.c_long]
    else:

        def syscall(number, what):
            pass

    def marked(function, begin=BEGIN, end=END):
        start_ns = time.perf_counter_ns()
        syscall(MARK, begin)
        function()
        syscall(MARK, end)
        elapsed_ns = time.perf_counter_ns() - start_ns
        report["regions"] += arguments.marks and end == END  # not if it raised: then there was no end
        return elapsed_ns

    nothing = functools.partial(int)  # to be called in the same way as what counts
    runs_ns = report["runs_ns"]
    gc.collect()
    gc.disable()
    try:
        for _ in range(PYTHON_WARMUP):
            marked(nothing, NEITHER, NEITHER)
        for _ in range(report["warmup"]):
            marked(nothing)
            marked(run)
        marked(nothing)
        end_ns = time.perf_counter_ns() + int(arguments.seconds * 1e9)
        while len(runs_ns) < arguments.repeats or time.perf_counter_ns() < end_ns:
            runs_ns.append(marked(run))
    finally:
        gc.enable()


def repeated(run, count):
    """What runs `run` so many times, with next to no Python in between."""

    def burst():
        collections.deque(itertools.starmap(run, itertools.repeat((), count)), maxlen=0)

    return functools.partial(burst)


def random_input(shape, dtype, rng):
    """Random values that any network can digest: normal floats, 8-bit integers, and 0 or 1 for wider ones (indices)."""
    import numpy as np

    if np.issubdtype(dtype, np.floating):
        return rng.standard_normal(shape).astype(dtype)
    if dtype in (np.dtype(np.int8), np.dtype(np.uint8)):
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max, size=shape, dtype=dtype, endpoint=True)
    return rng.integers(0, 2, size=shape).astype(dtype)


def static_shape(name, shape):
    """`shape` with 1 for a batch size that the file leaves open (-1)."""
    if any(size < 0 for size in shape[1:]):
        raise ValueError(f"input '{name}' has the dynamic shape {shape}: export it with a fixed height and width")
    return [1 if size < 0 else size for size in shape]


class OnnxNetwork:
    """An ONNX file in onnxruntime."""

    def __init__(self, path, threads):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.runtime = "onnxruntime " + onnxruntime.__version__
        self.names = [value.name for value in self.session.get_inputs()]
        self.inputs = [
            (
                static_shape(value.name, [size if isinstance(size, int) else -1 for size in value.shape]),
                ONNX_TYPES[value.type],
            )
            for value in self.session.get_inputs()
        ]
        self.binding = self.session.io_binding()
        session, binding = getattr(self.session, "_sess", None), getattr(self.binding, "_iobinding", None)
        # What the public method ends in: its Python would count too, and not the same each time.
        if session is None or binding is None:
            self.run = functools.partial(self.session.run_with_iobinding, self.binding)
        else:
            self.run = functools.partial(session.run_with_iobinding, binding, None)

    def set_inputs(self, inputs):
        """Bind what every run reads, and the buffers that it writes."""
        for name, value in zip(self.names, inputs):
            self.binding.bind_cpu_input(name, value)
        for output in self.session.get_outputs():
            self.binding.bind_output(output.name)

    def outputs(self):
        """What the last run computed."""
        return self.binding.copy_outputs_to_cpu()


class LitertNetwork:
    """A TFLite file in LiteRT's interpreter, with its default delegate for the processor (XNNPACK)."""

    def __init__(self, path, threads):
        interpreter_class, self.runtime = interpreter_of_tflite()
        self.interpreter = interpreter_class(model_path=str(path), num_threads=threads)
        self.interpreter.allocate_tensors()
        self.details = self.interpreter.get_input_details()
        for each in self.details:
            static_shape(each["name"], [int(size) for size in each["shape_signature"]])
        self.inputs = [([int(size) for size in each["shape"]], each["dtype"]) for each in self.details]
        bare = getattr(self.interpreter, "_interpreter", None)
        self.run = functools.partial(getattr(bare, "Invoke", self.interpreter.invoke))

    def set_inputs(self, inputs):
        """Fill the tensors that every run reads."""
        for detail, value in zip(self.details, inputs):
            self.interpreter.set_tensor(detail["index"], value)

    def outputs(self):
        """What the last run computed."""
        return [self.interpreter.get_tensor(each["index"]) for each in self.interpreter.get_output_details()]


def interpreter_of_tflite():
    """The interpreter's class, with name and version of its package."""
    from importlib.metadata import version

    try:
        from ai_edge_litert.interpreter import Interpreter

        return Interpreter, "ai-edge-litert " + version("ai-edge-litert")
    except ImportError:
        from tflite_runtime.interpreter import Interpreter

        return Interpreter, "tflite-runtime " + version("tflite-runtime")


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # a thread would pack and send now and then
    sys.exit(main())
