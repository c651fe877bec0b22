"""The four ways to train that every sweep compares."""

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


def gapt_config(method: str, settings: Any) -> GAPTConfig | None:
    """What a method gives the wrapper: None for the bare optimizer, a penalty that is always on, or a gate.

    ``settings`` has ``window`` and the fields in ``GATE_FIELDS`` and ``OBJECTIVE_FIELDS``.

    Raises:
        UserError: a setting is impossible.
    """
    if method == "plain":
        return None
    try:
        gates = {
            "penalty": GateConfig(initial_phase="compression", frozen=True),
            "published": GateConfig.published(),
            "gapt": GateConfig(**{name: getattr(settings, name) for name in GATE_FIELDS}),
        }
        return GAPTConfig(
            gate=gates[method],
            entropy=EntropyConfig(window=settings.window),
            objective=ObjectiveConfig(**{name: getattr(settings, name) for name in OBJECTIVE_FIELDS}),
            alignment=AlignmentConfig(activation=False),  # of no use here, and a good part of so small a step
        )
    except ValidationError as error:
        raise explain(
            error, {name: f"--{name.replace('_', '-')}" for name in ("window", *OBJECTIVE_FIELDS, *GATE_FIELDS)}
        ) from error


def cosine(done: float) -> float:
    """Learning rate over a run: half a cosine from 1 down to a tenth."""
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))
