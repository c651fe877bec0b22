"""The training steps that are compared: bare AdamW, ours in several settings, and the plain ways to do the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from gapt_optim import AlignmentConfig, GAPTConfig, GAPTOptimizer, GateConfig, ObjectiveConfig, RepresentationHook

Step = Callable[[], object]

LAYERS, WIDTH, TOKENS, VOCABULARY = 6, 256, 256, 4096
WEIGHT, WINDOW = 0.1, 8


def build_model() -> nn.Module:
    """A 6-layer GPT-2 of width 256 with random weights."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=LAYERS,
        n_embd=WIDTH,
        n_head=4,
        n_positions=TOKENS,
        vocab_size=VOCABULARY,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config)


def batch() -> Tensor:
    return torch.randint(0, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(1))


def bare() -> Step:
    """AdamW as torch has it."""
    model, tokens = build_model(), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def wrapped(
    phase: Literal["memorization", "compression"], *, activation: bool = True, parameter_every: int = 0
) -> Step:
    """Ours, with the gate frozen in ``phase``."""
    model, tokens = build_model(), batch()
    config = GAPTConfig(
        gate=GateConfig(initial_phase=phase, frozen=True),
        objective=ObjectiveConfig(weight=WEIGHT),
        alignment=AlignmentConfig(activation=activation, parameter_every=parameter_every),
    )
    hook = RepresentationHook(model, "transformer.h.*")
    optimizer = GAPTOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-4), hook, config)

    def step() -> None:
        optimizer.backward(model(tokens, labels=tokens).loss)
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain_entropy(hidden: Tensor) -> Tensor:
    """Mean entropy of the windows of (batch, seq, d), as autograd would be asked for it."""
    z = hidden.reshape(-1, WINDOW, hidden.shape[-1])
    gram = torch.bmm(z, z.mT)
    return (2 * gram.diagonal(dim1=1, dim2=2).sum(1).log() - gram.square().sum((1, 2)).log()).mean()


def _forward(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    output: Any = model(tokens, labels=tokens, output_hidden_states=True)
    entropies = [plain_entropy(hidden) for hidden in output.hidden_states[1:]]
    return output.loss, torch.stack(entropies).mean()


def plain_two_backwards() -> Step:
    """The plain way to the parameter alignment: two retained backward passes, gradients flattened."""
    model, tokens = build_model(), batch()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def flat(loss: Tensor) -> Tensor:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(gradients, parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])

    def step() -> float:
        loss, entropy = _forward(model, tokens)
        first, second = flat(loss), flat(entropy)
        cosine = torch.nn.functional.cosine_similarity(first, second, dim=0)
        total = first + WEIGHT * second
        start = 0
        for parameter in parameters:
            parameter.grad = total[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        optimizer.step()
        optimizer.zero_grad()
        return float(cosine)

    return step


def torchjd_pcgrad() -> Step:
    """TorchJD's backward with its PCGrad aggregator on the two losses."""
    from torchjd.aggregation import PCGrad
    from torchjd.autojac import backward, jac_to_grad

    model, tokens = build_model(), batch()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    aggregator = PCGrad()

    def step() -> None:
        loss, entropy = _forward(model, tokens)
        backward([loss, WEIGHT * entropy], inputs=parameters, parallel_chunk_size=1)
        jac_to_grad(parameters, aggregator)
        optimizer.step()
        optimizer.zero_grad()

    return step


STEPS: dict[str, Callable[[], Step]] = {
    "bare AdamW": bare,
    "memorization, values only": lambda: wrapped("memorization", activation=False),
    "memorization, activation alignment": lambda: wrapped("memorization"),
    "compression, no alignment": lambda: wrapped("compression", activation=False),
    "compression, activation alignment": lambda: wrapped("compression"),
    "compression, parameter alignment every step": lambda: wrapped("compression", parameter_every=1),
    "plain: two retained backwards": plain_two_backwards,
    "TorchJD PCGrad": torchjd_pcgrad,
}
