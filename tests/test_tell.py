"""Warnings point at the line of the user's own that called us."""

from __future__ import annotations

import linecache
import threading
import warnings

import pytest
import torch

from gapt_optim._tell import tell


@pytest.mark.parametrize("names", [{}, {"__name__": None}, {"__name__": "torch.fx"}, {"__name__": "gapt_optim.gate"}])
def test_frames_of_torch_and_of_generated_code_are_passed_over(names: dict[str, str | None]) -> None:
    exec(compile("def generated(call):\n    call('told')", "<eval_with_key>.0", "exec"), names)
    with pytest.warns(UserWarning, match="told") as caught:
        names["generated"](tell)  # type: ignore[misc, operator]
    assert caught[0].filename == __file__
    assert "generated" in linecache.getline(__file__, caught[0].lineno)


def test_a_module_whose_name_begins_like_torch_is_the_users() -> None:
    names = {"__name__": "torchlike"}
    exec(compile("def own(call):\n    call('told')", "own.py", "exec"), names)
    with pytest.warns(UserWarning, match="told") as caught:
        names["own"](tell)  # type: ignore[operator]
    assert caught[0].filename == "own.py"


def test_a_stack_without_a_line_of_the_users_is_no_error() -> None:
    """As of autograd's own threads."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        thread = threading.Thread(target=torch.no_grad()(tell), args=("told",))
        thread.start()
        thread.join()
    assert [str(warning.message) for warning in caught] == ["told"]
