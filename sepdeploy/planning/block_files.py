"""Files of single blocks, made exactly as those of whole networks are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sepdeploy.core.artifact import Format, Precision
from sepdeploy.core.selection import FusedBlock, Unpriced
from sepdeploy.errors import ContractError, SepdeployError, ToolError
from sepdeploy.planning.cut_files import cut_onnx, cut_tflite
from sepdeploy.planning.fused_block import build_block, example_of

__all__ = ["write_block_files"]

_CALIBRATION_IMAGES = 4

_BLOCKS = "blocks"
"""Where `_Framed` holds them."""


def write_block_files(
    blocks: Sequence[FusedBlock], folder: Path, file_format: Format, precision: Precision
) -> list[Path | Unpriced]:
    """Export blocks of one layer, and quantize them.

    ONNX Runtime keeps values in layouts of its own between convolutions, in blocks of channels or channels-last, and
    converts them where another operator or the end of the file comes. Within a network a convolution seldom pays for
    that. So each block stands between two depthwise 1x1 convolutions, which take the same layouts at any number of
    channels: conversions that are left in between are those that the block itself brings about. In LiteRT the layout is
    the same everywhere, and blocks stand alone.

    Args:
        blocks: Blocks that read the same input, as calls of one layer in several forms do.
        folder: Where to write.
        file_format: ONNX or TFLite.
        precision: float32 or int8, quantized on random inputs.

    Returns:
        The file of each block, in order, or why there is none.
    """
    if any(block.mixed is not None for block in blocks):
        return _mixed_files(blocks, folder, file_format)
    networks = {i: _built(block) for i, block in enumerate(blocks)}
    sound = {i: network for i, network in networks.items() if isinstance(network, nn.Module)}
    files: dict[int, Path | Unpriced] = {i: each for i, each in networks.items() if isinstance(each, Unpriced)}
    if len(sound) > 1:
        try:
            # One export of all takes a fifth of the time of one for each.
            common = _written(
                [blocks[i] for i in sound], list(sound.values()), folder / "common", file_format, precision
            )
            cut = cut_onnx if file_format is Format.ONNX else cut_tflite
            files |= zip(sound, cut(common, len(sound)), strict=True)
            return [files[i] for i in networks]
        except SepdeployError:
            pass  # one of them is to blame: each gets a file of its own
    for i, network in sound.items():
        try:
            files[i] = _written([blocks[i]], [network], folder / str(i), file_format, precision)
        except SepdeployError as error:
            files[i] = Unpriced.of(error)
    return [files[i] for i in networks]


def _mixed_files(blocks: Sequence[FusedBlock], folder: Path, file_format: Format) -> list[Path | Unpriced]:
    """Files of int8 blocks, and of the same with the block itself, but not its frame, computed otherwise."""
    written: dict[FusedBlock, tuple[Path, Path] | Unpriced] = {}
    paths: list[Path | Unpriced] = []
    for i, block in enumerate(blocks):
        plain = replace(block, mixed=None)
        base = folder / f"int8-{len(written)}"
        try:
            if plain not in written:
                int8_path = _written([plain], [build_block(plain)], base, file_format, Precision.INT8)
                written[plain] = int8_path, Path(f"{base}.{file_format.value}")
            files = written[plain]
            if isinstance(files, Unpriced):
                paths.append(files)
            elif block.mixed is None:
                paths.append(files[0])
            else:
                paths.append(_mixed(block, *files, folder / f"mixed-{i}.{file_format.value}", file_format))
        except SepdeployError as error:
            reason = Unpriced.of(error)
            written.setdefault(plain, reason)
            paths.append(reason)
    return paths


def _mixed(block: FusedBlock, int8: Path, source: Path, path: Path, file_format: Format) -> Path:
    if block.mixed is None:
        raise ContractError("a block in int8 is not mixed")
    if file_format is Format.ONNX:
        from sepdeploy.quantize.mixed_onnx import mix_onnx

        unknown = mix_onnx(source, int8, path, {_BLOCKS: block.mixed}, is_block=True)
    else:
        from sepdeploy.quantize.mixed_tflite import mix_tflite

        unknown = mix_tflite(source, int8, path, {"": block.mixed})  # it has no frame
    if unknown:
        raise ToolError("its operators are not found in its int8 file")
    return path


class _Framed(nn.Module):
    """Blocks side by side on the same input, each between depthwise 1x1 convolutions; without them if not `has_frame`.

    Args:
        networks: The blocks.
        in_channels: Channels that they read.
        out_channels: Channels that they return.
        has_frame: Whether there are convolutions around them.
    """

    def __init__(self, networks: Sequence[nn.Module], in_channels: int, out_channels: int, *, has_frame: bool) -> None:
        super().__init__()
        self.entry = _scaling(in_channels) if has_frame else nn.Identity()
        self.blocks = nn.ModuleList(networks)
        self.exits = nn.ModuleList(_scaling(out_channels) if has_frame else nn.Identity() for _ in networks)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of all blocks for (N, C, H, W)."""
        x = self.entry(x)
        return tuple(leave(block(x)) for block, leave in zip(self.blocks, self.exits, strict=True))


def _scaling(channels: int) -> nn.Conv2d:
    """A depthwise 1x1 convolution that changes each channel a little."""
    conv = nn.Conv2d(channels, channels, 1, groups=channels, bias=False)
    nn.init.constant_(conv.weight, 0.875)  # not 1: nothing may take it for an identity
    return conv


def _built(block: FusedBlock) -> nn.Module | Unpriced:
    try:
        return build_block(block)
    except SepdeployError as error:
        return Unpriced.of(error)


def _written(
    blocks: Sequence[FusedBlock], networks: Sequence[nn.Module], base: Path, file_format: Format, precision: Precision
) -> Path:
    """One file with an output for each of the blocks."""
    is_linear, spec = blocks[0].is_linear, blocks[0].spec
    has_frame = file_format is Format.ONNX and not is_linear
    network = _Framed(networks, spec.in_channels, spec.out_channels, has_frame=has_frame).eval()
    example = example_of(blocks[0])
    float_path, int8_path = (Path(f"{base}{infix}.{file_format.value}") for infix in ("", ".int8"))
    if file_format is Format.ONNX:
        from sepdeploy.export.onnx import export_onnx
        from sepdeploy.quantize.onnx_qdq import quantize_onnx

        export_onnx(network, example, float_path)
        if precision is Precision.INT8:
            quantize_onnx(float_path, int8_path, _images(example))
    else:
        from sepdeploy.export.tflite import export_tflite
        from sepdeploy.quantize.tflite_int8 import quantize_tflite

        export_tflite(network, example, float_path, is_channels_last=not is_linear)
        if precision is Precision.INT8:
            images = _images(example)
            quantize_tflite(
                float_path, int8_path, images if is_linear else (image.transpose(0, 2, 3, 1) for image in images)
            )
    return float_path if precision is Precision.FLOAT32 else int8_path


def _images(example: Tensor) -> Iterator[np.ndarray]:
    """Random inputs like `example`, always the same."""
    generator = torch.Generator().manual_seed(_CALIBRATION_IMAGES)
    for _ in range(_CALIBRATION_IMAGES):
        yield torch.randn(example.shape, generator=generator).numpy()
