"""Each script of by_feature does what its first lines say."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gapt_optim
from gapt_optim import GAPTConfig, GAPTOptimizer, ObjectiveConfig, RepresentationHook
from tests.examples.conftest import ROOT, shards_on_a_cpu

FOLDER = ROOT / "examples" / "by_feature"
SCRIPTS = {
    "held_out_gate": r"step \d+: memorization -> compression \(plateau\)(?s:.*)switches: \d",
    "entropies": r"transformer\.h\.2 +\d\.\d{3}(?s:.*)mean over layers: ",
    "parameter_alignment": r"step  10 \(memorization\): cosine [+-]0\.\d{3} at the layers, [+-]0\.\d{3} of parameters",
    "muon": r"step 60: loss \d\.\d{3}, entropy \d\.\d{3}",
    "torchao_8bit": r"step 40: loss \d\.\d{3}(?s:.*)OptimState8bit",
    "grad_scaler": r"step 60: loss \d\.\d{3}",
    "with_accelerate": r"epoch 2: loss \d\.\d{3}, entropy \d\.\d{3}",
    "with_lightning": r"'gapt/entropy': \d",
    "trainer": r"loss \d\.\d{3}, entropy \d\.\d{3}, \w+ after 48 steps",
    "fsdp2": r"step 40: loss \d\.\d{3}, entropy \d\.\d{3}",
    "torchtitan_loop": r"step 40: loss \d\.\d{3}, entropy \d\.\d{3}",
}
RECIPES = {
    "with_fabric": "lightning.fabric",
    "with_fastai": "fastai.learner",
    "with_gradcache": "grad_cache",
    "with_keras": "keras",
    "with_sentence_transformers": "sentence_transformers",
    "with_skorch": "skorch",
    "with_timm": "timm",
    "with_trl": "trl",
}
"""Loops of packages that this one does not depend on: what each script imports first."""
OVER_RANKS = {"fsdp2": 2, "torchtitan_loop": 4}
QUIET = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def test_every_script_is_run_and_marks_what_is_new() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {*SCRIPTS, *RECIPES}
    for name in (*SCRIPTS, *RECIPES):
        lines = (FOLDER / f"{name}.py").read_text().splitlines()
        assert len(lines) <= (150 if name == "torchtitan_loop" else 60)  # with the model that it cuts
        assert sum("# new" in line for line in lines) >= 1


@QUIET  # of the libraries that the scripts show
@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in OVER_RANKS])
def test_script_shows_its_feature(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step, which takes a minute
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert re.search(SCRIPTS[name], capsys.readouterr().out)


@pytest.fixture
def package(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package of a recipe; the test is skipped where it cannot be imported."""
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    gradcache = importlib.util.find_spec("gradcache")
    if name == "with_gradcache" and gradcache is not None and gradcache.origin is not None:
        # PyPI's release lies in a folder "gradcache", and imports itself as "grad_cache".
        (tmp_path / "grad_cache").symlink_to(Path(gradcache.origin).parent)
        monkeypatch.syspath_prepend(str(tmp_path))
    try:
        importlib.import_module(RECIPES[name])
    except Exception as error:  # timm without a torchvision of this torch raises RuntimeError
        pytest.skip(f"{RECIPES[name]} cannot be imported: {type(error).__name__}: {error}")


@QUIET
@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_for_somebody_elses_loop(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it stands, and with a penalty in place of the gate, which compresses in none of so few steps."""
    made: list[GAPTOptimizer] = []
    penalty = GAPTConfig.penalty(objective=ObjectiveConfig(weight=1.0))

    def optimizer(*args: Any, **options: Any) -> GAPTOptimizer:
        made.append(GAPTOptimizer(*args, **options))
        return made[-1]

    def pressed(base: torch.optim.Optimizer, hook: RepresentationHook, *config: Any) -> GAPTOptimizer:
        return optimizer(base, hook, penalty)

    for constructor in (optimizer, pressed):
        monkeypatch.setattr(gapt_optim, "GAPTOptimizer", constructor)
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        said = re.findall(r"loss (\d+\.\d{3}), entropy (\d\.\d{3})", capsys.readouterr().out)
        metrics = made[-1].metrics
        assert metrics is not None
        assert said[-1] == (f"{metrics.loss:.3f}", f"{metrics.entropy:.3f}")
    gated, compressed = (each.metrics for each in made)
    assert gated is not None
    assert compressed is not None
    assert gated.step == compressed.step >= 20
    assert (gated.phase, compressed.phase) == ("memorization", "compression")
    assert gated.entropy is not None
    assert compressed.entropy is not None
    assert compressed.entropy < gated.entropy - 0.05


@shards_on_a_cpu
@pytest.mark.parametrize("name", OVER_RANKS)
def test_under_torchrun(name: str, tmp_path: Path) -> None:
    ranks = str(OVER_RANKS[name])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, str(FOLDER / f"{name}.py")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    argv = [sys.executable, *torchrun]
    done = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    # At its end gloo aborts the interpreter now and then where FSDP2 was used, also without us.
    assert done.returncode == 0 or "Signal 6" in done.stderr, done.stderr
    assert len(re.findall(SCRIPTS[name], done.stdout)) == 1
