"""The four ways to train that every sweep compares."""

from __future__ import annotations

from typing import Any

from errors import explain
from pydantic import ValidationError

from gapt_optim import AlignmentConfig, EntropyConfig, GAPTConfig, GateConfig, ObjectiveConfig

METHODS = ("plain", "penalty", "published", "gapt")
"""No entropy, a constant weight on it, the paper's gate, and the library's."""
GATE_FIELDS = ("patience_memorization", "patience_compression", "min_improvement", "spike_tolerance", "smoothing")


def gapt_config(method: str, settings: Any) -> GAPTConfig | None:
    """What a method gives the wrapper: None for the bare optimizer, a penalty that is always on, or a gate.

    ``settings`` has ``weight``, ``window`` and the fields of the gate in ``GATE_FIELDS``.

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
            objective=ObjectiveConfig(weight=settings.weight),
            alignment=AlignmentConfig(activation=False),  # of no use here, and a good part of so small a step
        )
    except ValidationError as error:
        raise explain(
            error, {name: f"--{name.replace('_', '-')}" for name in ("weight", "window", *GATE_FIELDS)}
        ) from error
