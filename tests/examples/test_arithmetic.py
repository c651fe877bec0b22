"""The multiplication example on tiny settings, and the properties its comparison rests on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import arithmetic
import pytest
import torch
from arithmetic import CONTEXT, SYMBOLS, TEST, TRAINING, VALIDATION, Config, answers, draw, encode, evaluate, part
from gapt_optim.viewing import read_run
from torch import nn

from gapt_optim import GAPTConfig, GateConfig, RepresentationHook, viewing
from gapt_optim.runs import run_script

SMALL: dict[str, Any] = {
    "layers": 1, "width": 16, "heads": 2, "steps": 6, "batch": 8, "problems": 16, "evaluate_every": 3, "seed": 0,
}  # fmt: skip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def train(method: str = "gapt", gate: GateConfig | None = None, **changes: Any) -> dict[str, Any]:
    gapt = GAPTConfig() if gate is None else GAPTConfig(gate=gate)
    return arithmetic.train(Config(**{**SMALL, **changes}), gapt, method)


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
    model = arithmetic.build_model(Config(**SMALL))
    first, second = (loss_of(model, [pair]) for pair in ((3, 4), (12, 12)))
    assert loss_of(model, [(3, 4), (12, 12)]) == pytest.approx((3 * first + 4 * second) / 7, rel=1e-5)


def test_problems_begin_anywhere_in_the_context_or_at_its_start() -> None:
    pairs = draw(500, (1, 3), TRAINING, generator())
    fixed, moved = encode(pairs), encode(pairs, generator())
    width = fixed.ids.shape[1]
    assert torch.equal(fixed.positions, torch.arange(width).expand(500, width))
    starts = moved.positions[:, 0]
    assert torch.equal(moved.positions - starts[:, None], fixed.positions)
    assert set(starts.tolist()) == set(range(CONTEXT - width + 1))
    assert torch.equal(fixed.ids, moved.ids)


def test_random_positions_train_the_embeddings_that_only_longer_factors_reach() -> None:
    """The share of each position's embedding that moved is read off a model that is trained without weight decay."""
    built: list[nn.Module] = []
    build = arithmetic.build_model

    def remember(config: Config) -> nn.Module:
        built.append(build(config))
        return built[-1]

    moved = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arithmetic, "build_model", remember)
        for positions in ("first", "random"):
            train("plain", positions=positions, weight_decay=0.0, steps=12)
            trained = built[-1].get_parameter("transformer.wpe.weight")
            torch.manual_seed(0)
            start = build(Config(**SMALL)).get_parameter("transformer.wpe.weight")
            moved[positions] = (trained != start).any(-1)
    assert not moved["first"][15:].any()
    assert moved["random"][:-1].all()  # no token follows the last one, so it is never a step of the loss


class Knowing(nn.Module):
    """Answers every problem as it is told, or the first one wrong."""

    def __init__(self, wrong: bool) -> None:
        super().__init__()
        self.layer, self.wrong, self.weight = nn.Identity(), wrong, nn.Parameter(torch.ones(()))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor) -> Any:
        one_hot = nn.functional.one_hot(input_ids.roll(-1, dims=1), len(SYMBOLS)).float()
        if self.wrong:
            one_hot[0] = one_hot[0].roll(1, dims=-1)
        return type("Output", (), {"logits": 50 * self.layer(one_hot)})


@pytest.mark.parametrize("wrong", [False, True])
def test_an_exact_answer_needs_every_digit(wrong: bool) -> None:
    model = Knowing(wrong)
    result = evaluate(model, RepresentationHook(model, "layer"), encode([(12, 34), (7, 8)]), GAPTConfig())
    assert result["accuracy"] == (0.5 if wrong else 1.0)
    assert result["digits"] == pytest.approx([0.5, 0.5, 0.5, 0.0] if wrong else [1.0] * 4)
    assert result["digit_losses"] == pytest.approx([25.0, 25.0, 25.0, 50.0] if wrong else [0.0] * 4, abs=1e-3)
    assert result["calibration"] == pytest.approx(4 / 7 if wrong else 0.0, abs=1e-4)


def test_a_seed_decides_a_run_and_methods_share_their_problems() -> None:
    first, again, other = train(), train(), train(seed=1)
    assert first == again
    assert first["history"] != other["history"]
    assert train("plain")["history"] == train("gapt", GateConfig(patience_memorization=1000))["history"]


def test_the_script_leaves_a_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    concluded: dict[str, Any] = {}
    monkeypatch.setattr(viewing, "conclude", lambda folder, methods, facts: concluded.update(facts, methods=methods))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    flags += ["--gapt.objective.weight", "0.5", f"--out={tmp_path}/out"]
    monkeypatch.setattr(sys, "argv", ["arithmetic.py", *flags])
    arithmetic.main()
    assert concluded["methods"] == ("plain", "gapt")
    assert concluded["gapt"]["objective"]["weight"] == 0.5
    for method in ("plain", "gapt"):
        run = read_run(tmp_path / "out" / method)
        assert [record["step"] for record in run.steps] == list(range(1, 7))
        assert [record["step"] for record in run.validations] == [3, 6]
        assert 0 <= viewing.figures(run)["accuracy"] <= 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--width 10 --heads 4", "--width: must be a multiple of --heads 4, found 10"),
        ("--steps 0", "--steps: Input should be greater than or equal to 1, found 0"),
        ("--warmup -1", "--warmup: Input should be greater than or equal to 0"),
        ("--weight-decay nan", "--weight-decay: Input should be"),
        ("--positions last", "invalid choice 'last'"),
        ("--device nowhere", "--device 'nowhere': cannot be used here"),
        ("--gapt.gate.smoothing 1.0", "--gapt.gate.smoothing: Input should be less than 1, found 1.0"),
    ],
)
def test_impossible_settings_are_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["arithmetic.py", *flags.split(), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        run_script(arithmetic.main)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "settings.json").exists()
