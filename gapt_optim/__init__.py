"""Memorization-compression cycles for any PyTorch training loop."""

from typing import TYPE_CHECKING

from ._lazy import lazy_names
from ._version import __version__

if TYPE_CHECKING:
    from .alignment import Alignment, Angle, gradient_alignment, gradient_cosines
    from .config import AlignmentConfig, EntropyConfig, GAPTConfig, GateConfig, LayerConfig, ObjectiveConfig
    from .entropy import matrix_entropy
    from .gate import Phase, PhaseGate
    from .hook import Measurement, RepresentationHook
    from .integrations.trackers import MLflow, TensorBoard, WandB
    from .metrics import JSONLines, Measures, Observer, ProgressBar, StepMetrics
    from .optimizer import GAPTOptimizer
    from .profiling import Profile, compare, monitor, profile

# Imported when they are used: `gapt-optim report` needs no torch, and a logger that is not used is not imported.
_NAMES = {
    "alignment": ["Alignment", "Angle", "gradient_alignment", "gradient_cosines"],
    "config": ["AlignmentConfig", "EntropyConfig", "GAPTConfig", "GateConfig", "LayerConfig", "ObjectiveConfig"],
    "entropy": ["matrix_entropy"],
    "gate": ["Phase", "PhaseGate"],
    "hook": ["Measurement", "RepresentationHook"],
    "integrations.trackers": ["MLflow", "TensorBoard", "WandB"],
    "metrics": ["JSONLines", "Measures", "Observer", "ProgressBar", "StepMetrics"],
    "optimizer": ["GAPTOptimizer"],
    "profiling": ["Profile", "compare", "monitor", "profile"],
}

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
    "MLflow",
    "Measurement",
    "Measures",
    "ObjectiveConfig",
    "Observer",
    "Phase",
    "PhaseGate",
    "Profile",
    "ProgressBar",
    "RepresentationHook",
    "StepMetrics",
    "TensorBoard",
    "WandB",
    "__version__",
    "compare",
    "gradient_alignment",
    "gradient_cosines",
    "matrix_entropy",
    "monitor",
    "profile",
]

__getattr__, __dir__ = lazy_names(globals(), _NAMES)
