"""Muon for the matrices of the blocks and AdamW for the rest, as one optimizer. Muon needs PyTorch 2.9."""

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from gapt_optim import GAPTOptimizer, RepresentationHook


def main() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2))
    matrices = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is q for q in matrices)]
    bases = [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=3e-3)]
    # new: one wrapper for both, and so one gate
    optimizer = GAPTOptimizer(bases, RepresentationHook(model, "transformer.h.*"))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=60)  # new: one schedule for both

    text = torch.randint(0, 64, (8, 33))
    for step in range(1, 61):
        logits = model(input_ids=text[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        optimizer.backward(loss)  # new: was loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0 and optimizer.metrics is not None:
            print(
                f"step {step}: loss {loss.item():.3f}, entropy {optimizer.metrics.entropy:.3f}, {optimizer.phase.value}"
            )


if __name__ == "__main__":
    main()
