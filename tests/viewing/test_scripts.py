"""What a script around a run needs, and the sentences at its end."""

from __future__ import annotations

import time
from typing import Any

import pytest

from gapt_optim import GAPTConfig, GateConfig
from gapt_optim.viewing import CommandError, StoppedError, config_of, problem_within, run_script, summary


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (CommandError("a\nb"), 2, "error: a b\n"),
        (FloatingPointError("nan"), 2, "error: nan\n"),
        (ModuleNotFoundError("No module named 'x'"), 2, "error: No module named 'x'; install what the examples use"),
        (OSError(28, "No space left on device", "run/metrics.jsonl"), 2, "error: run/metrics.jsonl: No space left"),
        (StoppedError("stopped after step 3"), 130, "stopped after step 3\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
        (None, 0, ""),
    ],
)
def test_script_ends_with_one_line_and_a_code(
    capsys: pytest.CaptureFixture[str], error: BaseException | None, code: int, line: str
) -> None:
    def main() -> None:
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    said = capsys.readouterr().err
    assert ended.value.code == code
    assert said.startswith(line)
    assert said.count("\n") == (code != 0)


def test_work_that_hangs_is_given_up() -> None:
    started = time.monotonic()
    assert problem_within(0.2, lambda: time.sleep(2)) == "no answer in 0.2 s"
    assert time.monotonic() - started < 1.5
    assert problem_within(5, lambda: None) is None
    assert problem_within(5, lambda: int("x")).startswith("ValueError: invalid literal")  # type: ignore[union-attr]


def test_methods_are_gates() -> None:
    gapt = GAPTConfig(gate=GateConfig(patience_memorization=7))
    assert config_of("plain", gapt).gate == GateConfig(frozen=True)
    assert config_of("penalty", gapt).gate == GateConfig(initial_phase="compression", frozen=True)
    assert config_of("published", gapt).gate == GateConfig.published()
    assert config_of("gapt", gapt) == gapt
    assert config_of("plain", gapt).objective == gapt.objective


def entry(loss: float, linear: float, cosine: float, norm: float, share: float, switches: int = 3) -> dict[str, Any]:
    measures = {
        "linear_entropy": linear, "centered_cosine_entropy": cosine, "norm_ratio": norm, "mean_share": share,
    }  # fmt: skip
    compression = 0.4 if switches else 0.0
    return {
        "loss": loss, "entropy": cosine, "measures": measures, "switches": switches, "compression_share": compression,
    }  # fmt: skip


PLAIN = entry(4.0, 1.2, 1.3, 1.5, 0.3, switches=0)
SENTENCES = {
    "compressed": (entry(4.04, 0.6, 0.6, 1.5, 0.3), "1.0% above plain training's. Its layers are compressed"),
    "long tokens": (entry(3.96, 0.2, 1.29, 26.0, 0.3), "1.0% below plain training's. That is no compression"),
    "which long": (entry(4.0, 0.2, 1.29, 26.0, 0.3), "longest token of a window grew 17.3 times longer"),
    "common vector": (entry(4.0, 0.2, 1.29, 1.5, 0.9), "one vector that all tokens share took 60% more"),
    "nothing": (entry(4.0, 1.19, 1.295, 1.5, 0.3), "hardly compressed"),
    "never": (PLAIN, "The gate never started compression"),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_sentences_say_what_hides_in_an_entropy(case: str) -> None:
    gapt, words = SENTENCES[case]
    said = summary({"plain": PLAIN, "gapt": gapt})
    assert words in said
    assert "| norm ratio" in said


def test_table_without_plain() -> None:
    said = summary({"gapt": PLAIN})
    assert "%)" not in said
    assert "Train plain and gapt in one run" in said
