"""Entropies of a model that was trained without this library, and the measures that show how to read them."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gapt_optim import EntropyConfig, Measures, RepresentationHook


def main() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=64, n_embd=32, n_layer=3, n_head=2))
    model.train(False)
    batches = [torch.randint(0, 256, (4, 64)) for _ in range(3)]
    hook = RepresentationHook(model, "transformer.h.*")  # new: which layers

    with (
        torch.no_grad(),
        hook.measuring(EntropyConfig(window=16)) as measured,
    ):  # new: within, forward passes are measured
        for batch in batches:
            model(input_ids=batch)

    # new: never read an entropy alone: a few long tokens, or one vector that all share, lower it without compression
    print(f"{'layer':<16} entropy  linear  centered cosine  norm ratio  mean share")
    for name, entropy in measured.entropies.items():
        each = measured.measures[name]
        print(
            f"{name:<16} {entropy:7.3f} {each.linear_entropy:7.3f} {each.centered_cosine_entropy:16.3f} "
            f"{each.norm_ratio:11.2f} {each.mean_share:11.2f}"
        )
    mean = Measures.mean(measured.measures.values())
    print(f"mean over layers: {measured.mean:.3f} nats of at most log 16 = 2.773; norm ratio {mean.norm_ratio:.2f}")
    hook.remove()  # new: the model is as it was


if __name__ == "__main__":
    main()
