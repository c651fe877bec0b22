"""Look at the layers of a model, on some data.

Nothing here is imported before it is used: each name brings what it needs (matplotlib for pictures, plotly for
pages).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .layer_profile import LayerProfile, Profile, profile
    from .profile_view import draw_profile, write_profile

_HOMES = {
    "LayerProfile": "layer_profile",
    "Profile": "layer_profile",
    "draw_profile": "profile_view",
    "profile": "layer_profile",
    "write_profile": "profile_view",
}

__all__ = ["LayerProfile", "Profile", "draw_profile", "profile", "write_profile"]

__getattr__, __dir__ = lazy_names(globals(), _HOMES)
