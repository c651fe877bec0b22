"""The commands ``gapt-optim profile``, ``compare`` and ``explain``. Nothing heavy is imported before flags are read."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .comparison import Comparison
    from .results import Profile

SUFFIXES = (".html", ".json", ".csv", ".png", ".pdf", ".svg")


def profile(
    model: str,
    /,
    data: str,
    out: tuple[Path, ...] = (),
    layers: tuple[str, ...] = (),
    windows: tuple[str, ...] = ("8", "all"),
    orders: tuple[float, ...] = (2.0,),
    preset: Literal["layer-by-layer", "diff-erank"] | None = None,
    baseline: Literal["random"] | None = None,
    against: str | None = None,
    length: int | None = None,
    batch_size: int = 8,
    tokens: int = 100_000,
    rankme_rows: int | Literal["auto"] = "auto",
    revision: str | None = None,
    device: str | None = None,
    device_map: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto",
    quantize: Literal["4bit", "8bit"] | None = None,
    trust_remote_code: bool = False,
    wide: bool = False,
) -> None:
    """The layers of a model on some data, without training.

    gapt-optim profile ./my-llama --data text.txt --out page.html

    Args:
        model: A transformers folder or hub name, or module:build; a folder of checkpoints means all of them.
        data: Text (.txt, .jsonl, .parquet, a prompt, a data set of the hub) or module:batches.
        out: Files to write: .html, .json, .csv, .png, .pdf or .svg.
        layers: Globs over modules; default: the longest list.
        windows: Tokens per window; all = sequences.
        orders: Orders of the entropy.
        preset: One entropy, as that paper takes it.
        baseline: Beside the same model, untrained.
        against: A model whose layers are compared with these by CKA.
        length: Tokens per sequence; default: at most 512.
        batch_size: Sequences per batch.
        tokens: Tokens of the text to read.
        rankme_rows: Rows for RankMe; auto = 20 a feature.
        revision: Of the hub; several, as step1000,step2000, give a heat map.
        device: Where to run, such as cuda.
        device_map: Of transformers, such as auto.
        dtype: Of the model's weights.
        quantize: Load the weights in 4 or 8 bits.
        trust_remote_code: Run code that comes with the model.
        wide: Print all columns.
    """
    check_outputs(out, SUFFIXES)
    sizes = [_window(text) for text in windows]
    import torch

    from .loading import checked_device, checkpoints, is_python, load_model, untrained
    from .measuring import profile as profile_layers

    on = checked_device(device)
    weights = None if dtype == "auto" else getattr(torch, dtype)
    found: dict[str, Profile] = {}
    other = None if against is None else load_model(against, dtype=weights, trust_remote_code=trust_remote_code)
    for name, spec, at in checkpoints(model, revision):
        loaded, tokenizer, batches = _loaded(
            spec, data, {"length": length, "batch_size": batch_size, "tokens": tokens}, revision=at, dtype=weights,
            device_map=device_map, quantize=quantize, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        models = {name: loaded} | ({"random": untrained(loaded)} if baseline == "random" else {})
        for title, each in models.items():
            try:
                found[title] = profile_layers(
                    each, batches, layers or None, orders=orders, windows=sizes, preset=preset,
                    rankme_rows=rankme_rows, against=other,
                    tokenizer=tokenizer, device=on, dtype=weights if is_python(spec) else None,
                    progress=sys.stderr.isatty(), name=title, data=data if is_python(data) else Path(data).name,
                )  # fmt: skip
            except Exception as error:  # whatever a model raises on data that does not fit it
                kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                raise ValueError(f"{kind}{(str(error).strip() or repr(error)).splitlines()[0]}") from error
    name = model if is_python(model) else Path(model).name or model
    _show(found, f"Layers of {name}", out, wide=wide, anyway=False)


def compare(
    profiles: list[Path],
    /,
    out: tuple[Path, ...] = (),
    anyway: bool = False,
    wide: bool = False,
) -> None:
    """Profiles side by side: of two the change of each layer, of more a heat map.

    gapt-optim compare base.json tuned.json --out page.html

    Args:
        profiles: What profile wrote with --out NAME.json.
        out: Files to write: .html, .json, .csv, .png, .pdf or .svg.
        anyway: Compare profiles of other data too.
        wide: Print all columns.
    """
    check_outputs(out, SUFFIXES)
    for path in out:
        if path.resolve() in [each.resolve() for each in profiles]:
            raise ValueError(f"--out {path} is one of the profiles to compare; choose another name")
    from .results import load_profiles

    found: dict[str, Profile] = {}
    for path in profiles:
        for name, one in load_profiles(path).items():
            name = name if name not in found else str(path)
            found[name if name not in found else f"{name} ({len(found) + 1})"] = one
    if len(found) < 2:
        raise ValueError(f"give at least two profiles to compare, found {len(found)}")
    names = list(found)
    title = f"From {names[0]} to {names[1]}" if len(found) == 2 else f"{len(found)} profiles"
    _show(found, title, out, wide=wide, anyway=anyway)


def explain(
    model: str,
    /,
    data: str,
    layers: tuple[str, ...] = (),
    trust_remote_code: bool = False,
    wide: bool = False,
) -> None:
    """How each layer's output is read, and the names and shapes of all modules.

    gapt-optim explain ./my-llama --data text.txt --layers "model.layers.*"

    Args:
        model: A transformers folder or hub name, or module:build.
        data: Text (.txt, .jsonl, .parquet, a prompt, a data set of the hub) or module:batches; the first batch is read.
        layers: Globs over modules; default: the longest list.
        trust_remote_code: Run code that comes with the model.
        wide: Break no line.
    """
    from .._display.tables import print_texts
    from ..explain import explain as explained
    from ..explain import modules_of
    from ..hook import RepresentationHook
    from .batches import batch_of_texts, caller, device_of, inputs_of, moved

    loaded, tokenizer, batches = _loaded(
        model, data, {"length": None, "batch_size": 4, "tokens": 4096}, trust_remote_code=trust_remote_code
    )
    batch = moved(batch_of_texts(next(iter(batches), None), tokenizer), device_of(loaded), None)
    if batch is None:
        raise ValueError(f"the data {data!r} has no batch")
    run = caller(loaded, None)
    print_texts(_listed(modules_of(loaded, lambda: run(loaded, batch))), wide=wide)
    print()
    with RepresentationHook(loaded, layers or None) as hook:
        inputs = inputs_of(batch)
        print(explained(hook, inputs[""]) if "" in inputs else explained(hook, **inputs))


def _loaded(spec: str, data: str, text: dict[str, Any], **options: Any) -> tuple[Any, Any, Any]:
    """A model, its tokenizer where texts need one, and batches of the data."""
    from .loading import is_python, load_model, load_tokenizer
    from .texts import load_batches

    model, tokenizer = load_model(spec, **options), None
    if not is_python(spec) and not is_python(data):
        of_both = {name: options[name] for name in ("revision", "trust_remote_code") if name in options}
        tokenizer = load_tokenizer(spec, **of_both)
    return model, tokenizer, load_batches(data, tokenizer, model=model, **text)


def _listed(modules: list[tuple[str, str, str]]) -> list[tuple[str, ...]]:
    """One line for each kind of module: those of a list's blocks, whose numbers alone differ, share one."""
    names = [".".join("*" if part.isdigit() else part for part in name.split(".")) for name, _, _ in modules]
    counts = Counter((name, *rest) for name, (_, *rest) in zip(names, modules, strict=True))
    return [(*module, f"({count} alike)" if count > 1 else "") for module, count in counts.items()]


def check_outputs(paths: Sequence[Path], suffixes: Sequence[str]) -> None:
    """Raises ValueError where a file is of no kind that can be written: a run or a script would be overwritten."""
    for path in paths:
        if path.suffix not in suffixes:
            raise ValueError(f"--out {path} must end in {', '.join(suffixes[:-1])} or {suffixes[-1]}")


def _show(found: dict[str, Profile], title: str, out: Sequence[Path], *, wide: bool, anyway: bool) -> None:
    from .._display.tables import print_table, shared_start
    from .comparison import compare as compared
    from .tables import figures, profile_table, summary_line, what_is_shown

    result: Profile | Comparison
    first, *others = found
    said, start = summary_line(found[first]), ""
    notes = [what_is_shown(found[first])]
    if not others:
        result = found[first]
        table = profile_table(result)
        notes += [f"note: {note}" for note in result.notes]
    else:
        result = compared(found, anyway=anyway)
        table = result.to_pandas()
        said = f"{others[0]}, and its change (Δ) from {first}"
        if len(others) > 1:
            start = shared_start(list(found))
            said = f"{figures(found[first])[0].title} by layer{f', of {start}*' if start else ''}"
        notes += [f"warning: {warning}" for warning in result.warnings]
        notes += [f"note: {name}: {note}" for name, each in found.items() for note in each.notes]
    print_table(table.rename(columns=lambda name: name.removeprefix(start)), said, wide=wide)
    for note in notes:
        print(note)
    for path in out:
        _write(found, result, table, path, title)
        print(f"wrote {path}")


def _write(found: dict[str, Profile], result: Profile | Comparison, table: Any, path: Path, title: str) -> None:
    from .page import draw_profile, write_profile
    from .results import save_profiles

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        save_profiles(found, path)
    elif path.suffix == ".csv":
        frame = next(iter(found.values())).to_pandas() if len(found) == 1 else table
        frame.to_csv(path, index_label="layer")
    else:
        (write_profile if path.suffix == ".html" else draw_profile)(result, path, title=title)


def _window(text: str) -> int | None:
    if text == "all":
        return None
    if not (text.isdecimal() and int(text) >= 2):
        raise ValueError(f'--windows takes numbers of at least 2 and "all", found {text!r}')
    return int(text)
