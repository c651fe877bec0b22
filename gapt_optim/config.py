"""Configuration: typed fields, each with what it does, its unit and its range.

A value that cannot work is refused at once, with the field's name, rather than hundreds of steps into
a run. Every class is frozen, so a configuration can be shared.
"""

from __future__ import annotations

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
    >>> plain, penalty = GateConfig(frozen=True), GateConfig(initial_phase="compression", frozen=True)
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
    """Relative fall that counts as an improvement (0.01 = 1 %)."""

    spike_tolerance: float = Field(0.2, gt=0.0)
    """Relative rise of the training loss that ends compression at the next update (0.2 = 20 %)."""

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
        """The paper's rule with the settings of its forgetting experiment; ``changes`` override."""
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
    """What compression minimizes: loss + weight * entropy.

    >>> ObjectiveConfig(weight=0.1, floor=0.2).combine
    'sum'
    """

    weight: float = Field(0.03, ge=0.0, allow_inf_nan=False)
    """Weight of the entropy in the objective, per nat."""

    combine: Literal["sum", "project"] = "sum"
    """How the entropy gradient joins the loss gradient at a layer: `sum` adds it, `project` first
    drops the part that points against the loss gradient."""

    floor: float = Field(0.0, ge=0.0, allow_inf_nan=False)
    """A layer whose entropy is at or below this is not compressed further (same unit as the entropy)."""

    max_nonfinite: int = Field(25, ge=1)
    """Steps in a row with a non-finite loss or entropy after which ``step()`` raises."""


class LayerConfig(_Section):
    """Which of the tapped layers count, and how their entropies are combined into one number.

    >>> LayerConfig(skip_first=1, skip_last=1).schedule
    'all'
    """

    schedule: Literal["all", "rotate", "alternate", "blocks", "progressive", "valley", "mountain", "slope"] = "all"
    """Which layers a step compresses: `all` equally; `rotate` one at a time, in turn; `alternate` every other one;
    `blocks` a third of the depth at a time, in turn; `progressive` the last one first, then more; `valley` mostly the
    middle, `mountain` mostly the ends, `slope` mostly the late ones."""

    skip_first: int = Field(0, ge=0)
    """Number of first layers to leave out. Applies only if more than skip_first + skip_last layers are tapped."""

    skip_last: int = Field(0, ge=0)
    """Number of last layers to leave out, under the same condition."""

    reduce: Literal["mean", "max", "min", "largest_drop"] = "mean"
    """What is minimized: the `mean`, `max` or `min` of the layers' entropies; `largest_drop`, the entropy of the layer
    after the steepest fall."""

    period: int = Field(100, ge=1)
    """Compression steps after which `blocks` and `progressive` move on."""

    @model_validator(mode="after")
    def _shape_needs_all_layers(self) -> LayerConfig:
        if self.reduce == "largest_drop" and self.schedule != "all":
            raise ValueError(
                f'reduce="largest_drop" judges the profile of all layers, found schedule="{self.schedule}"; '
                'use schedule="all", or reduce="mean", "max" or "min"'
            )
        return self


class AlignmentConfig(_Section):
    """Where and how often the angle between the loss and entropy gradients is measured.

    >>> AlignmentConfig(parameter_every=50).activation
    True
    """

    activation: bool = True
    """Measure it at every tapped layer, every step, in the one backward pass."""

    parameter_every: int = Field(0, ge=0)
    """Measure it between parameter gradients, every so many optimizer steps; 0 = never."""

    parameter_streaming: bool = False
    """Hold the entropy gradient of one parameter at a time instead of all. Compares the first micro-batch of the step
    only. For one process, and reduce="mean", schedule="all", combine="sum", floor=0."""

    project_parameters: bool = False
    """On the steps that measure it, remove from the parameters' entropy gradient the part that points against the
    loss gradient. Changes training; needs parameter_every > 0."""

    @model_validator(mode="after")
    def _project_needs_alignment(self) -> AlignmentConfig:
        if self.project_parameters and self.parameter_every == 0:
            raise ValueError(
                "project_parameters=True needs parameter_every > 0: it acts on the steps of parameter alignment"
            )
        if self.project_parameters and self.parameter_streaming:
            raise ValueError("project_parameters=True needs the whole entropy gradient: set parameter_streaming=False")
        return self


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
        """Never compress: the bare optimizer, bit for bit, with its entropies recorded; ``changes`` override.

        >>> GAPTConfig.plain(objective=ObjectiveConfig(weight=0.1)).gate.frozen
        True
        """
        settings: dict[str, Any] = {"gate": GateConfig(frozen=True)}
        return cls(**(settings | changes))

    @classmethod
    def penalty(cls, **changes: Any) -> GAPTConfig:
        """Always compress: a constant weight on the entropy, that of ``objective``; ``changes`` override.

        >>> GAPTConfig.penalty(objective=ObjectiveConfig(weight=0.1)).gate.initial_phase
        'compression'
        """
        settings: dict[str, Any] = {"gate": GateConfig(initial_phase="compression", frozen=True)}
        return cls(**(settings | changes))

    @classmethod
    def published(cls, **changes: Any) -> GAPTConfig:
        """The settings of arXiv 2505.08727: its gate and its entropy (linear, not centered); ``changes`` override."""
        settings: dict[str, Any] = {
            "entropy": EntropyConfig(kernel="linear", center=False),
            "gate": GateConfig.published(),
        }
        return cls(**(settings | changes))

    @property
    def plain_objective(self) -> bool:
        """The objective is loss + weight * mean entropy of the layers that count, with nothing left out."""
        layers, objective = self.layers, self.objective
        plain = layers.schedule == "all" and layers.reduce == "mean"
        return plain and objective.combine == "sum" and objective.floor == 0

    @model_validator(mode="after")
    def _parameters_need_a_plain_objective(self) -> GAPTConfig:
        for name in ("parameter_streaming", "project_parameters"):
            if getattr(self.alignment, name) and not self.plain_objective:
                raise ValueError(
                    f'alignment.{name}=True needs layers.schedule="all", layers.reduce="mean", objective.combine="sum" '
                    "and objective.floor=0"
                )
        return self
