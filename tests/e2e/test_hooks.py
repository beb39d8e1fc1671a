"""The user's own training: as a hook on the command line and in Python, and outside of sepdeploy with `adopt`.

LOOP and LIGHTNING are the README's examples: what a user writes, and nothing else.
"""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import sepdeploy
from sepdeploy import pipeline
from sepdeploy.cli.main import run
from sepdeploy.core.codec import read_json, write_json
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.core.report import Report
from sepdeploy.errors import UsageError
from sepdeploy.stages.bundle import read_weights

README = (Path(__file__).parents[2] / "README.md").read_text()


def example_after(sentence: str) -> str:
    """The README's code block that follows `sentence`, as a user would copy it."""
    return README.split(sentence, 1)[1].split("```python\n", 1)[1].split("```", 1)[0]


LOOP = example_after("Your own loop instead, in `loop.py`")
LIGHTNING = example_after("With Lightning (")


class Trainer:
    """What the example needs of lightning.Trainer, whose checkpoints have this form too."""

    def __init__(self, max_epochs, default_root_dir):
        self.max_epochs, self.folder = max_epochs, default_root_dir

    def fit(self, module, batches):
        optimizer = module.configure_optimizers()
        for _ in range(self.max_epochs):
            for index, batch in enumerate(batches):
                optimizer.zero_grad()
                module.training_step(batch, index).backward()
                optimizer.step()
        torch.save({"state_dict": module.state_dict(), "epoch": self.max_epochs}, self.folder / "last.ckpt")


@pytest.fixture(scope="module")
def options(workplace):
    """A network whose statistics are those of the images, and a poor start: one term, from the kernels alone."""
    return workplace.options(
        "Classifier",
        model=workplace.trained(),
        validation=workplace.images(),
        scheme_options=SchemeOptions(terms=1),
        transfer="data-free",
    )


@pytest.fixture(scope="module")
def converted(options):
    sepdeploy.convert(options)
    return options.output_folder


@pytest.fixture
def bundle(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def write(tmp_path):
    def write_code(name: str, code: str) -> Path:
        (tmp_path / name).write_text(code)
        return tmp_path / name

    return write_code


def weights(bundle) -> dict[str, torch.Tensor]:
    return sepdeploy.load(bundle).state_dict()


def are_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def require_consistent(bundle, x: np.ndarray) -> None:
    """The exported file computes what the bundle's network does."""
    session = onnxruntime.InferenceSession(bundle / "model.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = sepdeploy.load(bundle)(torch.from_numpy(x)).numpy()
    found = np.concatenate([session.run(None, {"input": image[None]})[0] for image in x])
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.fixture
def unexported(monkeypatch):
    """Runs end with the trained network: files and measurements are the same code for all."""

    def finish(store, options, inputs, traced, plan, guard, last, evaluator, record, progress):
        write_json(store.folder / "options.json", record)
        return last

    monkeypatch.setattr(pipeline, "finish_bundle", finish)


def test_a_plain_loop_on_the_command_line(workplace, bundle, write, capfd):
    before = weights(bundle)
    plan = (bundle / "plan.json").read_bytes()
    images = workplace.images(count=256)  # the first half are the validation images
    arguments = ["finetune", str(bundle), "--train", images, "--finetune-hook", f"{write('loop.py', LOOP)}:train"]
    assert run([*arguments, "--json"]) in (0, 1)  # 1: too briefly timed to be sure of the speed
    report = json.loads(capfd.readouterr().out)
    step = report["recovery"][-1]
    assert (step["name"], step["is_kept"], step["images"]) == ("hook", True, 32)
    assert step["damage_after"] < 0.8 * step["damage_before"]
    assert report["converted_quality"]["relative_error"] < report["transferred_quality"]["relative_error"]
    assert not are_equal(weights(bundle), before)
    assert (bundle / "plan.json").read_bytes() == plan
    require_consistent(bundle, np.random.default_rng(0).random((4, 3, 16, 16), np.float32))
    assert report == json.loads((bundle / "report.json").read_bytes())
    assert any(note.startswith("128 images of --train are validation images too") for note in report["notes"])


def test_a_lightning_style_module_is_looked_through_and_its_checkpoint_adopted(workplace, bundle, write, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning", SimpleNamespace(LightningModule=nn.Module, Trainer=Trainer))
    images = workplace.images(count=256)
    report = sepdeploy.finetune(bundle, images, finetune=f"{write('lit.py', LIGHTNING)}:train")
    assert report.recovery[-1].damage_after < report.recovery[-1].damage_before
    assert "&& sepdeploy.finetune" not in report.command
    trained = weights(bundle)

    checkpoint = bundle / "work" / "hook" / "last.ckpt"
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert are_equal({k.removeprefix("model."): v for k, v in saved.items() if k.startswith("model.")}, trained)

    report = sepdeploy.adopt(bundle, checkpoint)
    assert report.recovery[-1].name == "adopted"
    assert [step.name for step in report.recovery].count("hook") == 0
    assert are_equal(weights(bundle), trained)


def test_a_callable_gets_what_a_loop_needs(workplace, bundle):
    seen = []

    def loop(model, teacher, context):
        seen.append(context)
        assert not any(p.requires_grad for p in teacher.parameters())
        assert all(p.requires_grad for p in model.parameters())
        (context.folder / "note.txt").write_text("mine")
        with torch.no_grad():
            model.linear.bias[0] += 25
        teacher.linear.bias.zero_()  # a copy: the original stays as it is
        return model

    before = weights(bundle)
    original = (bundle / "original" / "model.onnx").read_bytes()
    train = workplace.images(count=256, labels="Classifier")
    report = sepdeploy.finetune(bundle, train, finetune=loop)
    (context,) = seen
    assert len(context.train) == 128, "without the validation images"
    assert context.train.labels is not None
    assert (len(context.calibration), len(context.held_out)) == (96, 32)
    assert context.replaced == tuple(report.plan.replaced)
    assert set(context.blocks) <= {name for name, _ in sepdeploy.load(bundle).named_modules()}
    assert (bundle / "work" / "hook" / "note.txt").read_text() == "mine"
    assert float(weights(bundle)["linear.bias"][0] - before["linear.bias"][0]) == pytest.approx(25)
    assert (bundle / "original" / "model.onnx").read_bytes() == original
    assert any("after the step 'hook' the outputs are further from the original's" in note for note in report.notes)


def test_a_hook_of_a_file_runs_again_only_if_it_changed_and_a_closure_always(bundle, write, unexported):
    code = (
        LOOP
        + "\n\ndef count(model, teacher, context):\n    "
        + ("with (context.folder / 'calls').open('a') as file:\n        file.write('x')\n    return model\n")
    )
    spec = f"{write('count.py', code)}:count"
    calls = bundle / "work" / "hook" / "calls"
    for expected, added in ((1, ""), (1, ""), (2, "# changed\n")):
        Path(spec.removesuffix(":count")).write_text(code + added)
        sepdeploy.finetune(bundle, finetune=spec)
        assert len(calls.read_text()) == expected

    times = []
    for _ in range(2):
        sepdeploy.finetune(bundle, finetune=lambda model, teacher, context: times.append(1) or model)
    assert len(times) == 2


def test_convert_takes_a_hook_too_and_goes_back_without(options, converted, tmp_path, unexported):
    def loop(model, teacher, context):
        assert context.train is None
        with torch.no_grad():
            model.linear.weight *= 1.5
        return model

    target = replace(options, output=tmp_path / "hooked")
    last = sepdeploy.convert(target, finetune=loop)
    assert [step.name for step in last.steps] == ["hook"]
    hooked, plain = (read_weights(folder / "model.pt")["linear.weight"] for folder in (target.output, converted))
    assert torch.equal(hooked, 1.5 * plain)
    sepdeploy.convert(target)
    assert (target.output / "model.pt").read_bytes() == (converted / "model.pt").read_bytes()


def test_load_train_adopt(converted, bundle):
    torch.manual_seed(0)
    network = sepdeploy.load(bundle)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    network(torch.rand(8, 3, 16, 16)).square().mean().backward()
    optimizer.step()

    report = sepdeploy.adopt(bundle, nn.DataParallel(network))
    assert are_equal(weights(bundle), network.state_dict())
    assert report.recovery[-1].name == "adopted"
    assert report == read_json(Report, bundle / "report.json")
    require_consistent(bundle, np.random.default_rng(1).random((4, 3, 16, 16), np.float32))
    assert (bundle / "model.onnx").read_bytes() != (converted / "model.onnx").read_bytes()


def test_adopted_weights_stay_until_others_are_adopted_or_it_is_converted_again(options, converted, bundle, unexported):
    before = read_weights(bundle / "model.pt")
    adopted = {name: value + 1 if name == "linear.bias" else value for name, value in before.items()}
    sepdeploy.adopt(bundle, adopted)
    for _ in range(2):  # what is trained next starts from there, and so does its repetition
        last = sepdeploy.finetune(bundle, finetune=identity)
        assert [step.name for step in last.steps] == ["adopted", "hook"]
        assert are_equal(read_weights(bundle / "model.pt"), adopted)
    last = sepdeploy.adopt(bundle, {f"module.{name}": value for name, value in before.items()})
    assert [step.name for step in last.steps] == ["adopted"]
    assert are_equal(read_weights(bundle / "model.pt"), before)

    sepdeploy.adopt(bundle, adopted)
    last = sepdeploy.convert(replace(options, output=bundle))
    assert last.steps == ()
    assert (bundle / "model.pt").read_bytes() == (converted / "model.pt").read_bytes()


def identity(model, teacher, context):
    return model


class Gelu(nn.Module):
    def forward(self, x):
        return nn.functional.gelu(x)


def with_other_activation(model, teacher, context):
    model.features[1][2] = Gelu()
    return model


def fused(model, teacher, context):
    model.features[1][1] = nn.Identity()
    return model


def diverged(model, teacher, context):
    with torch.no_grad():
        model.linear.weight[0, 0] = float("nan")
    return model


def raising(model, teacher, context):
    return model(torch.zeros(1, 5, 16, 16))


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (lambda model, teacher, context: None, "returned a NoneType; it must return the trained nn.Module"),
        (lambda model, teacher, context: teacher, "is not the converted network: it has no features.1.0"),
        (fused, r"it has no features\.1\.1\.weight"),
        (diverged, r"has NaN or infinite values in linear\.weight: the training diverged"),
        (with_other_activation, "computes something else than the converted network with its weights"),
        (raising, rf"the hook raising fails at .*{Path(__file__).name}:\d+: RuntimeError: .*channels"),
        (lambda model, teacher: model, "TypeError"),
    ],
)
def test_what_hooks_do_wrong_is_one_sentence_and_harms_nothing(bundle, hook, message):
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file() and "work" not in path.parts}
    with pytest.raises(UsageError, match=message) as caught:
        sepdeploy.finetune(bundle, finetune=hook)
    assert "\n" not in str(caught.value)
    assert {p: p.read_bytes() for p in bundle.rglob("*") if p.is_file() and "work" not in p.parts} == before


def test_weights_of_another_network_are_not_adopted(workplace, bundle):
    with pytest.raises(UsageError, match=r"the given Classifier is not the converted network: it has no features"):
        sepdeploy.adopt(bundle, workplace.network("Classifier"))
    with pytest.raises(UsageError, match=r"\.pt is not the converted network"):
        sepdeploy.adopt(bundle, workplace.checkpoint("Segmenter"))
    with pytest.raises(UsageError, match="is no finished bundle"):
        sepdeploy.adopt(bundle.parent, weights(bundle))
