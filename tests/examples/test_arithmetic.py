"""The multiplication sweep on tiny settings, and the properties its comparison rests on."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import arithmetic
import pytest
import torch
from errors import UserError
from multiplication import (
    CONTEXT,
    SYMBOLS,
    TEST,
    TRAINING,
    VALIDATION,
    Problems,
    answer_loss,
    calibration_error,
    draw,
    evaluate,
    part,
)
from torch import nn

TINY = ["--layers", "1", "--width", "16", "--heads", "2", "--steps", "6", "--batch", "8", "--problems", "16",
        "--evaluate-every", "3", "--workers", "1", "--quiet"]  # fmt: skip
SMALL = {"layers": 1, "width": 16, "heads": 2, "steps": 6, "batch": 8, "problems": 16, "evaluate_every": 3}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def train(method: str = "gapt", seed: int = 0, **changes: Any) -> dict[str, Any]:
    settings = asdict(arithmetic.Settings(**{**SMALL, **changes}))
    return arithmetic.train({"method": method, "seed": seed, "settings": settings})


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
    pairs = draw(3000, digits, None, generator())
    lengths = torch.tensor([len(str(a)) for a, _ in pairs])
    for length in range(digits[0], digits[1] + 1):
        assert (lengths == length).float().mean().item() == pytest.approx(1 / 3, abs=0.04)


def test_only_the_answer_and_its_end_are_targets() -> None:
    problems = Problems.of([(12, 34), (7, 8)], torch.device("cpu"))
    for row, answer in zip(problems.targets, ("408E", "56E"), strict=True):
        assert "".join(SYMBOLS[i] for i in row[row >= 0].tolist()) == answer
    texts = ["".join(SYMBOLS[i] for i in row.tolist()) for row in problems.ids]
    assert texts == ["B12x34=408E", "B7x8=56EPPP"]
    assert problems.mask.sum(-1).tolist() == [11, 8]
    assert len(f"B999999x999999={999_999 * 999_999}E") == CONTEXT


def test_padding_does_not_change_the_loss() -> None:
    torch.manual_seed(0)
    model = arithmetic.build(arithmetic.Settings(**SMALL))
    alone = [answer_loss(model, Problems.of([pair], torch.device("cpu"))) for pair in ((3, 4), (12, 12))]
    together = answer_loss(model, Problems.of([(3, 4), (12, 12)], torch.device("cpu")))
    assert together.item() == pytest.approx((3 * alone[0].item() + 4 * alone[1].item()) / 7, rel=1e-5)


def test_problems_begin_anywhere_in_the_context_or_at_its_start() -> None:
    pairs = draw(500, (1, 3), TRAINING, generator())
    fixed, moved = (Problems.of(pairs, torch.device("cpu"), starts) for starts in (None, generator()))
    width = fixed.ids.shape[1]
    assert torch.equal(fixed.positions, torch.arange(width).expand(500, width))
    starts = moved.positions[:, 0]
    assert torch.equal(moved.positions - starts[:, None], fixed.positions)
    assert set(starts.tolist()) == set(range(CONTEXT - width + 1))
    assert torch.equal(fixed.ids, moved.ids)


def test_random_positions_train_the_embeddings_that_only_longer_factors_reach() -> None:
    """The share of each position's embedding that moved is read off a model that is trained without weight decay."""
    built: list[nn.Module] = []
    build = arithmetic.build

    def remember(settings: arithmetic.Settings) -> nn.Module:
        built.append(build(settings))
        return built[-1]

    moved = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arithmetic, "build", remember)
        for positions in ("first", "random"):
            train("plain", positions=positions, weight_decay=0.0, steps=12)
            trained = built[-1].get_parameter("transformer.wpe.weight")
            torch.manual_seed(0)
            start = build(arithmetic.Settings(**SMALL)).get_parameter("transformer.wpe.weight")
            moved[positions] = (trained != start).any(-1)
    assert not moved["first"][15:].any()
    assert moved["random"][:-1].all()  # no token follows the last one, so it is never a step of the loss


class Knowing(nn.Module):
    """Answers every problem as it is told."""

    def __init__(self, wrong: bool) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.wrong = wrong

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor) -> Any:
        following = input_ids.roll(-1, dims=1)
        one_hot = nn.functional.one_hot(following, len(SYMBOLS)).float()
        if self.wrong:
            one_hot[0] = one_hot[0].roll(1, dims=-1)
        return type("Output", (), {"logits": 50 * self.layer(one_hot)})


@pytest.mark.parametrize("wrong", [False, True])
def test_an_exact_answer_needs_every_digit(wrong: bool) -> None:
    from gapt_optim import EntropyConfig, RepresentationHook

    model = Knowing(wrong)
    hook = RepresentationHook(model, "layer")
    problems = Problems.of([(12, 34), (7, 8)], torch.device("cpu"))
    result = evaluate(model, hook, problems, EntropyConfig())
    assert result["accuracy"] == (0.5 if wrong else 1.0)
    assert result["digits"] == pytest.approx([0.5, 0.5, 0.5, 0.0] if wrong else [1.0] * 4)
    assert result["digit_losses"] == pytest.approx([25.0, 25.0, 25.0, 50.0] if wrong else [0.0] * 4, abs=1e-3)
    assert result["calibration"] == pytest.approx(4 / 7 if wrong else 0.0, abs=1e-4)


def test_calibration_error_is_zero_for_a_model_that_knows_how_sure_it_is() -> None:
    hits = torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert calibration_error(torch.full((4,), 0.75), hits) == pytest.approx(0.0)
    assert calibration_error(torch.full((4,), 1.0), hits) == pytest.approx(0.25)


def test_a_seed_decides_a_run_and_methods_share_their_problems() -> None:
    first, again, other = train(), train(), train(seed=1)
    assert first == again
    assert first["id_loss"] != other["id_loss"]
    assert train("plain")["history"] == train("gapt", patience_memorization=1000)["history"]


def test_the_best_point_is_chosen_on_validation_alone() -> None:
    result = train(steps=9)
    best = min(result["history"], key=lambda record: record["validation"]["loss"])
    assert result["best_ood_loss"] == best["ood"]["loss"]
    assert result["ood_loss_area"] == pytest.approx(sum(r["ood"]["loss"] for r in result["history"]) / 3)


def test_results(tmp_path: Path) -> None:
    arithmetic.run([*TINY, "--seeds", "2", "--first-seed", "7", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["seeds"] == [7, 8]
    assert set(results["runs"]) == {"plain", "penalty", "published", "gapt"}
    for metric in ("id_loss", "ood_loss", "id_accuracy", "ood_accuracy", "entropy", "best_ood_loss", "ood_loss_area"):
        assert len(results["runs"]["gapt"][metric]["values"]) == 2
    low, high = results["relative"]["gapt"]["ood_loss"]["ci95"]
    assert low <= results["relative"]["gapt"]["ood_loss"]["mean"] <= high
    for measured in ("layer_entropy", "best_layer_entropy"):
        assert set(results["runs"]["plain"][measured]) == {"transformer.h.0"}
    assert results["configuration"]["gapt"]["published"]["gate"]["rule"] == "published"
    assert (tmp_path / "report.html").read_text().count("data:image/png;base64,") == 3
    digits = results["runs"]["plain"]["ood_digits"]
    assert (
        f"| 1 | {digits[0]:.0%} |" in (tmp_path / "table.md").read_text().split("## right digits, 4-6 digit factors")[1]
    )


def test_a_preset_can_be_changed_by_flags() -> None:
    options = arithmetic.parse(["--preset", "paper", "--steps", "5"])
    assert (options.layers, options.width, options.steps) == (12, 768, 5)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--width", "10", "--heads", "4"], "--width: must be a multiple of --heads 4, found 10"),
        (["--steps", "0"], "--steps: needs at least 1, found 0"),
        (["--warmup", "-1"], "--warmup: must be finite and not negative, found -1"),
        (["--weight-decay", "nan"], "--weight-decay: must be finite and not negative, found nan"),
        (["--positions", "last"], "--positions: must be first or random, found last"),
        (["--device", "nowhere"], "--device nowhere: cannot be used here"),
        (["--smoothing", "1.0"], "--smoothing: .*found 1.0"),
    ],
)
def test_impossible_settings_are_refused_before_training(tmp_path: Path, argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        arithmetic.run([*argv, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
