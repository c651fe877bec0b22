"""TRL: its trainers are subclasses of transformers.Trainer, so the optimizer and the same callback are all to add."""

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, get_constant_schedule
from trl import SFTConfig, SFTTrainer

from gapt_optim import GAPTOptimizer, RepresentationHook
from gapt_optim.integrations.transformers import GAPTCallback


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Numbers from 0 to 61 are words."""
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *map(str, range(62))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    )


def main() -> None:
    torch.manual_seed(0)
    texts = [" ".join(str((start + i) % 62) for i in range(12 + start % 9)) for start in range(256)]
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)
    model = GPT2LMHeadModel(config)
    hook = RepresentationHook(model, "transformer.h.*")  # new
    optimizer = GAPTOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-3), hook)  # new: was the bare optimizer
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            folder, num_train_epochs=3, per_device_train_batch_size=16, logging_steps=16, save_strategy="no",
            report_to=[], disable_tqdm=True, use_cpu=not torch.cuda.is_available(), bf16=False,
        )  # fmt: skip
        trainer = SFTTrainer(
            model, args, train_dataset=Dataset.from_dict({"text": texts}), processing_class=word_tokenizer(),
            optimizers=(optimizer, get_constant_schedule(optimizer)),
        )  # fmt: skip
        trainer.add_callback(GAPTCallback(trainer))  # new: also logs phase and entropies
        trainer.train()
    metrics = optimizer.metrics
    assert metrics is not None
    print(f"loss {metrics.loss:.3f}, entropy {metrics.entropy:.3f}, {optimizer.phase.value} after {metrics.step} steps")


if __name__ == "__main__":
    main()
