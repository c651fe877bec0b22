"""Which of the watched layers count."""

from __future__ import annotations

import pytest

from gapt_optim.objective import counted_layers


@pytest.mark.parametrize(
    ("n", "first", "last", "expected"),
    [
        (5, 0, 0, [True] * 5),
        (5, 1, 0, [False, True, True, True, True]),
        (5, 0, 2, [True, True, True, False, False]),
        (5, 2, 2, [False, False, True, False, False]),
        (4, 2, 2, [True] * 4),
        (1, 3, 0, [True]),
    ],
)
def test_skipping_applies_only_where_it_leaves_a_layer(n: int, first: int, last: int, expected: list[bool]) -> None:
    names = [f"h.{i}" for i in range(n)]
    kept = tuple(name for name, counts in zip(names, expected, strict=True) if counts)
    assert counted_layers(names, first, last) == kept
