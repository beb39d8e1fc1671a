import numpy as np
import pytest
from PIL import Image

from sepdeploy.data.decode import decode
from sepdeploy.data.preprocess import Preprocess


def gradient(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16"])
@pytest.mark.parametrize("color", ["RGB", "L"])
def test_every_mode_of_pillow_becomes_the_colour_asked_for(mode, color):
    image = Image.fromarray(np.full((4, 6), 40000, np.uint16)) if mode == "I;16" else Image.new(mode, (6, 4))
    pixels = decode(image, Preprocess(color=color), None)
    assert pixels.shape == (4, 6, 1 if color == "L" else 3)
    assert pixels.dtype == np.uint8


def test_sixteen_bit_images_are_scaled_and_not_clipped():
    image = Image.fromarray(np.array([[0, 256, 40000, 65535]], np.uint16))
    assert decode(image, Preprocess(color="L"), None)[0, :, 0].tolist() == [0, 1, 156, 255]


def test_palette_with_transparency_keeps_its_colours():
    image = Image.new("P", (1, 1))
    image.putpalette([10, 20, 30])
    image.info["transparency"] = b"\x80"
    assert decode(image, Preprocess(), None).tolist() == [[[10, 20, 30]]]


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(gradient(2, 5)).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image:
        pixels = decode(image, Preprocess(), None)
    np.testing.assert_array_equal(pixels, np.rot90(gradient(2, 5), k=-1))


def test_float_images_are_refused():
    with pytest.raises(ValueError, match="no known range"):
        decode(Image.new("F", (2, 2)), Preprocess(), None)


@pytest.mark.parametrize(("height", "width"), [(30, 50), (50, 30), (40, 40), (7, 90)])
@pytest.mark.parametrize("resize", ["stretch", "crop"])
def test_the_result_has_the_size_asked_for(height, width, resize):
    image = Image.fromarray(gradient(height, width))
    for size in ((16, 16), (16, 24), (24, 10)):
        assert decode(image, Preprocess(resize=resize), size).shape == (*size, 3)


def test_crop_is_the_imagenet_habit():
    # Shorter side 40 to 32 / 0.5 = 64, so 60 to 96; then the 32 x 32 in the middle.
    image = Image.fromarray(gradient(40, 60))
    expected = image.resize((96, 64), Image.Resampling.BILINEAR).crop((32, 16, 64, 48))
    pixels = decode(image, Preprocess(resize="crop", crop_ratio=0.5), (32, 32))
    np.testing.assert_array_equal(pixels, np.asarray(expected))


def test_interpolation_is_the_filter_asked_for():
    image = Image.fromarray(gradient(20, 20))
    for name in ("bilinear", "bicubic", "nearest", "lanczos"):
        expected = np.asarray(image.resize((9, 7), Image.Resampling[name.upper()]))
        np.testing.assert_array_equal(decode(image, Preprocess(interpolation=name), (7, 9)), expected)


def test_a_strip_that_would_grow_beyond_memory_is_refused():
    with pytest.raises(ValueError, match="strip"):
        decode(Image.new("L", (60000, 1)), Preprocess(color="L", resize="crop"), (224, 224))
