"""The four ways to train that are compared."""

from __future__ import annotations

import math
from typing import Any

from errors import explain
from pydantic import ValidationError

from gapt_optim import AlignmentConfig, EntropyConfig, GAPTConfig, GateConfig, ObjectiveConfig

METHODS = ("plain", "penalty", "published", "gapt")
"""No entropy, a constant weight on it, the paper's gate, and the library's."""
GATE_FIELDS = ("patience_memorization", "patience_compression", "min_improvement", "spike_tolerance", "smoothing")
OBJECTIVE_FIELDS = ("weight", "combine", "max_ratio", "floor")


def of_method(method: str, config: GAPTConfig) -> GAPTConfig | None:
    """What a method gives the wrapper: None for the bare optimizer, a penalty that is always on, or a gate."""
    gates = {
        "plain": None,
        "penalty": GateConfig(initial_phase="compression", frozen=True),
        "published": GateConfig.published(),
        "gapt": config.gate,
    }
    gate = gates[method]
    return None if gate is None else config.model_copy(update={"gate": gate})


def gapt_config(method: str, settings: Any) -> GAPTConfig | None:
    """`of_method` for ``settings`` with ``window`` and the fields in ``GATE_FIELDS`` and ``OBJECTIVE_FIELDS``.

    Raises:
        UserError: a setting is impossible.
    """
    try:
        config = GAPTConfig(
            gate=GateConfig(**{name: getattr(settings, name) for name in GATE_FIELDS}),
            entropy=EntropyConfig(window=settings.window),
            objective=ObjectiveConfig(**{name: getattr(settings, name) for name in OBJECTIVE_FIELDS}),
            alignment=AlignmentConfig(activation=False),  # of no use here, and a good part of so small a step
        )
    except ValidationError as error:
        raise explain(
            error, {name: f"--{name.replace('_', '-')}" for name in ("window", *OBJECTIVE_FIELDS, *GATE_FIELDS)}
        ) from error
    return of_method(method, config)


def cosine(done: float, final: float = 0.1) -> float:
    """Learning rate over a run: half a cosine from 1 down to ``final``."""
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))
