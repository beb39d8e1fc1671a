"""Read what modules inside a network return while the network runs."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sepdeploy.analyze.trace import output_tensors
from sepdeploy.errors import UnsupportedModelError

__all__ = ["FeatureTap"]


class FeatureTap:
    """The outputs of named modules of the passes that run inside a `with` block.

    Outputs are copies that gradients pass through: networks often go on in place on what a module returned (`relu_`,
    `+=`). Nothing is left on the network after the block.

    Args:
        model: The network.
        names: Qualified names of modules; '' is the network itself.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True))
        >>> with FeatureTap(model, ("0",)) as tap:
        ...     out = model(torch.ones(1, 2))
        ...     features = tap.features
        >>> [tuple(feature.shape) for feature in features]
        [(1, 3)]
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._modules = {name: model.get_submodule(name) for name in names}
        self._seen: dict[str, tuple[Tensor, ...]] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._seen.clear()  # activations and their graph must not live on

    @property
    def features(self) -> tuple[Tensor, ...]:
        """Output tensors of the last call of each module, in the order of the names.

        A module that returns several tensors gives them all, in pytree order.

        Raises:
            UnsupportedModelError: if no pass called one of the modules.
        """
        missing = [name for name in self._modules if name not in self._seen]
        if missing:
            raise UnsupportedModelError(
                f"the network did not call {missing[0] or 'itself'} in its forward pass; which modules run must not "
                "depend on the image or on whether the network is training"
            )
        return tuple(tensor for name in self._modules for tensor in self._seen[name])

    def _hook(self, name: str) -> Any:
        def keep(_module: nn.Module, _args: tuple[Any, ...], output: object) -> None:
            self._seen[name] = tuple(tensor.clone() for tensor in output_tensors(output))

        return keep
