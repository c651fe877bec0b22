"""Pretrains GPT-2 on web text with GAPT, and shows what that changes against plain AdamW.

    python examples/gpt2_fineweb.py --compare                      # a small GPT-2: minutes on two CPU cores
    python examples/gpt2_fineweb.py --compare --seeds 5            # means and intervals over seeds, every method
    python examples/gpt2_fineweb.py --data corpus.jsonl --weight 0.3 --window 16
    python examples/gpt2_fineweb.py --preset small --out runs/124m            # GPT-2 124M, on a GPU
    python examples/gpt2_fineweb.py --preset small --out runs/124m --resume   # goes on where that one stopped
    torchrun --nproc-per-node 8 examples/gpt2_fineweb.py --preset small --parallel ddp --out runs/124m  # on 8 GPUs

What is written to --out: metrics.jsonl, validation.jsonl, checkpoint.pt, results.json, table.md and pictures. With
--compare, the metrics and checkpoints of plain AdamW and of the constant penalty lie in sub-folders of these names.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

# Read when torch loads. Threads that wait by spinning, the default, make a step several times slower as soon as
# another process wants one of the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import sweep
import torch
from comparison import changes, table
from corpus import Corpus, check_length, first_tokens, load, prepare
from errors import UserError, exit_code
from gpt2 import PRESETS
from gpt2_options import check_flags, compared_methods, make_config, make_parser, settings_to_resume
from gpt2_sweep import run_sweep
from methods import METHODS
from parallel import join, leave
from run_folder import RESULTS, SETTINGS, claim, clear, versions, write_json
from text_data import open_source
from training import TrainConfig, check_config, check_layers, train

from gapt_optim.viewing import draw_alignment, draw_entropy_map, draw_training, read_run, sign_changes


def run(argv: list[str] | None = None) -> dict[str, Any]:
    """The script, from the command line to the results."""
    ranks = join()
    parser, flags = make_parser()
    given = vars(parser.parse_args(argv))
    out = Path(given.pop("out", "runs/gpt2_seeds" if "seeds" in given else "runs/gpt2_fineweb"))
    resume, overwrite, quiet = (given.pop(name, False) for name in ("resume", "overwrite", "quiet"))
    # How it is run, not what: typed anew when it goes on, which may be elsewhere.
    launch: dict[str, Any] = {name: given.pop(name) for name in ("parallel", "compile") if name in given}

    # Everything that can be refused is refused before anything is computed or replaced.
    check_flags({**given, **launch}, resume, overwrite)
    threads = given.pop("threads", None)
    if "seeds" in given:
        if ranks.control is not None:
            raise UserError("--seeds: trains a run in each of its own processes; start it without torchrun")
        return run_seeds(given, make_config({**given, **launch}, flags), out, quiet)
    stored = ranks.on_first(lambda: claim(out, resume=resume, overwrite=overwrite))
    given = settings_to_resume(given, stored, flags) if resume else given
    config = make_config({**given, **launch}, flags)
    methods = compared_methods(given) if given.get("compare") else [given.get("method", "gapt")]
    check_config(config, ranks)
    if threads is not None:
        torch.set_num_threads(threads)
    ranks.on_first(lambda: open_corpus(given.get("data", "auto"), config, out / "data", resume))
    corpus = ranks.together(lambda: load(out / "data"))
    for length in given.get("train_tokens", []):
        corpus = first_tokens(corpus, length)
    check_length(corpus, config.context)
    check_layers(config, corpus)
    if ranks.first:
        if not resume:
            clear(out, METHODS)
        write_json(out / SETTINGS, given)

    print(describe(corpus), flush=True)
    runs: dict[str, dict[str, Any]] = {}
    folders: dict[str, Path] = {}
    chosen = methods[-1]
    for method in methods:
        folders[method] = out if method == chosen else out / method
        runs[method] = train(
            config,
            corpus,
            seed=given.get("seed", 0),
            method=method,
            folder=folders[method],
            resume=resume,
            progress=not quiet,
            ranks=ranks,
        )

    results = {
        "corpus": corpus.name,
        "tokens_seen": runs[chosen]["tokens_seen"],
        "runs": runs,
        "relative": changes(runs),
        "unigram_entropy": corpus.unigram_entropy,
        "vocabulary": corpus.vocabulary,
        "seed": given.get("seed", 0),
        "config": config.model_dump(),
        "versions": versions(),
    }
    if not ranks.first:
        return results
    lines = table(runs)
    print(f"\n{lines}\n\nUnigram entropy of the corpus: {corpus.unigram_entropy:.3f} nats. Written to {out}.")
    (out / "table.md").write_text(lines + "\n")
    histories = {method: read_run(folder) for method, folder in folders.items()}
    draw_training(histories, out / "training.png", main=chosen)
    draw_entropy_map(histories, out / "layers.png")
    wrapped = {method: history for method, history in histories.items() if method != "plain"}
    if wrapped:
        draw_alignment(wrapped, out / "alignment.png", main=chosen)
        flips = len(sign_changes(histories[chosen].steps)) if chosen in wrapped else 0
        print(f"The cosine of loss and entropy gradient changed its sign {flips} times in {config.steps} steps.")
    write_json(out / RESULTS, results)  # last: a folder with results is a finished run
    return results


def run_seeds(given: dict[str, Any], config: TrainConfig, out: Path, quiet: bool) -> dict[str, Any]:
    """The comparison over seeds, from its flags to its results."""
    methods = compared_methods(given)
    check_config(config)
    sweep.claim(out)
    if (out / SETTINGS).exists():
        raise UserError(f"--out {out}: holds a run of one seed; choose another folder for a comparison of several")
    open_corpus(given.get("data", "auto"), config, out / "data", resume=False)
    whole = load(out / "data")
    lengths = given.get("train_tokens", [])
    for corpus in [first_tokens(whole, length) for length in lengths] or [whole]:
        check_length(corpus, config.context)
    check_layers(config, whole)
    print(describe(whole), flush=True)
    first = given.get("first_seed", 100)
    return run_sweep(
        config,
        whole,
        out / "data",
        methods=methods,
        seeds=range(first, first + given["seeds"]),
        lengths=lengths,
        out=out,
        workers=given.get("workers", 2),
        quiet=quiet,
    )


def describe(corpus: Corpus) -> str:
    return (
        f"Corpus: {len(corpus.train):,} training and {len(corpus.validation):,} validation tokens, vocabulary "
        f"{corpus.vocabulary:,}, unigram entropy {corpus.unigram_entropy:.3f} nats."
    )


def open_corpus(data: str, config: TrainConfig, folder: Path, resume: bool) -> None:
    """Leaves the tokens for the run in ``folder``; a run that is resumed has them already."""
    if resume and (folder / "corpus.json").exists():
        return
    source, line = open_source(data)
    print(line, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = config.steps * config.accumulation * config.batch_size * config.context
    prepare(source, folder, vocabulary=PRESETS[config.preset].vocabulary, tokens=tokens + config.context)


def main() -> None:
    """The script, on each of the processes that torchrun starts."""
    run()
    leave()


if __name__ == "__main__":
    sys.exit(exit_code(main, leave))
