"""sentence-transformers: its trainer is a transformers.Trainer; a text and its partner are two passes of one loss."""

import tempfile

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, get_constant_schedule

from gapt_optim import GAPTOptimizer, RepresentationHook
from gapt_optim.integrations.transformers import GAPTCallback


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *map(str, range(62))])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")  # type: ignore[no-untyped-call]
        fast.save_pretrained(folder)
        config = BertConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64
        )
        BertModel(config).save_pretrained(folder)
        bert = Transformer(folder)
        model = SentenceTransformer(modules=[bert, Pooling(32)], device="cpu")

        starts = range(128)
        data = {
            "anchor": [" ".join(str((start + i) % 62) for i in range(12)) for start in starts],
            "positive": [" ".join(str((start + i) % 62) for i in range(4, 20)) for start in starts],
        }
        args = SentenceTransformerTrainingArguments(
            folder, num_train_epochs=3, per_device_train_batch_size=16, logging_steps=8, save_strategy="no",
            report_to=[], disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        hook = RepresentationHook(model, "*.model.encoder.layer.*")  # new
        optimizer = GAPTOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), hook)  # new: was the bare optimizer
        trainer = SentenceTransformerTrainer(
            model, args, train_dataset=Dataset.from_dict(data), loss=MultipleNegativesRankingLoss(model),
            optimizers=(optimizer, get_constant_schedule(optimizer)),
        )  # fmt: skip
        trainer.add_callback(GAPTCallback(trainer))  # new: also logs phase and entropies
        trainer.train()
    metrics = optimizer.metrics
    assert metrics is not None
    print(f"loss {metrics.loss:.3f}, entropy {metrics.entropy:.3f}, {optimizer.phase.value} after {metrics.step} steps")


if __name__ == "__main__":
    main()
