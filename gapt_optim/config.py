"""Configuration: typed fields, each with what it does, its unit and its range.

A value that cannot work is refused at once, with the field's name, rather than hundreds of steps into
a run. Every class is frozen, so a configuration can be shared.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, ser_json_inf_nan="constants")


class EntropyConfig(_Section):
    """How the entropy of one layer is computed.

    >>> EntropyConfig(window=16).kernel
    'cosine'
    """

    kernel: Literal["linear", "cosine"] = "cosine"
    """Kernel of the Gram matrix: `cosine` uses the direction of each token, `linear` also its length. With `linear`, a
    few long tokens bring the entropy to nearly 0 while all others keep their directions."""

    center: bool = True
    """Subtract the mean of the window (with `cosine`, after rows are scaled to unit length), so that a vector which all
    tokens share does not count as compression."""

    alpha: float = Field(2.0, gt=0.0)
    """Order of the Rényi entropy, in (0, inf]. 2 needs no eigenvalues and is the cheapest, and is
    mostly about the largest directions. Orders below 1 count small directions too."""

    window: int | None = Field(8, ge=2)
    """Consecutive tokens per matrix; None takes the whole sequence as one matrix."""

    normalize: bool = False
    """Divide by the logarithm of the largest rank, so that entropies lie in [0, 1] instead of nats. That rank is
    min(live rows, features), with `center` min(live rows - 1, features)."""

    @model_validator(mode="after")
    def _centering_leaves_an_entropy(self) -> EntropyConfig:
        if self.center and self.window == 2:
            raise ValueError(
                "window=2 with center=True leaves one direction, whose entropy is always 0; set window to 3 or more, "
                "or center=False"
            )
        return self


class GateConfig(_Section):
    """When training moves from one phase to the other.

    An *update* of the gate is one optimizer step with ``signal="train"`` and one recorded
    validation loss with ``signal="validation"``; both patiences count updates.

    >>> GateConfig(patience_memorization=30).rule
    'smoothed'
    """

    rule: Literal["smoothed", "published"] = "smoothed"
    """`smoothed` judges moving averages within the present phase; `published` judges single
    minibatches against their minimum over the whole run, as the paper does."""

    patience_memorization: int = Field(15, ge=1)
    """Updates without improvement of the loss before compression starts. Steps at which the largest learning
    rate of the wrapped optimizer has just risen (a warm-up) are not counted (`smoothed` only)."""

    patience_compression: int = Field(25, ge=1)
    """Updates without improvement of the entropy before memorization starts."""

    min_improvement: float = Field(0.01, ge=0.0, lt=1.0)
    """Relative fall that counts as an improvement (0.01 = 1 %). `smoothed` measures it against the level, or against
    twenty times the spread around it where that is larger, so that a loss near zero or below is judged as any other."""

    spike_tolerance: float = Field(0.2, gt=0.0)
    """Relative rise of the loss that ends compression at the next update (0.2 = 20 %), of the training loss in
    `smoothed` and of the one that is judged in `published`; measured likewise."""

    smoothing: float = Field(0.9, ge=0.0, lt=1.0)
    """Decay of the moving averages per update; its time constant is -1/log(smoothing) updates.
    Not used by `published`."""

    signal: Literal["train", "validation"] = "train"
    """The loss that is judged: that of the training steps, or the values given to
    ``optimizer.record_validation``. With `validation`, compression starts when generalization stalls;
    in `smoothed`, a spike still means one of the training loss."""

    initial_phase: Literal["memorization", "compression"] = "memorization"
    """Phase of the first step."""

    frozen: bool = False
    """Never leave the initial phase. Frozen in compression is a constant entropy penalty."""

    @classmethod
    def published(cls, **changes: Any) -> GateConfig:
        """The late gate of the author's code; ``changes`` override.

        His patiences count micro-batches, ours optimizer steps: at his 8 micro-batches a step, 125 and 75 are 16 and 9.
        """
        settings: dict[str, Any] = {
            "rule": "published",
            "patience_memorization": 125,
            "patience_compression": 75,
            "min_improvement": 0.01,
            "spike_tolerance": 0.1,
            "smoothing": 0.0,
        }
        return cls(**(settings | changes))

    @classmethod
    def validation(cls, **changes: Any) -> GateConfig:
        """Settings for judging a held-out loss a few dozen times in a run; ``changes`` override.

        Its values come from the same data each time and have little noise, so they are not smoothed, and any fall of
        the loss or the entropy counts. With a large weight, a rise of the training loss soon ends compression.
        """
        settings: dict[str, Any] = {
            "signal": "validation",
            "patience_memorization": 2,
            "patience_compression": 2,
            "min_improvement": 0.0,
            "spike_tolerance": 0.1,
            "smoothing": 0.0,
        }
        return cls(**(settings | changes))


class ObjectiveConfig(_Section):
    """What compression minimizes: loss + weight * entropy, or with ``direction="up"`` loss - weight * entropy.

    >>> floor = ObjectiveConfig(weight=1.0, direction="up", target_share=1.0)  # only below its value at the start
    """

    weight: float = Field(0.03, ge=0.0, allow_inf_nan=False)
    """Weight of the entropy in the objective, per nat."""

    direction: Literal["down", "up"] = "down"
    """`down` presses entropies down, so that representations use fewer directions; `up` presses them up."""

    target: float | None = Field(None, ge=0.0, allow_inf_nan=False)
    """Where pressing stops, layer by layer (same unit as the entropy): a layer whose entropy is on the far side of it
    is left alone. With `up` it is a floor from below. None = no end."""

    target_share: float | None = Field(None, gt=0.0, allow_inf_nan=False)
    """The same as a share of the layer's own entropy at step `start`. That step measures it and presses nothing."""

    start: int = Field(0, ge=0)
    """Optimizer steps before anything is pressed, whatever the phase: with 5, ``metrics.step`` 6 is the first."""

    max_nonfinite: int = Field(25, ge=1)
    """Steps in a row with a non-finite loss or entropy after which ``step()`` raises."""

    @model_validator(mode="after")
    def _one_target(self) -> ObjectiveConfig:
        if self.target is not None and self.target_share is not None:
            raise ValueError(
                f"target={self.target} and target_share={self.target_share} both say where pressing stops; set one"
            )
        return self


class LayerConfig(_Section):
    """Which of the watched layers count, and how their entropies are combined into one number.

    >>> LayerConfig(skip_first=1, skip_last=1).schedule
    'all'
    """

    schedule: Literal["all", "rotate"] = "all"
    """Which layers a step presses: `all` equally, or `rotate`, one at a time in turn."""

    skip_first: int = Field(0, ge=0)
    """Number of first layers to leave out. Applies only if more than skip_first + skip_last layers are watched."""

    skip_last: int = Field(0, ge=0)
    """Number of last layers to leave out, under the same condition."""

    reduce: Literal["mean", "largest_drop"] = "mean"
    """What is pressed: the `mean` of the layers' entropies, or `largest_drop`, that of the layer behind the steepest
    fall from one layer to the next."""

    @model_validator(mode="after")
    def _shape_needs_all_layers(self) -> LayerConfig:
        if self.reduce == "largest_drop" and self.schedule != "all":
            raise ValueError(
                f'reduce="largest_drop" judges the profile of all layers, found schedule="{self.schedule}"; '
                'use schedule="all", or reduce="mean"'
            )
        return self


class AlignmentConfig(_Section):
    """How often what is for people is taken: angles between the gradients of loss and entropy, and measures.

    >>> AlignmentConfig(parameter_every=50).every
    10
    """

    every: int = Field(10, ge=0)
    """Optimizer steps from one measurement to the next of the angle at every watched layer, and of
    ``metrics.measures``: the first step is measured, and each whose number is a multiple of it. 0 = never."""

    parameter_every: int = Field(0, ge=0)
    """The same for the angle between parameter gradients, which takes one more gradient; 0 = never."""


class GAPTConfig(_Section):
    """All settings of a :class:`gapt_optim.GAPTOptimizer`.

    >>> config = GAPTConfig(gate=GateConfig(patience_memorization=30), objective=ObjectiveConfig(weight=0.1))
    >>> GAPTConfig.model_validate_json(config.model_dump_json()) == config
    True
    """

    entropy: EntropyConfig = EntropyConfig()
    gate: GateConfig = GateConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    layers: LayerConfig = LayerConfig()
    alignment: AlignmentConfig = AlignmentConfig()

    @classmethod
    def plain(cls, **changes: Any) -> GAPTConfig:
        """Memorization alone: the wrapped optimizer's own training, with entropies read; ``changes`` override."""
        return cls(**({"gate": GateConfig(frozen=True)} | changes))

    @classmethod
    def penalty(cls, **changes: Any) -> GAPTConfig:
        """Compression alone: a constant weight on the entropy, from ``objective.start`` on; ``changes`` override."""
        return cls(**({"gate": GateConfig(initial_phase="compression", frozen=True)} | changes))

    @classmethod
    def published(cls, **changes: Any) -> GAPTConfig:
        """The late protocol of arXiv 2505.08727, as the author's code for text has it; ``changes`` override.

        The linear kernel, not centered; his late gate; weight 20, on the layer of the largest drop among all but the
        first and the last.
        """
        settings: dict[str, Any] = {
            "entropy": EntropyConfig(kernel="linear", center=False),
            "gate": GateConfig.published(),
            "objective": ObjectiveConfig(weight=20.0),
            "layers": LayerConfig(skip_first=1, skip_last=1, reduce="largest_drop"),
        }
        return cls(**(settings | changes))

    @model_validator(mode="after")
    def _target_can_be_reached(self) -> GAPTConfig:
        target, window = self.objective.target, self.entropy.window
        if target is None:
            return self
        limit = math.inf
        if self.entropy.normalize:
            limit = 1.0
        elif window is not None:
            limit = math.log(window - self.entropy.center)
        if target > limit * (1 + 1e-9):
            raise ValueError(
                f"objective.target={target} is above {limit:.4g}, the largest entropy with entropy.window={window}, "
                f"center={self.entropy.center}, normalize={self.entropy.normalize}; set a lower target or a longer "
                "window"
            )
        return self
