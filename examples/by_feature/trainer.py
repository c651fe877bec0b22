"""transformers.Trainer: wrap the optimizer, and add a callback that gives the gate the mean loss per token."""

import tempfile

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, get_cosine_schedule_with_warmup

from gapt_optim import GAPTOptimizer, RepresentationHook
from gapt_optim.integrations.transformers import GAPTCallback


class Numbers(Dataset[dict[str, torch.Tensor]]):
    """Sequences that count up, from any number on."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(32) + index) % 64
        return {"input_ids": ids, "labels": ids}


def main() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2))
    model.loss_type = "ForCausalLM"  # or the Trainer counts one token too many per text
    hook = RepresentationHook(model, "transformer.h.*")  # new
    optimizer = GAPTOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-3), hook)  # new: was the bare optimizer
    schedule = get_cosine_schedule_with_warmup(optimizer, 5, 48)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, num_train_epochs=3, per_device_train_batch_size=16, logging_steps=16, save_strategy="no",
            report_to=[], disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=Numbers(), optimizers=(optimizer, schedule))
        trainer.add_callback(GAPTCallback(trainer))  # new: also logs phase and entropies
        trainer.train()
    metrics = optimizer.metrics
    assert metrics is not None
    print(f"loss {metrics.loss:.3f}, entropy {metrics.entropy:.3f}, {optimizer.phase.value} after {metrics.step} steps")


if __name__ == "__main__":
    main()
