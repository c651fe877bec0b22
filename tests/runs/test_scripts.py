"""What a script around a run needs, and the sentences at its end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gapt_optim.viewing import summary
from pydantic import BaseModel, Field

from gapt_optim import GAPTConfig, GateConfig, ObjectiveConfig
from gapt_optim.runs import (
    CommandError,
    RunFolder,
    StoppedError,
    config_of,
    open_run,
    pick_device,
    problem_within,
    read_flags,
    run_script,
    stopping,
)

without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


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


# Flags


class Settings(BaseModel):
    """Of a script."""

    out: str = "runs/first"
    overwrite: bool = False
    resume: bool = False
    quiet: bool = False
    preset: str = ""
    lr: float = Field(0.1, gt=0)
    steps: int = 3


PRESETS = {"long": {"steps": 900, "lr": 0.2}}


def opened(folder: Path, *flags: str) -> tuple[Settings, GAPTConfig, RunFolder]:
    return open_run(Settings, ["--out", str(folder), *flags], PRESETS)


def test_flags_that_are_not_given_come_from_the_preset_or_the_defaults(tmp_path: Path) -> None:
    config, gapt, folder = opened(tmp_path / "a")
    assert (config.lr, config.steps, gapt, folder.path) == (0.1, 3, GAPTConfig(), tmp_path / "a")
    config, gapt, _ = opened(tmp_path / "b", "--preset", "long", "--lr", "0.3", "--gapt.gate.smoothing", "0.5")
    assert (config.preset, config.lr, config.steps) == ("long", 0.3, 900)
    assert gapt == GAPTConfig(gate=GateConfig(smoothing=0.5))
    quick = GAPTConfig(gate=GateConfig(patience_memorization=2))
    flags = ["--out", str(tmp_path / "c"), "--gapt.objective.weight", "0.3"]
    _, gapt, _ = open_run(Settings, flags, gapt_default=lambda config: quick)
    assert gapt == quick.model_copy(update={"objective": ObjectiveConfig(weight=0.3)})


def test_a_resumed_run_goes_on_with_its_settings_but_not_its_switches(tmp_path: Path) -> None:
    config, gapt, folder = opened(tmp_path, "--preset", "long", "--quiet", "--gapt.objective.weight", "0.3")
    folder.begin({"config": config.model_dump(), "gapt": gapt.model_dump()})
    resumed, again, _ = opened(tmp_path, "--resume", "--steps", "1000")
    assert again == gapt
    assert resumed == config.model_copy(update={"resume": True, "quiet": False, "steps": 1000})


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--lr -1", "--lr: Input should be greater than 0, found -1"),
        ("--lr much", "Error parsing --lr: could not convert string to float: 'much'"),
        ("--lr", "Missing value for argument '--lr'."),
        ("--gapt.gate.smoothing 7", "--gapt.gate.smoothing: Input should be less than 1, found 7"),
        ("--gapt.gate.smoothing much", "Error parsing --gapt.gate.smoothing: could not convert string to float"),
        ("--gapt.entropy.kernel round", "invalid choice 'round' for argument '--gapt.entropy.kernel'."),
        ("--gapt.objective.weight -1", "--gapt.objective.weight: Input should be greater than or equal to 0, found -1"),
        ("--lrr 3", "--lrr: there is no such flag; see --help and --gapt.help"),
        ("--objective.weight 3", "--objective.weight: there is no such flag; see --help and --gapt.help"),
        ("--gapt.objective.wait 3", "--gapt.objective.wait: there is no such flag; see --help and --gapt.help"),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_it(tmp_path: Path, flags: str, line: str) -> None:
    with pytest.raises(CommandError) as refused:
        opened(tmp_path, *flags.split())
    assert str(refused.value).startswith(line)
    assert "\n" not in str(refused.value)


def test_help_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read_flags(Settings, ["--help"])
    assert not ended.value.code
    assert "--preset" in capsys.readouterr().out


# A stop between steps


@pytest.fixture
def _handlers() -> Iterator[None]:
    """Python's own, as in a script."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_for_a_stop_and_the_second_ctrl_c_is_immediate(number: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stopping() as stop:
        assert not stop()
        signal.raise_signal(number)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("_handlers")
def test_under_torchrun_the_second_ctrl_c_is_that_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal sends it to all processes, and torchrun passes it on to its own."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with stopping() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("_handlers")
def test_outside_of_the_main_thread_signals_stay_as_they_are() -> None:
    """Python lets the main thread alone handle signals."""
    seen: list[Any] = []

    def work() -> None:
        with stopping() as stop:
            seen.extend((stop(), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False, signal.default_int_handler]


# A device


@pytest.mark.parametrize("name", ["nonsense", "meta", pytest.param("cuda", marks=without_a_gpu)])
def test_a_device_that_cannot_be_used_is_one_line(name: str) -> None:
    with pytest.raises(CommandError, match=f"^--device '{name}': cannot be used here .+; try --device cpu$"):
        pick_device(name)


@without_a_gpu
def test_without_a_gpu_the_device_is_the_cpu() -> None:
    assert pick_device() == torch.device("cpu")


def test_where_the_c_library_is_another_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    class Musl:
        """Has no mallopt."""

    monkeypatch.setattr("ctypes.CDLL", lambda name: Musl())
    assert pick_device("cpu").type == "cpu"


# Sentences


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
