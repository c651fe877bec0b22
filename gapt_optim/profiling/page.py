"""One self-contained page of a profile, or of several; or a picture of it."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping
from pathlib import Path

from .._display.page import Page, bullets
from .._display.pictures import draw_charts
from .._display.tables import html_table
from .charts import COLORS, ProfileCharts, norms_by_position, over_profiles, similarity
from .comparison import Comparison, compare
from .results import Profile
from .tables import by_prompt, longest_tokens, profile_table, summary_line, summary_of_several, what_is_shown

_READING = (
    "The matrix-based entropy of each window&#8217;s tokens, in nats: 0 when all point the same way, the logarithm of "
    "their number when they spread evenly. The linear kernel weighs tokens by their length, so one long token can "
    "empty it; the cosine kernel does not. Centring takes off what all tokens share. Compare the four before "
    "concluding anything."
)


def write_profile(
    profiles: Profile | Mapping[str, Profile] | Comparison,
    path: str | os.PathLike[str],
    *,
    title: str = "Layers of a model",
) -> Path:
    """Write a self-contained HTML page of a profile, or of several that can be compared. Needs plotly and pandas.

    >>> import torch
    >>> from gapt_optim.profiling import profile
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU())
    >>> write_profile(profile(model, [torch.randn(64, 4)], "1"), "profile.html").name
    'profile.html'

    Raises:
        ValueError: there is none, or they cannot be compared (:func:`gapt_optim.compare`).
    """
    found = _one_or_several(profiles)
    page = _page_of_several(found, title) if isinstance(found, Comparison) else _page_of_one(found, title)
    return page.write(path)


def draw_profile(
    profiles: Profile | Mapping[str, Profile] | Comparison, path: str | os.PathLike[str], *, title: str = ""
) -> Path:
    """Write a picture (``.png``, ``.pdf``, ``.svg``) of a profile, or of several: entropies, norms, ranks, CKA.

    Needs matplotlib.

    >>> import torch
    >>> from gapt_optim.profiling import profile
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU())
    >>> draw_profile(profile(model, [torch.randn(64, 4)], "1"), "profile.png").name
    'profile.png'

    Raises:
        ValueError: there is none, or they cannot be compared.
    """
    found = _one_or_several(profiles)
    named = found.profiles if isinstance(found, Comparison) else {found.model or "model": found}
    charts = ProfileCharts(named)
    shown = [*charts.entropies(), *charts.others()]
    shown = [over_profiles(found), *shown] if isinstance(found, Comparison) else [*shown, *similarity(found)]
    return draw_charts(shown, path, title=title or ", ".join(named), columns=2)


def _one_or_several(profiles: Profile | Mapping[str, Profile] | Comparison) -> Profile | Comparison:
    if not isinstance(profiles, Mapping):
        return profiles
    if not profiles:
        raise ValueError("profiles is empty; pass at least one")
    return compare(profiles) if len(profiles) > 1 else next(iter(profiles.values()))


def _page_of_one(one: Profile, title: str) -> Page:
    charts = ProfileCharts({one.model or "model": one})
    page = Page(title, summary_line(one))
    page.add("To know", bullets([html.escape(note) for note in one.notes]))
    page.add("Entropy by layer", f"<p>{_READING}</p>", charts.entropies())
    page.add("What can hide in an entropy, and more", "", charts.others())
    heats = [*similarity(one), *norms_by_position(one)]
    page.add("Which layers are alike, and where their length lies", "", heats)
    if any(layer.longest for layer in one.layers):
        page.add("Longest tokens and largest channels", html_table(longest_tokens(one)))
    prompts = by_prompt(one)
    if len(prompts) > 1:
        page.add("By sequence", html_table(prompts, "Entropies of the longest windows, in nats."))
    page.add("Table", html_table(profile_table(one), what_is_shown(one)))
    return page


def _page_of_several(found: Comparison, title: str) -> Page:
    profiles, charts = found.profiles, ProfileCharts(found.profiles)
    colors = [(name, COLORS[i % len(COLORS)]) for i, name in enumerate(profiles)]
    page = Page(title, summary_of_several(profiles), colors)
    notes = [f"<b>{html.escape(name)}</b>: {html.escape(note)}" for name, one in profiles.items() for note in one.notes]
    page.add("To know", bullets([*map(html.escape, found.warnings), *notes]))
    heat = [over_profiles(found)]
    if len(profiles) == 2:
        before, after = profiles
        said = f"Values of {after}, and their change."
        page.add(f"From {before} to {after}", html_table(found.to_pandas(), said), heat)
    else:
        page.add("Over the profiles", "", heat)
    page.add("Entropy by layer", f"<p>{_READING}</p>", charts.entropies())
    page.add("What can hide in an entropy, and more", "", charts.others())
    for name, one in profiles.items():
        alike = similarity(one) if len(profiles) == 2 else []
        page.add(name, html_table(profile_table(one), what_is_shown(one)), alike)
    return page
