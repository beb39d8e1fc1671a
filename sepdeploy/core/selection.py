"""What the selection weighs: candidates with their price on the target and the damage they do, and what was chosen."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Literal

from sepdeploy.core.artifact import Precision
from sepdeploy.core.chain import ChainSum, Size
from sepdeploy.core.conv import ConvSpec
from sepdeploy.core.measurement import Method
from sepdeploy.core.mixed import Arithmetic
from sepdeploy.core.passing_errors import is_passing
from sepdeploy.core.plan import Candidate, Kept
from sepdeploy.errors import SepdeployError, UsageError

__all__ = ["Activation", "Choice", "FusedBlock", "LayerChoices", "Price", "Selection", "Unpriced"]

Activation = Literal["", "relu", "relu6", "hardswish", "silu", "sigmoid", "hardsigmoid", "leaky_relu", "gelu"]
"""What follows a convolution (and its batch norm) and nothing else reads; empty for none, or one that is not known."""


@dataclass(frozen=True, slots=True)
class FusedBlock:
    """One call of a layer as a runtime computes it: its form with a bias, the batch norm folded, and the activation.

    Attributes:
        form: The chains; a dense convolution is one factor.
        spec: Geometry of the convolution that the form stands for.
        input_size: (H, W) of what it reads, before any padding.
        positions: Images in the call, 1 for a convolution; a linear layer counts its positions here and has (1, 1).
        activation: What follows.
        lowering: Lowerings that are applied to the form, in order.
        is_linear: Whether it stands for an nn.Linear, which runs as a matrix product.
        mixed: How it computes inside of an int8 file, conversions around it included; None for the target's precision.
    """

    form: ChainSum
    spec: ConvSpec
    input_size: Size
    positions: int = 1
    activation: Activation = ""
    lowering: tuple[str, ...] = ()
    is_linear: bool = False
    mixed: Arithmetic | None = None


@dataclass(frozen=True, slots=True)
class Price:
    """What a block costs on the target, beside the dense block of the same geometry in the same rounds.

    Attributes:
        value: Of the block, median.
        dense_value: Of the dense block, median.
        difference: Median of value - dense_value within rounds: below 0 is a gain.
        difference_low: Lower end of its 95% interval.
        difference_high: Upper end.
        unit: 'ms' or 'kcycles'.
        repeats: Rounds behind it.
        method: How it came about.
    """

    value: float
    dense_value: float
    difference: float
    difference_low: float
    difference_high: float
    unit: str
    repeats: int
    method: Method


@dataclass(frozen=True, slots=True)
class Unpriced:
    """Why a block has no price.

    Attributes:
        reason: A sentence.
        is_lasting: Whether another try would end the same: the block is at fault, not what the machine lacked then.
    """

    reason: str
    is_lasting: bool

    @classmethod
    def of(cls, error: SepdeployError) -> Unpriced:
        """What an error while the block was built or run comes to."""
        return cls(str(error), not is_passing(error))

    def within(self, what: str) -> Unpriced:
        """The same as the reason for something else.

        >>> Unpriced("no such operator", True).within("the layer as it is cannot be measured").reason
        'the layer as it is cannot be measured: no such operator'
        """
        return replace(self, reason=f"{what}: {self.reason}")


@dataclass(frozen=True, slots=True)
class Choice:
    """One thing that a layer could become.

    Attributes:
        label: For the user, unique within the layer: 'dense', 'depthwise_separable T=2'.
        candidate: The form; None keeps the layer.
        lowering: How it is written down in the target's file.
        difference: Change of the network's cost against keeping the layer, all calls, in the target's unit.
        difference_low: Lower end of its 95% interval.
        difference_high: Upper end.
        damage: Change of the network's outputs with this alone in place (`analyze/damage.py`); 0 for keeping it.
        macs: Multiply-accumulates of all calls, one image.
        params: Weights and biases.
        peak_bytes: Peak of the activations (float32) of the whole network while this layer runs; None if not asked for.
    """

    label: str
    candidate: Candidate | None
    lowering: tuple[str, ...]
    difference: float
    difference_low: float
    difference_high: float
    damage: float
    macs: int
    params: int
    peak_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class LayerChoices:
    """All that was weighed for one layer.

    Attributes:
        name: Of the layer.
        choices: The first keeps the layer.
        refused: Label -> why it was not weighed further.
        kept: Why nothing but keeping it is possible; None if something is.
    """

    name: str
    choices: tuple[Choice, ...]
    refused: dict[str, str] = field(default_factory=dict)
    kept: Kept | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """All that was weighed for a network on one target, and what was chosen: the file of `sepdeploy plan`.

    To decide otherwise, change `chosen`: layer -> label of one of its choices.

    Attributes:
        chosen: Layer -> label of what it becomes, for all `layers`.
        model_sha256: Hash of the checkpoint.
        target: Name of the target.
        precision: Precision that was priced.
        threads: Threads of the runtime.
        unit: Of all costs.
        method: How the costs came about.
        original_cost: Of the whole original network, median.
        layers: What was weighed, per layer in the order of the trace.
        notes: What the user should know of how it was priced.
        takes_slower_forms: Whether forms were eligible that are not faster: something else than speed was asked for.
        taken_back: Layer -> why it went back to what it was after the whole was measured.

    Raises:
        UsageError: if a layer is chosen that is not there, one is there twice, or a label is none of its layer's.
    """

    chosen: dict[str, str]
    model_sha256: str
    target: str
    precision: Precision
    threads: int
    unit: str
    method: Method
    original_cost: float
    layers: tuple[LayerChoices, ...]
    notes: tuple[str, ...] = ()
    takes_slower_forms: bool = False
    taken_back: dict[str, str] = field(default_factory=dict)
    format_version: Literal[1] = 1

    def __post_init__(self) -> None:
        twice = [name for name, count in Counter(layer.name for layer in self.layers).items() if count > 1]
        if twice:
            raise UsageError(f"the plan lists {', '.join(twice)} twice")
        unknown = self.chosen.keys() - {layer.name for layer in self.layers}
        if unknown:
            raise UsageError(f"the plan chooses for {', '.join(sorted(unknown))}, which it does not list")
        for layer in self.layers:
            labels = [choice.label for choice in layer.choices]
            if self.chosen.get(layer.name) not in labels:
                raise UsageError(
                    f"the plan chooses {self.chosen.get(layer.name)!r} for {layer.name}; its choices are: "
                    f"{', '.join(labels)}"
                )

    def layer(self, name: str) -> LayerChoices:
        """What was weighed for one layer.

        Raises:
            UsageError: if it is none of the plan's.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        names = ", ".join(layer.name for layer in self.layers)
        raise UsageError(f"the plan has no layer {name}; its layers are: {names}")

    @property
    def choices(self) -> dict[str, Choice]:
        """Layer -> its chosen choice."""
        return {
            layer.name: next(choice for choice in layer.choices if choice.label == self.chosen[layer.name])
            for layer in self.layers
        }

    @property
    def predicted_cost(self) -> float:
        """Of the whole network with everything chosen in place: the original's and all differences."""
        return self.original_cost + sum(choice.difference for choice in self.choices.values())
