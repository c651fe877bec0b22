"""Settings under which papers took their numbers.

- ``layer-by-layer``: Skean et al., "Layer by layer: uncovering hidden representations in language models", 2025. Prompt
  entropy is ``entropy("cosine", False, alpha=1, window=None).normalized``; dataset entropy the ``normalized`` of the
  sequence level with mean pooling. Negative products are products here; the paper's code sets them to 0.
- ``diff-erank``: Wei et al., "Diff-eRank: a novel rank-based metric for evaluating large language models", 2024. The
  mean is taken off, then rows are scaled. ``entropy("cosine", "first", alpha=1, window=None).effective_rank`` of the
  last layer, untrained minus trained (``--baseline random``), is the paper's number on a data set.
"""

from __future__ import annotations

from .window_values import Kind

PRESETS = {
    "layer-by-layer": Kind("cosine", False, 1.0),
    "diff-erank": Kind("cosine", "first", 1.0),
}
"""The entropy of each, over whole sequences."""
