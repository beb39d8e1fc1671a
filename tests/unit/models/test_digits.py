import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from sepdeploy.models import train_digits
from sepdeploy.models.digits import digits_cnn, load_images

REPOSITORY = Path(__file__).parents[3]
MANIFEST = REPOSITORY / "calibration" / "digits.toml"


@pytest.fixture(scope="module")
def splits() -> train_digits.DigitSplits:
    return train_digits.load_splits(MANIFEST)


@pytest.fixture
def _restore_torch_settings():
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def test_network_is_small_and_maps_32x32_to_ten_scores() -> None:
    model = digits_cnn().eval()

    assert sum(parameter.numel() * 4 for parameter in model.parameters()) < 1_000_000
    assert model(torch.zeros(3, 1, 32, 32)).shape == (3, 10)


def test_images_span_the_whole_range() -> None:
    images, labels = load_images()

    assert images.shape == (1797, 8, 8, 1)
    assert images.dtype == np.uint8
    assert (images.min(), images.max()) == (0, 255)
    assert labels.shape == (1797,)
    assert labels.dtype == np.int64
    assert set(labels) == set(range(10))


def test_checkpoint_is_as_accurate_as_promised(splits: train_digits.DigitSplits) -> None:
    model = digits_cnn().eval()
    model.load_state_dict(torch.load(REPOSITORY / "models" / "digits.pt", weights_only=True))

    ratio = train_digits.accuracy_ratio(model, splits.validation_images, splits.validation_labels)

    assert ratio >= 0.985


def test_splits_do_not_overlap() -> None:
    settings = tomllib.loads(MANIFEST.read_text())["splits"]
    calibration, validation = (
        set(range(1797)[slice(split.get("start"), split.get("stop"), split.get("step"))])
        for split in (settings["calibration"], settings["validation"])
    )

    assert len(calibration) == 512
    assert validation == set(range(1297, 1797))
    assert not calibration & validation


def test_training_uses_all_that_is_not_validation_and_the_manifests_normalisation(
    splits: train_digits.DigitSplits,
) -> None:
    _, labels = load_images()

    assert splits.train_labels.tolist() == labels[:1297].tolist()
    assert splits.validation_labels.tolist() == labels[1297:].tolist()
    assert splits.train_images.mean().item() == pytest.approx(0, abs=0.01)
    assert splits.train_images.std().item() == pytest.approx(1, abs=0.01)
    assert splits.train_images.min().item() == pytest.approx(splits.background)


def test_the_same_seed_gives_the_same_weights(splits: train_digits.DigitSplits) -> None:
    images, labels = splits.train_images[:96], splits.train_labels[:96]

    def run(seed: int) -> torch.nn.Module:
        return train_digits.train(images, labels, epochs=2, seed=seed, background=splits.background)

    first, second, other = run(0), run(0), run(1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    assert not first.training


def test_training_leaves_the_global_generator_alone(splits: train_digits.DigitSplits) -> None:
    before = torch.get_rng_state()

    train_digits.train(
        splits.train_images[:32], splits.train_labels[:32], epochs=1, seed=0, background=splits.background
    )

    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("_restore_torch_settings")
def test_script_trains_says_the_accuracy_and_leaves_one_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_digits.main(["--epochs", "1", "--output", str(tmp_path / "first.pt")])

    assert "of 500 held-out digits are right" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["first.pt"]
    digits_cnn().load_state_dict(torch.load(tmp_path / "first.pt", weights_only=True))


def test_saved_bytes_do_not_depend_on_the_file_name(tmp_path: Path) -> None:
    model = digits_cnn()

    train_digits.save_weights(model, tmp_path / "first.pt")
    train_digits.save_weights(model, tmp_path / "second.pt")

    assert (tmp_path / "first.pt").read_bytes() == (tmp_path / "second.pt").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--output", "missing-folder/x.pt"], "does not exist; create it first"),
    ],
)
def test_script_refuses_bad_options(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        train_digits.main(arguments)

    assert error.value.code == 2
    assert sentence in capsys.readouterr().err
