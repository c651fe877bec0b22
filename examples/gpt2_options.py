"""The flags of gpt2_fineweb.py, and the configuration that they make."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from errors import UserError, explain
from gpt2 import PRESETS, Preset
from methods import METHODS
from optimizers import OPTIMIZERS
from parallel import PARALLEL
from pydantic import ValidationError
from training import TrainConfig

from gapt_optim import GAPTConfig, GateConfig

# Of the entropy. A language model's loss falls slowly, and the library's 1.0 outweighs it.
WEIGHT = 0.1
# With a gate on a held-out loss: compression is then short and strong, to undo what was learned by heart.
VALIDATION_WEIGHT = 30.0
VALIDATION_EVERY = 20

# Settings that may differ when a run goes on: they do not change its numbers, or extend it.
FREE_TO_CHANGE = {"steps", "eval_every", "eval_sequences", "checkpoint_every", "device"}
JUDGED = {"eval_every", "eval_sequences"}  # by a gate on validations


class Parser(argparse.ArgumentParser):
    """One line for a bad flag, like for any other bad input."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def make_parser() -> tuple[argparse.ArgumentParser, dict[str, str]]:
    """The flags, and the flag of every field of the configuration (``gapt.gate.rule`` -> ``--gate``)."""
    parser = Parser(
        usage="%(prog)s [options]",
        description="Pretrain GPT-2 with GAPT, and compare with plain AdamW.",
        # What was not typed is absent, so that --resume can tell it from what was.
        argument_default=argparse.SUPPRESS,
    )
    flags: dict[str, str] = {}

    def add(group: Any, flag: str, field: str, help: str, **options: Any) -> None:
        flags[field] = flag
        if not {"action", "choices", "metavar"} & set(options):
            options["metavar"] = {int: "N", float: "X", window: "N"}.get(options.get("type", str), "NAME")
        group.add_argument(flag, dest=field, help=help, **options)

    run = parser.add_argument_group("run")
    add(run, "--data", "data", "auto, fineweb, sotu, or a .txt, .jsonl, .parquet or .bin file (default: auto)")
    add(run, "--out", "out", "folder for everything that is written (default: runs/gpt2_fineweb)", metavar="DIR")
    add(
        run,
        "--train-tokens",
        "train_tokens",
        "only the first N of the corpus; with --seeds several",
        type=int,
        nargs="+",
    )
    add(run, "--method", "method", "what to train without --compare (default: gapt)", choices=METHODS)
    add(run, "--resume", "resume", "go on with the run in --out, with its settings", action="store_true")
    add(run, "--overwrite", "overwrite", "replace the run in --out", action="store_true")
    add(run, "--seed", "seed", "of weights and batches (default: 0)", type=int)
    add(run, "--device", "device", "cpu, cuda, ... (default: auto)")
    add(
        run,
        "--parallel",
        "parallel",
        "over the processes of torchrun: ddp, or fsdp to divide weights and optimizer state too (default: none)",
        choices=PARALLEL,
    )
    add(run, "--threads", "threads", "CPU threads (default: torch's choice)", type=int)
    add(run, "--quiet", "quiet", "no progress bars", action="store_true")

    compare = parser.add_argument_group("comparison")
    add(compare, "--compare", "compare", "train plain AdamW and a constant penalty as well", action="store_true")
    add(compare, "--methods", "methods", "(default: plain penalty gapt, all with --seeds)", choices=METHODS, nargs="+")
    add(compare, "--seeds", "seeds", "compare this many seeds, with intervals", type=int)
    add(compare, "--first-seed", "first_seed", "(default: 100; settings were tuned on 0 to 9)", type=int)
    add(compare, "--workers", "workers", "processes of one thread each, for several seeds (default: 2)", type=int)

    model = parser.add_argument_group("model and training (defaults come with the preset)")
    add(model, "--preset", "preset", "model size (default: micro)", choices=list(PRESETS))
    add(model, "--context", "context", "tokens per sequence", type=int)
    add(model, "--steps", "steps", "optimizer steps", type=int)
    add(model, "--batch-size", "batch_size", "sequences per micro-batch", type=int)
    add(model, "--accumulation", "accumulation", "micro-batches per step", type=int)
    add(model, "--lr", "lr", "highest learning rate", type=float)
    add(model, "--warmup", "warmup", "steps of linear warm-up before the cosine", type=int)
    add(model, "--weight-decay", "weight_decay", "of the matrices (default: 0.1)", type=float)
    add(model, "--clip", "clip", "largest gradient norm (default: 1.0)", type=float)
    add(model, "--dropout", "dropout", "(default: 0.0)", type=float)
    add(model, "--dtype", "dtype", "auto takes bfloat16 autocast on GPUs", choices=["auto", "float32", "bfloat16"])
    add(
        model,
        "--optimizer",
        "optimizer",
        "(default: adamw); muon takes adamw for what is no matrix",
        choices=OPTIMIZERS,
    )
    add(
        model,
        "--compile",
        "compile",
        "torch.compile: a slow start, then fast; recommended on GPUs",
        action="store_true",
    )
    add(model, "--float8", "float8", "8-bit products in the blocks, on Hopper or Ada GPUs", action="store_true")
    add(
        model,
        "--eval-every",
        "eval_every",
        f"steps between validations (50; with --signal validation {VALIDATION_EVERY})",
        type=int,
    )
    add(model, "--eval-sequences", "eval_sequences", "sequences in a validation (default: 128)", type=int)
    add(model, "--checkpoint-every", "checkpoint_every", "steps between checkpoints (default: 100)", type=int)

    gapt = parser.add_argument_group(
        "GAPT (defaults are the library's, but for the weight, and a shorter patience in small presets)"
    )
    default = GAPTConfig()
    add(
        gapt,
        "--weight",
        "gapt.objective.weight",
        f"of the entropy ({WEIGHT}; with --signal validation {VALIDATION_WEIGHT:g})",
        type=float,
    )
    add(gapt, "--combine", "gapt.objective.combine", "how gradients are joined: sum, project, cap")
    add(gapt, "--max-ratio", "gapt.objective.max_ratio", "for --combine cap", type=float)
    add(gapt, "--alpha", "gapt.entropy.alpha", f"order of the entropy ({default.entropy.alpha}); inf works", type=float)
    add(gapt, "--window", "gapt.entropy.window", f"tokens a matrix ({default.entropy.window}) or none", type=window)
    add(gapt, "--layers", "layers", 'glob of the watched modules (default: "transformer.h.*")')
    add(gapt, "--schedule", "gapt.layers.schedule", "which layers are compressed when: all, rotate, ...")
    add(gapt, "--skip-first", "gapt.layers.skip_first", f"({default.layers.skip_first})", type=int)
    add(gapt, "--skip-last", "gapt.layers.skip_last", f"({default.layers.skip_last})", type=int)
    add(gapt, "--reduce", "gapt.layers.reduce", "how layers become one entropy: mean, max, ...")
    add(gapt, "--gate", "gapt.gate.rule", "smoothed, or published for the paper's rule and settings")
    add(gapt, "--signal", "gapt.gate.signal", "loss the gate judges: train or validation")
    add(gapt, "--patience-memorization", "gapt.gate.patience_memorization", "gate updates without progress", type=int)
    add(gapt, "--patience-compression", "gapt.gate.patience_compression", "gate updates without progress", type=int)
    add(gapt, "--min-improvement", "gapt.gate.min_improvement", "relative fall that counts", type=float)
    add(gapt, "--spike-tolerance", "gapt.gate.spike_tolerance", "relative rise that ends compression", type=float)
    add(gapt, "--smoothing", "gapt.gate.smoothing", "decay of the gate's averages", type=float)
    add(gapt, "--parameter-alignment-every", "gapt.alignment.parameter_every", "steps; 0: never", type=int)
    return parser, flags


def check_flags(given: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Refuses flags that contradict each other or have no effect."""
    several = "seeds" in given
    if given.get("compare"):
        if "method" in given:
            raise UserError("--method: --compare trains all methods; give one of the two flags")
    elif several or "methods" in given:
        flag = "--seeds" if several else "--methods"
        raise UserError(f"{flag}: compares methods; give --compare with it")
    if several:
        for flag, typed in (("--resume", resume), ("--overwrite", overwrite)):
            if typed:
                raise UserError(f"{flag}: a comparison of seeds goes on with the runs that are missing; drop the flag")
        if "threads" in given:
            raise UserError("--threads: with --seeds each process has one thread; give --workers")
        if given.get("parallel", "none") != "none":
            raise UserError("--parallel: --seeds trains a run in each of its processes; leave one of the two out")
        if "seed" in given:
            raise UserError("--seed: --seeds counts from --first-seed; give that")
    else:
        for name in ("first_seed", "workers"):
            if name in given:
                raise UserError(f"--{name.replace('_', '-')}: is of use with --seeds only")
        if len(given.get("train_tokens", [])) > 1:
            raise UserError("--train-tokens: several numbers need --seeds")
    for name in ("threads", "seeds", "workers"):
        if given.get(name, 1) < 1:
            raise UserError(f"--{name}: needs at least 1, found {given[name]}")
    if given.get("first_seed", 0) < 0:
        raise UserError(f"--first-seed: must not be negative, found {given['first_seed']}")


def compared_methods(given: dict[str, Any]) -> list[str]:
    """What a comparison trains, plain first: all is compared with it."""
    on_validations = given.get("gapt.gate.signal") == "validation"
    default = ("plain", "gapt") if on_validations else METHODS if "seeds" in given else ("plain", "penalty", "gapt")
    chosen = given.get("methods", default)
    for method in ("penalty", "published"):
        if on_validations and method in chosen and "gapt.objective.weight" not in given:
            raise UserError(
                f"--methods {method}: the weight of {VALIDATION_WEIGHT:g} suits the gate of --signal validation alone; "
                "give --weight, or leave the method out"
            )
    return [method for method in METHODS if method in chosen]


def window(text: str) -> int | None:
    """A number of tokens, or none for whole sequences."""
    return None if text.lower() == "none" else int(text)


def make_config(given: dict[str, Any], flags: dict[str, str]) -> TrainConfig:
    """The configuration: what was given, over the preset's settings, over the defaults."""
    preset = PRESETS[given.get("preset", "micro")]
    values: dict[str, Any] = {
        name: getattr(preset, name) for name in ("context", "steps", "batch_size", "accumulation", "warmup", "lr")
    }
    weight = WEIGHT
    if given.get("gapt.gate.signal") == "validation":
        weight, values["eval_every"] = VALIDATION_WEIGHT, VALIDATION_EVERY
    values["gapt"] = {"gate": gate_defaults(preset, given), "objective": {"weight": weight}}
    for field, value in given.items():
        *sections, name = field.split(".")
        if sections or name in TrainConfig.model_fields:
            target = values
            for section in sections:
                target = target.setdefault(section, {})
            target[name] = value
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise explain(error, flags) from error


def gate_defaults(preset: Preset, given: dict[str, Any]) -> dict[str, Any]:
    """Gate settings that differ from the library's: for the paper's rule, for validations, for short runs."""
    if given.get("gapt.gate.rule") == "published":
        return GateConfig.published().model_dump()
    if given.get("gapt.gate.signal") == "validation":
        return GateConfig.validation().model_dump()
    return {} if preset.patience_compression is None else {"patience_compression": preset.patience_compression}


def settings_to_resume(given: dict[str, Any], stored: dict[str, Any], flags: dict[str, str]) -> dict[str, Any]:
    """The settings a run was started with and what was typed now; refuses what would make it another run."""
    merged = {**stored, **given}
    before, after = _flat(stored, flags), _flat(merged, flags)
    free = FREE_TO_CHANGE - JUDGED if after["gapt.gate.signal"] == "validation" else FREE_TO_CHANGE
    for field in given:
        if field not in free and before.get(field) != after.get(field):
            raise UserError(
                f"{flags[field]}: the run to resume has {before.get(field)}, found {after.get(field)}; drop the flag, "
                "or start a new run in another --out"
            )
    return merged


def _flat(given: dict[str, Any], flags: dict[str, str]) -> dict[str, Any]:
    """Every setting under the name of its field, defaults included."""
    flat: dict[str, Any] = {"data": "auto", "seed": 0, "compare": False, "method": "gapt", **given}

    def collect(prefix: str, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                collect(f"{prefix}{name}.", value)
            else:
                flat[prefix + name] = value

    collect("", make_config(given, flags).model_dump())
    return flat
