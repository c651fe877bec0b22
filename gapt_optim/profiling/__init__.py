"""The layers of a model: profiled on some data, compared, and shown; or watched in a training.

Nothing here is imported before it is used: each name brings what it needs (matplotlib for pictures, plotly for
pages, rich for tables).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .comparison import Comparison, compare
    from .loading import untrained
    from .measuring import profile
    from .monitoring import Monitor, monitor
    from .page import draw_profile, write_profile
    from .results import LayerProfile, Profile, load_profiles, save_profiles

_NAMES = {
    "comparison": ["Comparison", "compare"],
    "loading": ["untrained"],
    "measuring": ["profile"],
    "monitoring": ["Monitor", "monitor"],
    "page": ["draw_profile", "write_profile"],
    "results": ["LayerProfile", "Profile", "load_profiles", "save_profiles"],
}

__all__ = [
    "Comparison",
    "LayerProfile",
    "Monitor",
    "Profile",
    "compare",
    "draw_profile",
    "load_profiles",
    "monitor",
    "profile",
    "save_profiles",
    "untrained",
    "write_profile",
]

__getattr__, __dir__ = lazy_names(globals(), _NAMES)
