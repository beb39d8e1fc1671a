import os

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from sepdeploy.data import images as images_module
from sepdeploy.data.images import open_images
from sepdeploy.data.preprocess import Preprocess
from sepdeploy.errors import UsageError


def save_flat(path, value: int, size=(6, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


@pytest.fixture
def class_folder(tmp_path):
    """Two classes, 5 and 3 images; the grey value says which image it is."""
    root = tmp_path / "set"
    for index in range(5):
        save_flat(root / "cat" / f"{index}.png", index)
    for index in range(3):
        save_flat(root / "dog" / "deeper" / f"{index}.png", 100 + index)
    return root


def values_of(image_set) -> list[int]:
    """The grey value of each image, in order."""
    batches = [batch for batch, _ in image_set.batches(2)]
    return np.rint(np.concatenate(batches)[:, 0, 0, 0] * 255).astype(int).tolist()


def test_loose_folder_has_natural_order_and_no_labels(tmp_path):
    for index in (3, 1, 2):
        save_flat(tmp_path / f"{index}.png", index)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_text("hidden")
    found = open_images(str(tmp_path), role="validation")
    assert values_of(found) == [1, 2, 3]
    assert found.labels is None
    assert found.skipped == ()
    assert found.input_shape == (3, 4, 6)
    assert [labels for _, labels in found.batches(2)] == [None, None]


def test_class_folders_label_by_sorted_name_and_count_empty_ones(class_folder):
    (class_folder / "bird").mkdir()
    (class_folder / ".cache").mkdir()
    found = open_images(str(class_folder), role="validation")
    assert found.class_names == ("bird", "cat", "dog")
    assert found.labels.tolist() == [1, 1, 1, 1, 1, 2, 2, 2]
    assert found.labels.dtype == np.int64
    assert values_of(found) == [0, 1, 2, 3, 4, 100, 101, 102]
    batches = list(found.batches(3))
    assert [len(batch) for batch, _ in batches] == [3, 3, 2]
    assert np.concatenate([labels for _, labels in batches]).tolist() == found.labels.tolist()


def test_a_single_subfolder_is_no_class(tmp_path):
    save_flat(tmp_path / "all" / "a.png", 1)
    found = open_images(str(tmp_path), role="validation")
    assert found.labels is None
    assert found.class_names == ()


def test_links_that_lead_back_are_not_followed_forever(class_folder):
    (class_folder / "cat" / "loop").symlink_to(class_folder)
    (class_folder / "dog" / "more").symlink_to(class_folder / "cat")
    assert len(open_images(str(class_folder), role="validation")) == 5 + 3 + 5


def test_limit_is_balanced_seeded_and_reproducible(class_folder):
    chosen = open_images(str(class_folder), role="validation", limit=4, seed=1)
    assert np.bincount(chosen.labels).tolist() == [2, 2]
    again = open_images(str(class_folder), role="validation", limit=4, seed=1)
    assert values_of(chosen) == values_of(again)
    others = {tuple(values_of(open_images(str(class_folder), role="validation", limit=4, seed=s))) for s in range(5)}
    assert len(others) > 1


def test_limit_beyond_the_set_takes_all(class_folder):
    assert len(open_images(str(class_folder), role="validation", limit=1000)) == 8


def test_calibration_is_mixed_by_class(class_folder):
    found = open_images(str(class_folder), role="calibration")
    assert sorted(values_of(found)) == [0, 1, 2, 3, 4, 100, 101, 102]
    for stop in (2, 4, 6):
        assert np.bincount(found.labels[:stop]).tolist() == [stop // 2, stop // 2]


def test_the_order_does_not_depend_on_the_order_of_the_file_system(tmp_path):
    names = [f"{index}.png" for index in range(8)]
    for root, order in (("one", names), ("two", names[::-1])):
        for name in order:
            save_flat(tmp_path / root / name, int(name[0]))
    one, two = (open_images(str(tmp_path / root), role="calibration", limit=5) for root in ("one", "two"))
    assert values_of(one) == values_of(two)


def test_unreadable_files_are_skipped_named_and_replaced(class_folder):
    (class_folder / "cat" / "empty.png").write_bytes(b"")
    (class_folder / "cat" / "noise.jpg").write_bytes(os.urandom(500))
    whole = (class_folder / "dog" / "deeper" / "0.png").read_bytes()
    (class_folder / "dog" / "cut.png").write_bytes(whole[: len(whole) // 2])
    found = open_images(str(class_folder), role="validation")
    assert sorted(found.skipped) == ["cat/empty.png", "cat/noise.jpg", "dog/cut.png"]
    assert values_of(found) == [0, 1, 2, 3, 4, 100, 101, 102]
    assert found.labels.tolist() == [0] * 5 + [1] * 3
    assert len(open_images(str(class_folder), role="validation", limit=8)) == 8


def test_bombs_are_unreadable(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    save_flat(tmp_path / "good.png", 1)
    save_flat(tmp_path / "warned.png", 1, size=(15, 10))
    save_flat(tmp_path / "bomb.png", 1, size=(50, 50))
    found = open_images(str(tmp_path), role="validation")
    assert sorted(found.skipped) == ["bomb.png", "warned.png"]
    assert len(found) == 1


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for Ghostscript is a shell script")
def test_postscript_never_starts_ghostscript(tmp_path, monkeypatch):
    started = tmp_path / "started"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {started}\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # not looked for yet
    # Pillow tells formats from the content, so a harmless name is no protection.
    save_flat(tmp_path / "set" / "good.png", 1)
    Image.new("RGB", (4, 4)).save(tmp_path / "set" / "script.png", format="EPS")
    assert open_images(str(tmp_path / "set"), role="validation").skipped == ("script.png",)
    assert not started.exists()


def test_names_that_are_no_utf8_can_be_shown(tmp_path):
    save_flat(tmp_path / "good.png", 1)
    try:
        (tmp_path / os.fsdecode(b"bad\xff.png")).write_bytes(b"nothing")
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    (name,) = open_images(str(tmp_path), role="validation").skipped
    assert name.encode() == "bad\N{REPLACEMENT CHARACTER}.png".encode()


def test_differing_sizes_need_a_size(tmp_path):
    save_flat(tmp_path / "a.png", 7, size=(6, 4))
    save_flat(tmp_path / "b.png", 7, size=(8, 4))
    with pytest.raises(UsageError, match=r"a\.png is 4x6 and b\.png is 4x8 .* --input-shape C,H,W"):
        open_images(str(tmp_path), role="validation")
    assert open_images(str(tmp_path), role="validation", input_shape=(3, 5, 5)).input_shape == (3, 5, 5)
    sized = open_images(str(tmp_path), role="validation", preprocess=Preprocess(size=(2, 3)))
    assert sized.input_shape == (3, 2, 3)
    assert values_of(sized) == [7, 7]


def test_input_shape_settles_colour_and_must_agree(tmp_path):
    save_flat(tmp_path / "a.png", 7)
    grey = open_images(str(tmp_path), role="validation", input_shape=(1, 4, 6))
    assert grey.preprocess == Preprocess(size=(4, 6), color="L")
    assert next(grey.batches(1))[0].shape == (1, 1, 4, 6)
    same = Preprocess(size=(4, 6))
    assert open_images(str(tmp_path), role="validation", preprocess=same, input_shape=(3, 4, 6)).preprocess == same
    for preprocess, shape, message in (
        (Preprocess(size=(4, 6)), (3, 6, 4), r"3,6,4 \(C,H,W\) and the size 4,6"),
        (Preprocess(color="L"), (3, 4, 6), "color L has 1 channels, but the network takes 3"),
        (Preprocess(color="BGR"), (1, 4, 6), "color BGR has 3 channels, but the network takes 1"),
        (None, (4, 4, 6), "the network takes 4"),
    ):
        with pytest.raises(UsageError, match=message):
            open_images(str(tmp_path), role="validation", preprocess=preprocess, input_shape=shape)


def test_npz_round_trip(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 2, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.arange(5, dtype=np.uint8))
    found = open_images(str(tmp_path / "a.npz"), role="validation")
    batch, labels = next(found.batches(5))
    np.testing.assert_array_equal(np.rint(batch * 255).astype(np.uint8), pixels.transpose(0, 3, 1, 2))
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert labels.dtype == np.int64


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 4, 5, 1)])
def test_grayscale_npz_has_one_channel_unless_told_otherwise(tmp_path, shape):
    path = tmp_path / "grey.npz"
    np.savez(path, images=np.full(shape, 9, np.uint8))
    assert open_images(str(path), role="validation").input_shape == (1, 4, 5)
    assert open_images(str(path), role="validation", input_shape=(3, 4, 5)).preprocess.color == "RGB"
    three = Preprocess(mean=(0.1, 0.2, 0.3))
    assert open_images(str(path), role="validation", preprocess=three).input_shape == (3, 4, 5)


def test_head_and_split(class_folder):
    found = open_images(str(class_folder), role="validation")
    assert values_of(found.head(3)) == [0, 1, 2]
    assert len(found.head(99)) == 8
    first, rest = found.split(0.5, seed=0)
    assert np.bincount(first.labels).tolist() in ([2, 2], [3, 1])
    assert sorted(values_of(first) + values_of(rest)) == values_of(found)
    assert values_of(first) == values_of(found.split(0.5, seed=0)[0])
    for bad in (0.0, 1.0, -1.0, 0.01):
        with pytest.raises(UsageError, match="one part would be empty"):
            found.split(bad, seed=0)
    with pytest.raises(UsageError, match="at least 1"):
        found.head(0)
    with pytest.raises(UsageError, match="batch size"):
        next(found.batches(0))


def test_without_the_images_of_another_set_whatever_their_files_are_called(class_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(images_module, "_CHUNK", 2)
    for index, value in enumerate((101, 3, 200, 0)):
        save_flat(tmp_path / "other" / f"{index}.bmp", value)
    found, other = (open_images(str(folder), role="validation") for folder in (class_folder, tmp_path / "other"))
    left = found.without(other)
    assert values_of(left) == [1, 2, 4, 100, 102]
    assert left.labels.tolist() == [0, 0, 0, 1, 1]
    assert values_of(other.without(found)) == [200]
    assert len(found.without(found.shuffled(1))) == 0


def test_shuffled_has_the_same_images_in_an_order_of_the_seed(class_folder):
    found = open_images(str(class_folder), role="validation")
    label_of = dict(zip(values_of(found), found.labels.tolist(), strict=True))
    one, two = found.shuffled(1), found.shuffled(2)
    assert sorted(values_of(one)) == values_of(found)
    assert values_of(one) == values_of(found.shuffled(1)) != values_of(two)
    assert one.labels.tolist() == [label_of[value] for value in values_of(one)]
    with pytest.raises(UsageError, match="seed must be at least 0"):
        found.shuffled(-1)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shards_are_contiguous_parts_of_every_batch(class_folder, count):
    found = open_images(str(class_folder), role="validation")
    shards = [list(found.batches(3, shard=(rank, count))) for rank in range(count)]
    for number, (batch, labels) in enumerate(found.batches(3)):
        parts = [shard[number] for shard in shards]
        np.testing.assert_array_equal(np.concatenate([part for part, _ in parts]), batch)
        np.testing.assert_array_equal(np.concatenate([part for _, part in parts]), labels)
        sizes = [len(part) for part, _ in parts]
        assert max(sizes) - min(sizes) <= 1


def test_only_its_own_shard_is_decoded(class_folder, monkeypatch):
    monkeypatch.setattr(images_module, "_CACHE_BYTES", 0)
    found = open_images(str(class_folder), role="validation")
    read = []
    original = found._reader._decode
    monkeypatch.setattr(found._reader, "_decode", lambda index: (read.append(index), original(index))[1])
    list(found.batches(4, shard=(1, 2)))
    assert sorted(read) == [2, 3, 6, 7]
    for shard in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(UsageError, match="no process"):
            next(found.batches(4, shard=shard))


def test_hash_follows_pixels_labels_and_preprocessing(class_folder, tmp_path):
    def hash_of(**options) -> str:
        return open_images(str(class_folder), role="validation", **options).sha256

    before = hash_of()
    assert before == hash_of()
    assert before != hash_of(preprocess=Preprocess(mean=(0.5,)))
    assert before != open_images(str(class_folder), role="validation").head(7).sha256
    save_flat(class_folder / "cat" / "0.png", 55)
    changed = hash_of()
    assert changed != before
    (class_folder / "cat").rename(class_folder / "zebra")
    assert hash_of() != changed


def test_sets_are_told_apart_without_decoding_again(class_folder, monkeypatch):
    monkeypatch.setattr(images_module, "_CACHE_BYTES", 0)
    found = open_images(str(class_folder), role="validation")
    before = found.sha256, values_of(found.without(found.head(2)))
    monkeypatch.setattr(found._reader, "_decode", lambda index: pytest.fail("decoded again"))
    assert found.sha256 == before[0]
    assert len(found.without(found.head(2))) == len(before[1]) == 6


def test_an_image_that_has_become_another_is_refused(class_folder, monkeypatch):
    monkeypatch.setattr(images_module, "_CACHE_BYTES", 0)
    found = open_images(str(class_folder), role="validation")
    save_flat(class_folder / "cat" / "0.png", 55)
    with pytest.raises(UsageError, match=r"cat/0\.png in .* changed while it was in use"):
        values_of(found)


def test_pixels_beyond_the_cache_are_decoded_again(class_folder, monkeypatch):
    cached = open_images(str(class_folder), role="validation")
    monkeypatch.setattr(images_module, "_CACHE_BYTES", 3 * 4 * 6 * 3)
    found = open_images(str(class_folder), role="validation")
    assert len(found._reader._cache) == 3
    assert values_of(found) == values_of(found) == values_of(cached)
    assert found.sha256 == cached.sha256
    (class_folder / "dog" / "deeper" / "2.png").unlink()
    assert values_of(cached)[-1] == 102
    with pytest.raises(UsageError, match=r"dog/deeper/2\.png in .* changed while it was in use"):
        values_of(found)


def test_progress_reaches_the_number_of_images(class_folder):
    calls: list[tuple[int, int]] = []
    open_images(str(class_folder), role="validation", progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (8, 8)
