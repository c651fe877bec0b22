"""Stopping and going on: nothing of a run is lost, and what does not fit is refused."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from gapt_optim import (
    AlignmentConfig,
    EntropyConfig,
    GAPTConfig,
    GAPTOptimizer,
    GateConfig,
    LayerConfig,
    ObjectiveConfig,
    RepresentationHook,
)

from .loops import (
    RESTLESS,
    Net,
    adamw,
    assert_same,
    loss_of,
    make_net,
    matrices_and_rest,
    run,
    sgd,
    weights,
    without_ours,
    wrap,
)

CONFIGS = {
    "default": GAPTConfig(),
    "smoothed": GAPTConfig(gate=RESTLESS),
    "published": GAPTConfig(gate=GateConfig.published(patience_memorization=3, patience_compression=2)),
    "validation": GAPTConfig(gate=RESTLESS.model_copy(update={"signal": "validation"})),
    "rotate": GAPTConfig(gate=RESTLESS, layers=LayerConfig(schedule="rotate")),
    "up": GAPTConfig(gate=RESTLESS, objective=ObjectiveConfig(direction="up", target_share=0.9, start=3)),
    "parameter alignment": GAPTConfig(gate=RESTLESS, alignment=AlignmentConfig(parameter_every=3)),
}


def go_on(model: nn.Module, optimizer: GAPTOptimizer, steps: range) -> list[Any]:
    """Train, with a validation loss every second step; what the metrics say."""
    seen = []
    for i in steps:
        seen += run(model, optimizer, range(i, i + 1))
        if i % 2:
            optimizer.record_validation(2.0 + i % 3)
    return seen


@functools.cache
def uninterrupted(config: str, base: Any) -> tuple[list[Any], dict[str, Tensor], dict[str, Any]]:
    """What the metrics of 20 steps say, and the weights and the state at their end."""
    model = make_net()
    optimizer = wrap(model, base, CONFIGS[config])
    return go_on(model, optimizer, range(20)), weights(model), copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("stop", [1, 6, 9])
@pytest.mark.parametrize("base", [adamw, matrices_and_rest])
@pytest.mark.parametrize("config", CONFIGS)
def test_resumed_run_equals_the_uninterrupted_one(config: str, base: Any, stop: int, tmp_path: Path) -> None:
    expected, end, state = uninterrupted(config, base)

    first = make_net()
    interrupted = wrap(first, base, CONFIGS[config])
    before = go_on(first, interrupted, range(stop))
    torch.save({"model": first.state_dict(), "optimizer": interrupted.state_dict()}, tmp_path / "checkpoint.pt")

    second = make_net(seed=1)
    resumed = wrap(second, base, CONFIGS[config])
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    second.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert before + go_on(second, resumed, range(stop, 20)) == expected
    assert_same(weights(second), end)
    assert_same(resumed.state_dict(), state)


def test_the_configurations_above_switch_back_and_forth() -> None:
    for name, config in CONFIGS.items():
        if name != "default":
            model = make_net()
            assert go_on(model, wrap(model, config=config), range(20))[-1]["switches"] >= 2, name


RESUME = """
import sys, torch
from tests.loops import make_net, wrap
from tests.test_checkpoint import CONFIGS, go_on

torch.set_num_threads(1)
folder = sys.argv[1]
model = make_net(seed=1)
optimizer = wrap(model, config=CONFIGS["up"])
saved = torch.load(folder + "/checkpoint.pt", weights_only=True)
model.load_state_dict(saved["model"])
optimizer.load_state_dict(saved["optimizer"])
metrics = go_on(model, optimizer, range(9, 20))
torch.save({"metrics": metrics, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder + "/end.pt")
"""


def test_resumed_run_in_a_new_process(tmp_path: Path) -> None:
    model = make_net()
    optimizer = wrap(model, config=CONFIGS["up"])
    go_on(model, optimizer, range(9))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    expected = go_on(model, optimizer, range(9, 20))
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "-c", RESUME, str(tmp_path)], check=True, env=environment)
    end = torch.load(tmp_path / "end.pt", weights_only=True)
    assert end["metrics"] == expected
    assert_same(end["model"], dict(model.state_dict()))
    assert_same(end["optimizer"], optimizer.state_dict())


def test_state_dict_does_not_change_while_training_goes_on() -> None:
    model = make_net()
    optimizer = wrap(model, config=CONFIGS["validation"])
    go_on(model, optimizer, range(5))
    own = optimizer.state_dict()["param_groups"][0]["gapt"]
    before = copy.deepcopy(own)
    go_on(model, optimizer, range(5, 15))
    assert own == before


# To and from bare optimizers


def test_state_of_a_bare_optimizer_loads_with_a_fresh_gate() -> None:
    bare_model, model = make_net(), make_net()
    bare, optimizer = adamw(bare_model), wrap(model, config=CONFIGS["smoothed"])
    run(bare_model, bare, range(5))
    go_on(model, optimizer, range(7))
    model.load_state_dict(bare_model.state_dict())
    with pytest.warns(UserWarning, match="bare optimizer: the gate starts fresh") as warned:
        optimizer.load_state_dict(copy.deepcopy(bare.state_dict()))
    assert warned[0].filename == __file__
    assert_same(without_ours(optimizer.base.state_dict()), bare.state_dict())
    fresh_model = make_net()
    fresh_model.load_state_dict(bare_model.state_dict())
    fresh = wrap(fresh_model, config=CONFIGS["smoothed"])
    fresh.base.load_state_dict(copy.deepcopy(bare.state_dict()))
    assert_same(optimizer.state_dict(), fresh.state_dict())
    assert go_on(model, optimizer, range(12)) == go_on(fresh_model, fresh, range(12))


def test_ours_loads_into_a_bare_optimizer() -> None:
    model, bare_model = make_net(), make_net()
    optimizer, bare = wrap(model), adamw(bare_model)
    run(model, optimizer, range(5))
    bare_model.load_state_dict(model.state_dict())
    bare.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(model, optimizer, range(5, 9))
    run(bare_model, bare, range(5, 9))
    assert_same(weights(model), weights(bare_model))


# What does not fit


BASIC = GAPTConfig()


def another(name: str) -> tuple[nn.Module, GAPTOptimizer]:
    model = make_net(seed=2)
    layers = "layers.1" if name == "layers" else "layers.*"
    config = {
        "layers": BASIC,
        "entropy.alpha": BASIC.model_copy(update={"entropy": EntropyConfig(alpha=float("inf"))}),
        "entropy.window": BASIC.model_copy(update={"entropy": EntropyConfig(window=4)}),
        "entropy.normalize": BASIC.model_copy(update={"entropy": EntropyConfig(normalize=True)}),
        "layers.skip_first": BASIC.model_copy(update={"layers": LayerConfig(skip_first=1)}),
        "gate.rule": BASIC.model_copy(update={"gate": GateConfig(rule="published")}),
        "gate.signal": BASIC.model_copy(update={"gate": GateConfig(signal="validation")}),
    }[name]
    return model, GAPTOptimizer(adamw(model), RepresentationHook(model, layers), config)


@pytest.mark.parametrize(
    ("difference", "message"),
    [
        ("layers", r"layers \['layers\.0'.*this hook has \['layers\.1'\]"),
        ("entropy.alpha", r"entropy\.alpha=2\.0, found inf"),
        ("entropy.window", r"entropy\.window=8, found 4"),
        ("entropy.normalize", r"entropy\.normalize=False, found True"),
        ("layers.skip_first", r"layers\.skip_first=0, found 1"),
        ("gate.rule", r"gate\.rule='smoothed', found 'published'"),
        ("gate.signal", r"gate\.signal='train', found 'validation'"),
    ],
)
def test_state_of_another_run_is_refused_and_nothing_changes(difference: str, message: str) -> None:
    model = make_net()
    optimizer = wrap(model)
    run(model, optimizer, range(4))
    saved = optimizer.state_dict()
    other_model, other = another(difference)
    run(other_model, other, range(2))
    before, moments, metrics = copy.deepcopy(other.state_dict()), other.base.state, other.metrics
    with pytest.raises(ValueError, match=message) as refused:
        other.load_state_dict(saved)
    assert 'remove "gapt"' in str(refused.value)
    assert_same(other.state_dict(), before)
    assert other.base.state is moments
    assert other.metrics is metrics
    # The remedy that the message names.
    saved["param_groups"][0].pop("gapt")
    with pytest.warns(UserWarning, match="fresh"):
        other.load_state_dict(saved)


OTHER_SETTINGS = GAPTConfig(
    gate=GateConfig(smoothing=0.5, patience_memorization=3),
    objective=ObjectiveConfig(weight=0.123, max_nonfinite=99),
    layers=LayerConfig(reduce="largest_drop"),
    alignment=AlignmentConfig(every=0),
)


def test_other_settings_go_on_and_are_said() -> None:
    """As ``FloatingPointError`` advises: raise max_nonfinite."""
    model = make_net()
    optimizer = wrap(model)
    run(model, optimizer, range(4))
    saved = optimizer.state_dict()
    other_model = make_net(seed=2)
    other = wrap(other_model, config=OTHER_SETTINGS)
    before = copy.deepcopy(other.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="other settings"):
            other.load_state_dict(saved)
    assert_same(other.state_dict(), before)  # where warnings are errors nothing is changed

    with pytest.warns(UserWarning, match="other settings") as warned:
        other.load_state_dict(saved)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    said = str(warned[0].message)
    old, new = BASIC.model_dump(), OTHER_SETTINGS.model_dump()
    for section, values in new.items():
        for name, value in values.items():
            line = f"{section}.{name}: {old[section][name]!r} -> {value!r}"
            assert (line in said) == (old[section][name] != value)
    metrics = run(other_model, other, range(4, 6))[-1]
    assert metrics is not None
    assert metrics["step"] == 6


@pytest.mark.parametrize("field", ["kernel", "center", "window"])
def test_a_state_that_does_not_say_what_its_entropies_are_is_refused(field: str) -> None:
    model = make_net()
    optimizer = wrap(model)
    saved = optimizer.state_dict()
    own = json.loads(saved["param_groups"][0]["gapt"])
    del own["config"]["entropy"][field]
    saved["param_groups"][0]["gapt"] = json.dumps(own)
    with pytest.raises(ValueError, match=rf"gapt\.config\.entropy\.{field} is required, found nothing"):
        optimizer.load_state_dict(saved)


def test_a_frozen_gate_refuses_the_other_phase() -> None:
    model = make_net()
    optimizer = wrap(model, config=GAPTConfig(gate=GateConfig(initial_phase="compression")))
    run(model, optimizer, range(2))
    frozen = wrap(make_net(), config=GAPTConfig(gate=GateConfig(frozen=True)))
    with pytest.raises(ValueError, match=r"gapt\.gate\.phase is 'compression'.*initial_phase='memorization'"):
        frozen.load_state_dict(optimizer.state_dict())


def test_layers_of_a_parallel_model_are_the_same_layers() -> None:
    """DistributedDataParallel and torch.compile put something before the names."""
    model = make_net()
    optimizer = wrap(model)
    run(model, optimizer, range(2))
    saved = optimizer.state_dict()
    text = saved["param_groups"][0]["gapt"].replace('"layers.', '"module._orig_mod.layers.')
    assert text != saved["param_groups"][0]["gapt"]
    saved["param_groups"][0]["gapt"] = text
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert_same(optimizer.state_dict(), before)


HOSTILE: list[tuple[str, Any, str]] = [
    ("gate.phase", "banana", "compression"),
    ("gate.switches", -1, "greater than or equal to 0"),
    ("gate.switches", 99, "steps"),
    ("gate.loss", float("nan"), "finite"),
    ("gate.best", "low", "number"),
    ("gate.entry_loss", float("inf"), "finite"),
    ("gate", None, "object"),
    ("steps", "abc", "integer"),
    ("steps", 3.0, "integer"),
    ("steps", True, "integer"),
    ("steps", 2**63, "less"),
    ("compression_steps", 99, "steps"),
    ("nonfinite_steps", 99, "steps"),
    ("nonfinite_run", 1, "nonfinite_steps"),
    ("unjudged_loss", 1.0, "unjudged_steps"),
    ("unjudged_validation", [float("nan")], "finite"),
    ("unjudged_validation", 3, "array"),
    ("layers", None, "array"),
    ("targets", [], "object"),
    ("targets", {"layers.9": 1.0}, "some of the layers"),
    ("ran", ["layers.0"], "unknown"),  # of versions before the first release
    ("config", [], "object"),
    ("config.objective.weight", "0.1", "number"),
    ("config.objective.weight", -1.0, "greater"),
    ("config.objective.wait", 1, "unknown"),
    ("config.objective.max_ratio", 1.0, "unknown"),  # a setting of versions before the first release
    ("config.objective.direction", "cap", "'down' or 'up'"),
    ("config.gate.rule", "mine", "smoothed"),
]


@pytest.mark.parametrize(("path", "value", "why"), HOSTILE, ids=[f"{path}={value!r}" for path, value, _ in HOSTILE])
@pytest.mark.parametrize("base", [adamw, matrices_and_rest])
def test_a_damaged_field_is_named(base: Any, path: str, value: Any, why: str) -> None:
    model = make_net()
    optimizer = wrap(model, base, CONFIGS["smoothed"])
    run(model, optimizer, range(4))
    saved = copy.deepcopy(optimizer.state_dict())
    run(model, optimizer, range(4, 6))
    before = copy.deepcopy(optimizer.state_dict())
    own = json.loads(saved["param_groups"][0]["gapt"])
    *above, last = path.split(".")
    holder = own
    for name in above:
        holder = holder[name]
    holder[last] = value
    saved["param_groups"][0]["gapt"] = json.dumps(own)
    with pytest.raises(ValueError, match=rf"gapt\.{path}.*{why}.*start the gate fresh") as refused:
        optimizer.load_state_dict(saved)
    assert repr(value).strip("[]") in str(refused.value)
    assert_same(optimizer.state_dict(), before)


@pytest.mark.parametrize("found", [None, [1], "gapt"])
def test_a_state_dict_is_a_mapping(found: Any) -> None:
    with pytest.raises(ValueError, match=f"^state_dict must be a mapping, found {type(found).__name__}$"):
        wrap(make_net()).load_state_dict(found)


def without_a_group(state: dict[str, Any]) -> None:
    state["param_groups"].append({"params": []})


def without_a_parameter(state: dict[str, Any]) -> None:
    state["param_groups"][0]["params"].pop()


def without_groups(state: dict[str, Any]) -> None:
    state["gapt"] = state.pop("param_groups")[0]["gapt"]


@pytest.mark.parametrize("damage", [without_a_group, without_a_parameter, without_groups])
def test_what_is_the_base_s_fails_as_without_us(damage: Callable[[dict[str, Any]], None]) -> None:
    model, bare = make_net(), adamw(make_net())
    optimizer = wrap(model, config=CONFIGS["smoothed"])
    run(model, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    damage(saved)
    run(model, optimizer, range(3, 5))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(Exception) as alone:  # noqa: PT011  # whatever torch raises
        bare.load_state_dict(copy.deepcopy(saved))
    with pytest.raises(type(alone.value)) as ours:
        optimizer.load_state_dict(saved)
    assert str(ours.value) == str(alone.value)
    assert_same(optimizer.state_dict(), before)


@pytest.mark.parametrize("base", [adamw, matrices_and_rest])
def test_ours_is_checked_before_the_base_is_touched(base: Any) -> None:
    model = make_net()
    optimizer = wrap(model, base, CONFIGS["smoothed"])
    run(model, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0].update(gapt="{}", lr=77.0)
    moments = dict(optimizer.state)
    with pytest.raises(ValueError, match="start the gate fresh"):
        optimizer.load_state_dict(saved)
    assert all(group["lr"] != 77.0 for group in optimizer.param_groups)
    assert all(optimizer.state[p] is state for p, state in moments.items())


@pytest.mark.parametrize("damage", ["groups", "sizes", "gate", "missing", "json", "type", "kind"])
def test_damaged_state_changes_nothing(damage: str) -> None:
    model = make_net()
    optimizer = wrap(model, config=CONFIGS["smoothed"])
    run(model, optimizer, range(4))
    saved = copy.deepcopy(optimizer.state_dict())
    run(model, optimizer, range(4, 7))
    before = copy.deepcopy(optimizer.state_dict())
    own = json.loads(saved["param_groups"][0]["gapt"])
    if damage == "groups":
        saved["param_groups"].append({"params": []})
    elif damage == "sizes":
        saved["param_groups"][0]["params"].pop()
    elif damage == "gate":
        own["gate"]["novelty"] = 1
    elif damage == "missing":
        del own["steps"]
    saved["param_groups"][0]["gapt"] = {"json": json.dumps(own)[:-1], "type": own, "kind": "3"}.get(
        damage, json.dumps(own)
    )
    with pytest.raises(ValueError, match=r"group|novelty|steps|must be an object|start the gate fresh"):
        optimizer.load_state_dict(saved)
    assert_same(optimizer.state_dict(), before)


def test_loading_drops_what_was_not_yet_stepped() -> None:
    model = make_net()
    optimizer = wrap(model)
    run(model, optimizer, range(2))
    saved = optimizer.state_dict()
    optimizer.backward(loss_of(model, 2))
    optimizer.load_state_dict(saved)
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.metrics is not None
    assert optimizer.metrics.step == 2
    (metrics,) = run(model, optimizer, range(3, 4))
    assert metrics is not None
    assert metrics["step"] == 3


# torch.distributed.checkpoint


def two_groups(model: nn.Module) -> Optimizer:
    head = list(model.head.parameters())
    rest = [p for name, p in model.named_parameters() if "head" not in name]
    return torch.optim.AdamW([{"params": rest}, {"params": head, "lr": 0.003}], lr=0.01)


def started(base: Any, config: GAPTConfig = CONFIGS["smoothed"]) -> tuple[Net, GAPTOptimizer]:
    model = make_net()
    optimizer = wrap(model, base, config)
    go_on(model, optimizer, range(7))
    return model, optimizer


OPTIONS = [
    pytest.param(StateDictOptions(), id="nested"),
    pytest.param(StateDictOptions(full_state_dict=True), id="nested, of all ranks"),
    pytest.param(StateDictOptions(flatten_optimizer_state_dict=True), id="flattened"),
]
BASES = [adamw, two_groups, sgd, matrices_and_rest]


def fresh(base: Any, model: nn.Module) -> tuple[Net, GAPTOptimizer]:
    """A new optimizer of a new model with the weights of ``model``."""
    other_model = make_net(seed=1)
    other_model.load_state_dict(model.state_dict())
    return other_model, wrap(other_model, base, CONFIGS["smoothed"])


def assert_goes_on_alike(a: tuple[Net, GAPTOptimizer], b: tuple[Net, GAPTOptimizer]) -> None:
    assert_same(a[1].state_dict(), b[1].state_dict())
    assert go_on(*a, range(7, 15)) == go_on(*b, range(7, 15))
    assert_same(weights(a[0]), weights(b[0]))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("base", BASES)
def test_distributed_state_dict_keeps_the_gate(base: Any, options: StateDictOptions) -> None:
    model, optimizer = started(base)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    other_model, other = fresh(base, model)
    set_optimizer_state_dict(other_model, other, saved, options=options)
    assert_goes_on_alike((other_model, other), (model, optimizer))


@pytest.mark.filterwarnings("ignore:torch.distributed is (disabled, )?unavailable or uninitialized:UserWarning")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("base", [two_groups, matrices_and_rest])
def test_distributed_checkpoint_on_disk_keeps_the_gate(base: Any, options: StateDictOptions, tmp_path: Path) -> None:
    model, optimizer = started(base)
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}, checkpoint_id=tmp_path)
    other_model, other = fresh(base, model)
    loaded = {"optimizer": get_optimizer_state_dict(other_model, other, options=options)}
    dcp.load(loaded, checkpoint_id=tmp_path)
    set_optimizer_state_dict(other_model, other, loaded["optimizer"], options=options)
    assert_goes_on_alike((other_model, other), (model, optimizer))


class Container:
    """As torchtitan keeps optimizers: a Stateful whose state dict is flat."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.options = StateDictOptions(flatten_optimizer_state_dict=True)

    def state_dict(self) -> dict[str, Any]:
        return dict(get_optimizer_state_dict(self.model, self.optimizer, options=self.options))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_optimizer_state_dict(self.model, self.optimizer, state_dict, options=self.options)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("base", [two_groups, matrices_and_rest])
def test_a_flat_checkpoint_of_a_stateful_keeps_the_gate(base: Any, tmp_path: Path) -> None:
    model, optimizer = started(base)
    dcp.save({"optimizer": Container(model, optimizer)}, checkpoint_id=tmp_path / "checkpoint")
    other_model, other = fresh(base, model)
    dcp.load({"optimizer": Container(other_model, other)}, checkpoint_id=tmp_path / "checkpoint")
    assert_goes_on_alike((other_model, other), (model, optimizer))


def test_a_flat_state_dict_is_read_at_any_parameter() -> None:
    """On another split of the model over stages, the first group may be of parameters that were in the second."""
    model, optimizer = started(two_groups)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    other_model, other = fresh(lambda m: torch.optim.AdamW(m.head.parameters()), model)
    set_optimizer_state_dict(other_model, other, saved, options=options)
    assert_same(own_of(other), own_of(optimizer))
    assert other.param_groups[0]["lr"] == 0.003


def own_of(optimizer: GAPTOptimizer) -> Any:
    return json.loads(optimizer.state_dict()["param_groups"][0]["gapt"])


@pytest.mark.parametrize("base", [two_groups, matrices_and_rest])
@pytest.mark.parametrize("named", [False, True])
def test_a_state_dict_with_ours_in_the_first_group_only_loads(base: Any, named: bool) -> None:
    """As before there was one in every group."""
    model, optimizer = started(base)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer) if named else optimizer.state_dict())
    del saved["param_groups"][1]["gapt"]
    other_model, other = fresh(base, model)
    if named:
        set_optimizer_state_dict(other_model, other, saved)
    else:
        other.load_state_dict(saved)
    assert_goes_on_alike((other_model, other), (model, optimizer))


def test_a_flat_state_dict_of_a_bare_optimizer_is_loaded_before_wrapping() -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    bare_model = make_net()
    bare = adamw(bare_model)
    run(bare_model, bare, range(3))
    saved = get_optimizer_state_dict(bare_model, bare, options=options)
    model = make_net(seed=1)
    base = adamw(model)
    set_optimizer_state_dict(model, base, copy.deepcopy(saved), options=options)
    optimizer = wrap(model, lambda _: base)
    assert_same(without_ours(optimizer.base.state_dict()), bare.state_dict())
    with pytest.raises(KeyError, match="gapt"):  # torch looks it up
        set_optimizer_state_dict(model, optimizer, saved, options=options)


def test_a_flat_state_dict_of_ours_loads_into_a_bare_optimizer() -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, optimizer = started(adamw)
    bare_model = make_net(seed=1)
    bare = adamw(bare_model)
    set_optimizer_state_dict(
        bare_model, bare, get_optimizer_state_dict(model, optimizer, options=options), options=options
    )
    assert_same(bare.state_dict(), without_ours(optimizer.base.state_dict()))
