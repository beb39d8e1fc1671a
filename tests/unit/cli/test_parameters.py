import click
import pytest

from sepdeploy.cli.parameters import CommaList, Shape, shown_progress
from sepdeploy.core.progress import Silent


@pytest.mark.parametrize(("text", "shape"), [("3,224,224", (3, 224, 224)), (" 1, 32 ,32", (1, 32, 32))])
def test_shapes(text, shape):
    assert Shape().convert(text, None, None) == shape
    assert Shape().convert(shape, None, None) == shape


@pytest.mark.parametrize("text", ["", "3", "3,4", "3,4,5,6", "a,b,c", "3.0,4,5", "0,4,5", "3,-4,5"])
def test_texts_that_are_no_shapes(text):
    with pytest.raises(click.BadParameter):
        Shape().convert(text, None, None)


def test_comma_lists():
    kind = CommaList(("onnx", "tflite"))
    assert kind.convert("tflite, onnx,tflite", None, None) == ("tflite", "onnx")
    for text in ("", ",", "onnx,coreml"):
        with pytest.raises(click.BadParameter, match="onnx, tflite"):
            kind.convert(text, None, None)


def test_progress_is_silent_without_a_terminal():
    with shown_progress(is_quiet=False) as progress:
        assert isinstance(progress, Silent)
    with shown_progress(is_quiet=True) as progress:
        assert isinstance(progress, Silent)
