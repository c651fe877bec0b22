"""What PyTorch's own tests of optimizers say, as statements on one subject: each raises where it does not hold."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tests.conformance.subjects import BARE_OF, Case, Subject, made
from tests.loops import assert_same

Statement = Callable[[Case, str], None]


class DoesNotApplyError(Exception):
    """The statement says nothing of this optimizer in this form."""


def trains_as_bare(case: Case, form: str) -> None:
    """Three steps give the same weights, bit for bit."""
    for change in ({}, *({impl: True} for impl in case.info.supported_impls if impl in ("foreach", "fused"))):
        if change and not change.keys().isdisjoint(case.kwargs):
            continue
        ours, bare = made(case, form, **change), made(case, BARE_OF.get(form, form), **change)
        for i in range(3):
            ours.step(i)
            bare.step(i)
            assert_same(ours.weights(), bare.weights())


def goes_in_the_right_direction(case: Case, form: str) -> None:
    """The loss of one batch falls, or rises with maximize, as it does for the bare optimizer."""
    if case.kwargs.get("maximize") and form in ("several", "bare pair"):
        raise DoesNotApplyError("the other optimizer minimizes")
    subject, bare = made(case, form), made(case, BARE_OF.get(form, form))
    before = subject.loss(0).item()
    subject.train([0] * 5)
    bare.train([0] * 5)
    after = subject.loss(0).item()
    assert after == bare.loss(0).item()
    assert after > before if case.kwargs.get("maximize") else after < before


def steps_with_schedulers(case: Case, form: str) -> None:
    """With each of its schedulers: the same learning rates and weights."""
    for makers in case.info.scheduler_inputs:
        subjects = [made(case, form), made(case, BARE_OF.get(form, form))]
        schedulers = [[maker(o) for maker in makers for o in subject.optimizers] for subject in subjects]
        for i in range(4):
            for subject, own in zip(subjects, schedulers, strict=True):
                loss = subject.loss(i).item()
                subject.step(i)
                for scheduler in own:
                    scheduler.step(loss) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
            rates = [[float(g["lr"]) for o in s.optimizers for g in o.param_groups] for s in subjects]
            assert rates[0] == rates[1]
        assert_same(subjects[0].weights(), subjects[1].weights())


def learning_rates_of_groups(case: Case, form: str) -> None:
    """Two parameter groups with learning rates of their own, and one changed on the way."""
    if not case.info.supports_param_groups or case.name == "LBFGS":
        raise DoesNotApplyError("one parameter group only")
    subjects = [made(case, form, split=True), made(case, BARE_OF.get(form, form), split=True)]
    for subject in subjects:
        subject.train(range(2))
        subject.optimizer.param_groups[0]["lr"] = 0.002
        subject.train(range(2, 4))
    assert_same(subjects[0].weights(), subjects[1].weights())


def nothing_without_gradients(case: Case, form: str) -> None:
    """A step without gradients changes neither parameters nor state."""
    if case.info.step_requires_closure:
        raise DoesNotApplyError("its closure makes gradients")
    subject = made(case, form)
    subject.zero_grad()
    before, state = subject.weights(), subject.saved()
    for optimizer in subject.optimizers:
        optimizer.step()
    assert_same(subject.weights(), before)
    assert_same([each["state"] for each in subject.saved()], [each["state"] for each in state])


def zero_gradients(case: Case, form: str) -> None:
    """With gradients of zero, the parameters are those of the bare optimizer after it."""
    if case.info.step_requires_closure:
        raise DoesNotApplyError("its closure makes gradients")
    subjects = [made(case, form), made(case, BARE_OF.get(form, form))]
    for subject in subjects:
        subject.evaluate(0)
        for p in subject.model.parameters():
            if p.grad is not None:
                p.grad = torch.zeros_like(p.grad)
        for optimizer in subject.optimizers:
            optimizer.step()
    assert_same(subjects[0].weights(), subjects[1].weights())


def can_be_printed(case: Case, form: str) -> None:
    """``repr`` shows the class of the optimizer and its settings."""
    subject = made(case, form)
    for text in (repr(subject.optimizer), str(subject.optimizer)):
        assert case.name in text
        assert "lr: " in text


def state_dict_is_deterministic(case: Case, form: str) -> None:
    """Equal but not identical parameters give equal state dicts; loading changes nothing given, goes on bit for bit."""
    first, second = made(case, form).train(range(3)), made(case, form, seed=1)
    second.model.load_state_dict(first.model.state_dict())
    saved = first.saved()
    given = copy.deepcopy(saved)
    second.load(given)
    assert_same(given, saved)
    first.train(range(3, 6))
    second.train(range(3, 6))
    assert_same(second.weights(), first.weights())
    assert_same(second.saved(), first.saved())


def older_state_dicts_load(case: Case, form: str) -> None:
    """State dicts of versions without foreach, maximize, ... in their groups load, and training goes on."""
    for flag in case.info.not_og_supported_flags:
        subject = made(case, form).train(range(1))
        saved = subject.saved()
        if flag not in saved[0]["param_groups"][0]:
            continue
        for state in saved:
            for group in state["param_groups"]:
                group.pop(flag, None)
        subject.load(saved)
        subject.train(range(1, 2))


def step_counts_may_be_numbers(case: Case, form: str) -> None:
    """Step counts that are no tensors yet, as older versions saved them."""
    subject = made(case, form).train(range(2))
    saved = subject.saved()
    for state in saved:
        for values in state["state"].values():
            if isinstance(values.get("step"), torch.Tensor):
                values["step"] = values["step"].item()
    subject.load(saved)
    subject.train(range(2, 4))


def named_parameters(case: Case, form: str) -> None:
    """State dicts of optimizers with and without parameter names load into each other."""
    for here, there in ((False, True), (True, False)):
        first, second = made(case, form, named=here).train(range(2)), made(case, form, named=there)
        second.model.load_state_dict(first.model.state_dict())
        second.load(first.saved())
        first.train(range(2, 3))
        second.train(range(2, 3))
        assert_same(second.weights(), first.weights())
        assert "param_names" in second.optimizer.param_groups[0]


def weights_only_files(case: Case, form: str) -> None:
    """A state dict loads from a file with weights_only=True, as it was."""
    saved = made(case, form).train(range(2)).saved()
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=True), saved)


def step_hooks(case: Case, form: str) -> None:
    """Before and after each step, in order; a pre-hook may replace the arguments; removed ones are silent."""
    subject, seen = made(case, form), []
    handles = [
        subject.optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", o))),
        subject.optimizer.register_step_pre_hook(lambda o, args, kwargs: (args, kwargs)),
        subject.optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(("post", o))),
    ]
    subject.train(range(2))
    assert [what for what, _ in seen] == ["pre", "post"] * 2
    assert all(who is subject.optimizer for _, who in seen)
    for handle in handles:
        handle.remove()
    subject.train(range(2, 3))
    assert len(seen) == 4


def hooks_on_all_optimizers(case: Case, form: str) -> None:
    """Once for each step of each optimizer that steps, with it."""
    subject, seen = made(case, form), []
    handles = [
        register_optimizer_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", o))),
        register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append(("post", o))),
    ]
    try:
        subject.train(range(2))
    finally:
        for handle in handles:
            handle.remove()
    stepping = subject.optimizers
    if form in BARE_OF:
        base = subject.optimizer.base
        stepping = list(base) if isinstance(base, tuple) else [base]
    assert [(what, id(o)) for what, o in seen] == [(what, id(o)) for o in stepping for what in ("pre", "post")] * 2


def state_dict_hooks(case: Case, form: str) -> None:
    """Pre-hooks see the optimizer, post-hooks may change or replace the dict, in the order they ask for."""
    optimizer, seen = made(case, form).optimizer, []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("second"))
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("first"), prepend=True)
    optimizer.register_state_dict_post_hook(lambda o, state: state.update(changed=1))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "replaced": 2})
    state = optimizer.state_dict()
    assert seen == ["first", "second"]
    assert (state["changed"], state["replaced"]) == (1, 2)


def load_state_dict_hooks(case: Case, form: str) -> None:
    """A pre-hook may replace what is loaded, post-hooks come last."""
    subject = made(case, form).train(range(2))
    optimizer, seen = subject.optimizer, []
    saved = subject.saved()[0]
    rate = 0.0125

    def replace(o: Any, state: dict[str, Any]) -> dict[str, Any]:
        seen.append("pre")
        return {**state, "param_groups": [{**group, "lr": rate} for group in state["param_groups"]]}

    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("post"))
    optimizer.register_load_state_dict_pre_hook(replace)
    optimizer.load_state_dict(saved)
    assert seen == ["pre", "post"]
    assert all(group["lr"] == rate for group in optimizer.param_groups)
    assert all(group.get("gapt") is None for group in optimizer.param_groups)


def can_be_copied(case: Case, form: str) -> None:
    """``deepcopy`` of model and optimizer, and pickle, have the same public attributes and go on bit for bit."""
    for way in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        subject = made(case, form).train(range(2))
        model, optimizers = way((subject.model, subject.optimizers))
        public = [{name for name in o.__dict__ if not name.startswith("_")} for o in (subject.optimizer, optimizers[0])]
        assert public[0] == public[1]
        other = Subject(case, form, model, optimizers)
        subject.train(range(2, 4))
        other.train(range(2, 4))
        assert_same(other.weights(), subject.weights())


def has_state(case: Case, form: str) -> None:
    """After a step the state of parameters that had a gradient is where PyTorch has it."""
    if form == "bare pair":
        raise DoesNotApplyError("two optimizers have two states")
    subject = made(case, form).train(range(1))
    bare = made(case, BARE_OF.get(form, form)).train(range(1))
    assert len(subject.optimizer.state) == sum(len(o.state) for o in bare.optimizers)
    for p in case.own(subject.model, form in ("several", "bare pair")).values():
        if p in subject.under_test.state:
            assert subject.optimizer.state[p] is subject.under_test.state[p]


def groups_are_added(case: Case, form: str) -> None:
    """A group that is added in mid-training is trained, with the defaults where it names nothing."""
    if case.name == "LBFGS":
        raise DoesNotApplyError("one parameter group only")
    if form in ("several", "bare pair"):
        raise DoesNotApplyError("a group is added to one of .base, the wrapper says so")
    found = []
    for each in (form, BARE_OF.get(form, form)):
        subject = made(case, each).train(range(2))
        added = torch.ones(3, 2, requires_grad=True)
        subject.optimizer.add_param_group({"params": [added]})
        assert subject.optimizer.param_groups[-1].keys() == subject.optimizer.param_groups[0].keys()
        if not case.info.only_supports_sparse_grads:
            subject.extra.append(added)
        subject.train(range(2, 4))
        found.append(subject.weights())
    assert_same(found[0], found[1])


def wrong_groups_are_refused(case: Case, form: str) -> None:
    """A parameter that is there already, one that is no leaf, or no tensor."""
    if form in ("several", "bare pair"):
        raise DoesNotApplyError("a group is added to one of .base, the wrapper says so")
    if case.name == "LBFGS":
        raise DoesNotApplyError("one parameter group only")
    subject = made(case, form)
    there = subject.optimizer.param_groups[0]["params"][0]
    no_leaf = torch.ones(2, 2, requires_grad=True) * 2
    for wrong, kind in ((there, ValueError), (no_leaf, ValueError), ("text", TypeError), ({there}, TypeError)):
        try:
            subject.optimizer.add_param_group({"params": wrong})
        except kind:
            continue
        raise AssertionError(f"{wrong!r} was taken")


def closures(case: Case, form: str) -> None:
    """A closure is evaluated with gradients on, its loss is returned, and the weights are the same."""
    subjects = [made(case, form), made(case, BARE_OF.get(form, form))]
    for i in range(3):
        with torch.no_grad():
            losses = [_closure_step(subject, i) for subject in subjects]
        assert losses[0].item() == losses[1].item()
    assert_same(subjects[0].weights(), subjects[1].weights())


def _closure_step(subject: Subject, i: int) -> Any:
    if subject.form == "bare pair":
        with torch.enable_grad():
            return subject.step(i, closure=True)

    def closure() -> Any:
        assert torch.is_grad_enabled()
        return subject.evaluate(i)

    return subject.optimizer.step(closure)


def gradient_scaler(case: Case, form: str) -> None:
    """Scaled gradients, unscaled by the scaler; a step with infinite ones is left out."""
    if case.info.step_requires_closure or case.info.only_supports_sparse_grads:
        raise DoesNotApplyError("a scaler takes no closure, and its CPU kernels no sparse gradients")
    found = []
    for each in (form, BARE_OF.get(form, form)):
        subject = made(case, each)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for i in range(4):
            subject.zero_grad()
            _, total = subject.objective(i)
            scaler.scale(total).backward()
            if i == 2:
                for p in subject.model.parameters():
                    if p.grad is not None:
                        p.grad.fill_(torch.inf)
            for optimizer in subject.optimizers:
                scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 4.0
        found.append(subject.weights())
    assert_same(found[0], found[1])


def gradients_are_zeroed(case: Case, form: str) -> None:
    """To None, or to zeros."""
    subject = made(case, form)
    subject.evaluate(0)
    own = list(case.own(subject.model, form in ("several", "bare pair")).values())
    subject.zero_grad(set_to_none=False)
    assert all(p.grad is not None and float(p.grad.to_dense().abs().sum()) == 0 for p in own)
    subject.zero_grad()
    assert all(p.grad is None for p in own)


def complex_parameters(case: Case, form: str) -> None:
    """A complex parameter beside the model's."""
    if not case.info.supports_complex:
        raise DoesNotApplyError("no complex parameters")
    extra = (torch.randn(3, 2, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)),)
    subjects = [made(case, form, extra=extra), made(case, BARE_OF.get(form, form), extra=extra)]
    for subject in subjects:
        subject.train(range(3))
    assert_same(subjects[0].weights(), subjects[1].weights())


def sparse_gradients(case: Case, form: str) -> None:
    """An embedding with sparse gradients, where the optimizer takes them."""
    if not case.info.supports_sparse and not case.info.only_supports_sparse_grads:
        raise DoesNotApplyError("no sparse gradients")
    if case.kwargs.get("weight_decay"):
        raise DoesNotApplyError("no weight decay with sparse gradients")
    if form in ("several", "bare pair") and case.info.supports_sparse:
        raise DoesNotApplyError("the embedding is AdamW's")
    found = []
    for each in (form, BARE_OF.get(form, form)):
        subject = made(case, each)
        subject.model.embedding.sparse = True
        subject.train(range(3))
        found.append(subject.weights())
    assert_same(found[0], found[1])


def parameter_groups_can_be_changed(case: Case, form: str) -> None:
    """Changing the list of groups changes the optimizer's own."""
    if form in ("several", "bare pair"):
        raise DoesNotApplyError("the list of several is a new one at every access")
    subject = made(case, form)
    for optimizer in subject.optimizers:
        count = len(optimizer.param_groups)
        added = {**optimizer.param_groups[-1], "params": [nn.Parameter(torch.ones(2, 2))]}
        optimizer.param_groups.append(added)
        assert optimizer.param_groups[-1] is added
        assert len(optimizer.state_dict()["param_groups"]) == count + 1
        optimizer.param_groups.pop()
        assert len(optimizer.state_dict()["param_groups"]) == count


STATEMENTS: dict[str, Statement] = {
    str(statement.__name__).replace("_", " "): statement
    for statement in (
        trains_as_bare,
        goes_in_the_right_direction,
        steps_with_schedulers,
        learning_rates_of_groups,
        nothing_without_gradients,
        zero_gradients,
        can_be_printed,
        state_dict_is_deterministic,
        older_state_dicts_load,
        step_counts_may_be_numbers,
        named_parameters,
        weights_only_files,
        step_hooks,
        hooks_on_all_optimizers,
        state_dict_hooks,
        load_state_dict_hooks,
        can_be_copied,
        has_state,
        groups_are_added,
        wrong_groups_are_refused,
        closures,
        gradient_scaler,
        gradients_are_zeroed,
        complex_parameters,
        sparse_gradients,
        parameter_groups_can_be_changed,
    )
}


def outcome(statement: Statement, case: Case, form: str) -> str:
    """ "passed", "does not apply", or what was raised."""
    if form in ("several", "bare pair") and case.name == "LBFGS":
        return "does not apply"
    try:
        statement(case, form)
    except DoesNotApplyError:
        return "does not apply"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "passed"
