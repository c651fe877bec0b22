"""Multiplication beyond the lengths trained on, in three forms; where an "OOD gain" comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..harness import Record, Run
from ..markdown import change_cell, compression_cell, group, mean_cell, p_cell, seeds_line, table, versus
from ..stats import at_equal, mean_interval
from ..tasks import multiplication
from ..tasks.settings import method_settings

FORMS = ("author", "held out", "padded")


def runs(first_look: bool, seeds: Sequence[int] | None) -> list[Run]:
    """All methods at one batch, and plain at half and at twice the batch."""
    base = multiplication.SMALL
    if not first_look:
        base = multiplication.Settings(blocks=4, width=128, heads=4, context=256, batch=8, steps=1200)
    weight = 0.05
    found = []
    for seed in seeds or range(300, 302 if first_look else 305):
        for form in FORMS:
            s = replace(base, form=form, seed=seed)
            found += [
                Run("multiplication", s),
                Run("multiplication", replace(s, **method_settings("gapt", weight))),
                Run("multiplication", replace(s, **method_settings("penalty", weight))),
                Run("multiplication", replace(s, **method_settings("published", 1.0))),
                Run("multiplication", replace(s, **method_settings("published often", 1.0))),
                Run("multiplication", replace(s, batch=base.batch // 2)),
                Run("multiplication", replace(s, batch=base.batch * 2)),
                Run("multiplication", replace(s, **method_settings("gapt", 6 * weight))),
            ]
    return found


def tables(records: list[Record]) -> dict[str, str]:
    """A table per form: in distribution, longer factors, and those at plain's equal loss in distribution."""
    found = {}
    for (form,), of_form in group(records, "form").items():
        batch = sorted(r.settings["batch"] for r in of_form)[len(of_form) // 2]
        plain = [r for r in of_form if r.settings["method"] == "plain" and r.settings["batch"] == batch]
        groups = group(of_form, "method", "weight", "batch")
        header = ["method", "weight", "loss, 1-3 digits", "4-6 digits", "p", "4-6 against plain at equal loss",
                  "5-6 digits at the best of 4", "centred cosine", "norm ratio", "compression", "switches"]  # fmt: skip
        rows = []
        for (method, weight, size), rows_of in groups.items():
            same = method == "plain" and size == batch
            long = versus(rows_of, plain, "ood_loss")
            note = "" if size == batch else f", {'half' if size < batch else 'twice'} the batch"
            rows.append(
                [
                    method + note,
                    f"{weight:g}" if weight else "",
                    mean_cell(rows_of, "in_loss") + ("" if same else f" ({_change(rows_of, plain, 'in_loss')})"),
                    mean_cell(rows_of, "ood_loss") + ("" if same else f" ({_change(rows_of, plain, 'ood_loss')})"),
                    "" if same or long is None else p_cell(long.p_t),
                    "" if same else equal_loss_cell(rows_of, plain),
                    mean_cell(rows_of, "long_loss", "best"),
                    mean_cell(rows_of, "centred_cosine"),
                    mean_cell(rows_of, "norm_ratio", digits=1),
                    compression_cell(rows_of),
                    mean_cell(rows_of, "switches", digits=0),
                ]
            )
        title = f"Multiplication, form `{form}`, {seeds_line(of_form)}, {of_form[0].settings['steps']} steps.\n\n"
        found[f"multiplication-{form.replace(' ', '-')}"] = title + table(header, rows)
    return found


def _change(records: list[Record], plain: list[Record], name: str) -> str:
    return change_cell(versus(records, plain, name))


def equal_loss_cell(records: list[Record], plain: list[Record]) -> str:
    """Loss on longer factors against plain's where plain had this loss in distribution, over the seeds where it had."""
    changes = []
    for record in records:
        for other in (p for p in plain if p.settings["seed"] == record.settings["seed"]):
            curve = other.result["curve"]
            at = at_equal(record.result["final"]["in_loss"], curve["in_loss"], curve["ood_loss"])
            if at == at:
                changes.append(record.result["final"]["ood_loss"] / at - 1)
    if not changes:
        return "plain has no such loss"
    interval = mean_interval(changes)
    if len(changes) < 3:
        return f"{100 * interval.mean:+.0f} %"
    return f"{100 * interval.mean:+.0f} % [{100 * interval.low:+.0f}, {100 * interval.high:+.0f}]"


def pictures(records: list[Record], folder: Path) -> list[Path]:
    """Loss on longer factors over the loss in distribution, along training."""
    from ..pictures import COLORS, NAMES, figure, path_of_training, save

    forms = group(records, "form")
    made, axes = figure(len(forms), width=5.2)
    for axis, ((form,), of_form) in zip(axes, forms.items(), strict=True):
        batch = sorted(r.settings["batch"] for r in of_form)[len(of_form) // 2]
        for (method, weight, size), found in group(of_form, "method", "weight", "batch").items():
            name = f"{NAMES[method]}, {weight:g}" if method == "gapt" else NAMES[method]
            note = "" if size == batch else f", {'half' if size < batch else 'twice'} the batch"
            dashes = (
                ":" if size < batch else "--" if size > batch else "-." if method == "gapt" and weight > 0.1 else "-"
            )
            curves = [record.result["curve"] for record in found]
            x, y = ([c[which] for c in curves] for which in ("in_loss", "ood_loss"))
            path_of_training(axis, x, y, name + note, color=COLORS[method], ls=dashes)
        axis.invert_xaxis()
        axis.set(title=form, xlabel="loss on 1-3 digits; training goes right", ylabel="loss on 4-6 digits")
    axes[0].legend(frameon=False, fontsize=7)
    return [save(made, folder / "multiplication.png")]
