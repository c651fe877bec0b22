"""Memorization-compression cycles for any PyTorch training loop."""

from ._capture import Measurement, RepresentationHook
from ._version import __version__
from .alignment import Alignment, Angle, gradient_alignment, gradient_cosines
from .config import AlignmentConfig, EntropyConfig, GAPTConfig, GateConfig, LayerConfig, ObjectiveConfig
from .entropy import matrix_entropy
from .gate import Phase, PhaseGate
from .metrics import JSONLines, Measures, Observer, ProgressBar, StepMetrics, TensorBoard
from .optimizer import GAPTOptimizer

__all__ = [
    "Alignment",
    "AlignmentConfig",
    "Angle",
    "EntropyConfig",
    "GAPTConfig",
    "GAPTOptimizer",
    "GateConfig",
    "JSONLines",
    "LayerConfig",
    "Measurement",
    "Measures",
    "ObjectiveConfig",
    "Observer",
    "Phase",
    "PhaseGate",
    "ProgressBar",
    "RepresentationHook",
    "StepMetrics",
    "TensorBoard",
    "__version__",
    "gradient_alignment",
    "gradient_cosines",
    "matrix_entropy",
]
