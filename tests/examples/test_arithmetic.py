"""The multiplication example on tiny settings, and the properties its comparison rests on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import arithmetic
import pytest
import torch
from arithmetic import CONTEXT, SYMBOLS, TEST, TRAINING, VALIDATION, Settings, answers, draw, encode, evaluate, part
from torch import nn

from gapt_optim import GAPTConfig, RepresentationHook
from tests.examples.conftest import Run, read_lines

SMALL: dict[str, Any] = {
    "layers": 1, "width": 16, "heads": 2, "steps": 6, "batch_size": 8, "problems": 16, "eval_every": 3, "seed": 0,
}  # fmt: skip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def train(folder: Path, method: str = "gapt", **changes: Any) -> list[dict[str, Any]]:
    """The evaluations of a run."""
    folder.mkdir()
    arithmetic.train(Settings(**{**SMALL, **changes}), method, folder)
    return read_lines(folder / "validation.jsonl")


def loss_of(model: nn.Module, pairs: list[tuple[int, int]]) -> float:
    return nn.functional.cross_entropy(*answers(model, encode(pairs))).item()


def test_no_test_problem_is_ever_drawn_for_training() -> None:
    training = {frozenset(pair) for pair in draw(4000, (1, 3), TRAINING, generator(0))}
    for seed in range(5):
        for wanted in (TEST, VALIDATION):
            held_out = {frozenset(pair) for pair in draw(400, (1, 3), wanted, generator(seed))}
            assert not training & held_out
    assert not training & {frozenset(pair) for pair in draw(400, (4, 6), None, generator(1))}


def test_the_order_of_factors_does_not_move_a_problem_to_another_set() -> None:
    a, b = torch.randint(0, 1000, (2, 5000), generator=generator())
    assert torch.equal(part(a, b), part(b, a))


def test_a_twentieth_of_the_problems_goes_to_each_of_validation_and_test() -> None:
    a, b = torch.randint(0, 1000, (2, 50_000), generator=generator())
    for held_out in (VALIDATION, TEST):
        assert (part(a, b) == held_out).float().mean().item() == pytest.approx(0.05, abs=0.01)


@pytest.mark.parametrize("digits", [(1, 3), (4, 6)])
def test_factors_have_the_digits_asked_for_evenly(digits: tuple[int, int]) -> None:
    lengths = torch.tensor([len(str(a)) for a, _ in draw(3000, digits, None, generator())])
    for length in range(digits[0], digits[1] + 1):
        assert (lengths == length).float().mean().item() == pytest.approx(1 / 3, abs=0.04)


def test_only_the_answer_and_its_end_are_targets() -> None:
    problems = encode([(12, 34), (7, 8)])
    for row, answer in zip(problems.targets, ("408E", "56E"), strict=True):
        assert "".join(SYMBOLS[i] for i in row[row >= 0].tolist()) == answer
    assert ["".join(SYMBOLS[i] for i in row.tolist()) for row in problems.ids] == ["B12x34=408E", "B7x8=56EPPP"]
    assert problems.mask.sum(-1).tolist() == [11, 8]
    assert len(f"B999999x999999={999_999 * 999_999}E") == CONTEXT


def test_padding_does_not_change_the_loss() -> None:
    torch.manual_seed(0)
    model = arithmetic.build_model(Settings(**SMALL))
    first, second = (loss_of(model, [pair]) for pair in ((3, 4), (12, 12)))
    assert loss_of(model, [(3, 4), (12, 12)]) == pytest.approx((3 * first + 4 * second) / 7, rel=1e-5)


class Knowing(nn.Module):
    """Answers every problem as it is told, or the first one wrong."""

    def __init__(self, wrong: bool) -> None:
        super().__init__()
        self.layer, self.wrong, self.weight = nn.Identity(), wrong, nn.Parameter(torch.ones(()))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        one_hot = nn.functional.one_hot(input_ids.roll(-1, dims=1), len(SYMBOLS)).float()
        if self.wrong:
            one_hot[0] = one_hot[0].roll(1, dims=-1)
        return type("Output", (), {"logits": 50 * self.layer(one_hot)})


@pytest.mark.parametrize("wrong", [False, True])
def test_an_exact_answer_needs_every_digit(wrong: bool) -> None:
    model = Knowing(wrong)
    found = evaluate(Settings(), model, RepresentationHook(model, "layer"), encode([(12, 34), (7, 8)]))
    assert found["accuracy"] == (0.5 if wrong else 1.0)
    assert found["loss"] == pytest.approx(50 * 4 / 7 if wrong else 0.0, abs=1e-3)


def test_a_seed_decides_a_run_and_methods_share_their_problems(tmp_path: Path) -> None:
    first, again, other = train(tmp_path / "a"), train(tmp_path / "b"), train(tmp_path / "c", seed=1)
    assert first == again
    assert first != other
    assert train(tmp_path / "d", "plain") == train(tmp_path / "e", patience_memorization=1000)


def test_the_defaults_are_those_of_the_library() -> None:
    assert arithmetic.config_of(Settings(), "gapt") == GAPTConfig()


def test_the_script_leaves_a_comparison(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    out = tmp_path / "out"
    run(arithmetic, [*flags, "--weight", "0.5", "--methods", "plain", "penalty", "--out", str(out)])
    said = capsys.readouterr().out
    assert "exact answers (share)" in said
    assert "loss on longer factors" in said
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert list(runs) == ["plain", "penalty"]
    assert json.loads((out / "penalty" / "settings.json").read_text())["gapt"]["objective"]["weight"] == 0.5
    for method in runs:
        assert [record["step"] for record in read_lines(out / method / "metrics.jsonl")] == list(range(1, 7))
        assert [record["step"] for record in read_lines(out / method / "validation.jsonl")] == [3, 6]
    with pytest.raises(SystemExit, match="holds a run"):
        run(arithmetic, ["--out", str(out)])


@pytest.mark.parametrize("flags", ["--width 10 --heads 4", "--steps 0", "--preset giant", "--wieght 1"])
def test_impossible_settings_are_refused_before_training(tmp_path: Path, run: Run, flags: str) -> None:
    with pytest.raises(SystemExit):
        run(arithmetic, [*flags.split(), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
