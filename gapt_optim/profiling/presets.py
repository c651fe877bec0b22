"""Settings under which papers took their numbers. In both, the mean is taken off a sequence, then rows are scaled.

- ``layer-by-layer``: Skean et al., "Layer by layer: uncovering hidden representations in language models", 2025, as in
  its code, in which negative products count as 0. Prompt entropy is ``entropy("cosine", "first", alpha=1,
  window=None).normalized``; dataset entropy the ``normalized`` of the sequence level with mean pooling.
- ``diff-erank``: Wei et al., "Diff-eRank: a novel rank-based metric for evaluating large language models", 2024.
  ``entropy("cosine", "first", alpha=1, window=None).effective_rank`` of the last layer, untrained minus trained
  (``--baseline random``), is the paper's number on a data set.
"""

from __future__ import annotations

from .window_values import Kind

PRESETS = {
    "layer-by-layer": Kind("cosine", "first", 1.0, clamped=True),
    "diff-erank": Kind("cosine", "first", 1.0),
}
"""The entropy of each, over whole sequences."""
