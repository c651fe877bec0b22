"""The training steps that are compared: bare AdamW, ours in several settings, and other ways to do the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gapt_optim import (
    AlignmentConfig,
    EntropyConfig,
    GAPTConfig,
    GAPTOptimizer,
    GateConfig,
    ObjectiveConfig,
    RepresentationHook,
)

Step = Callable[[], object]
Build = Callable[["Size"], Step]

WEIGHT = 0.05
BARE = "bare AdamW"


@dataclass(frozen=True)
class Size:
    """Of the GPT-2 that is trained."""

    layers: int = 6
    width: int = 256
    tokens: int = 256
    """Of the one sequence of a step."""
    vocabulary: int = 4096


SMALL = Size()
WIDE = Size(layers=2, width=768, tokens=1024, vocabulary=1024)
"""For windows: a whole sequence of 1,024 tokens of width 768."""


def build_model(size: Size) -> nn.Module:
    """GPT-2 with random weights and no dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=size.layers,
            n_embd=size.width,
            n_head=max(1, size.width // 64),
            n_positions=size.tokens,
            vocab_size=size.vocabulary,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def batch(size: Size) -> Tensor:
    """One sequence."""
    return torch.randint(0, size.vocabulary, (1, size.tokens), generator=torch.Generator().manual_seed(1))


def bare(size: Size) -> Step:
    """AdamW as torch has it."""
    model, tokens = build_model(size), batch(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def wrapped(
    phase: Literal["memorization", "compression"],
    *,
    every: int = 0,
    parameter_every: int = 0,
    read: bool = False,
    **entropy: Any,
) -> Build:
    """Ours, with the gate frozen in ``phase``.

    Args:
        every: steps from one measurement of angles and measures to the next; 0 = never. The library's default is 10.
        parameter_every: the same for the angle between parameter gradients.
        read: an observer turns each step's metrics, with all measures of all layers, into plain values as a log would.
        entropy: fields of `EntropyConfig`.
    """

    def build(size: Size) -> Step:
        model, tokens = build_model(size), batch(size)
        config = GAPTConfig(
            entropy=EntropyConfig(**entropy),
            gate=GateConfig(initial_phase=phase, frozen=True),
            objective=ObjectiveConfig(weight=WEIGHT),
            alignment=AlignmentConfig(every=every, parameter_every=parameter_every),
        )
        hook = RepresentationHook(model, "transformer.h.*")
        seen: list[Any] = []
        optimizer = GAPTOptimizer(
            torch.optim.AdamW(model.parameters(), lr=1e-4),
            hook,
            config,
            observers=[lambda metrics: seen.append(metrics.as_dict())] if read else [],
        )

        def step() -> None:
            seen.clear()
            optimizer.backward(model(tokens, labels=tokens).loss)
            optimizer.step()
            optimizer.zero_grad()

        return step

    return build


# Other ways, with the entropy of the default kernel: rows of unit length, then about the mean of the window.


def windows_of(hidden: Tensor, window: int | None) -> Tensor:
    """(windows, n, d), prepared."""
    z = hidden.reshape(-1, window or hidden.shape[-2], hidden.shape[-1])
    z = nn.functional.normalize(z, dim=-1)
    return z - z.mean(-2, keepdim=True)


def entropy_by_autograd(hidden: Tensor, window: int | None = 8) -> Tensor:
    """Order 2, without eigenvalues, as autograd would be asked for it."""
    z = windows_of(hidden, window)
    gram = torch.bmm(z, z.mT)
    return (2 * gram.diagonal(dim1=1, dim2=2).sum(1).log() - gram.square().sum((1, 2)).log()).mean()


def entropy_by_eigenvalues(hidden: Tensor, window: int | None = 8) -> Tensor:
    """What research code does: eigenvalues of the normalized Gram matrix."""
    z = windows_of(hidden, window)
    p = torch.linalg.eigvalsh(torch.bmm(z, z.mT))
    p = p / p.sum(-1, keepdim=True)
    value: Tensor = -p.square().sum(-1).log().mean()
    return value


def _forward(model: nn.Module, tokens: Tensor, entropy: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    output: Any = model(tokens, labels=tokens, output_hidden_states=True)
    return output.loss, torch.stack([entropy(hidden) for hidden in output.hidden_states[1:]]).mean()


def by_hand(entropy: Callable[[Tensor], Tensor]) -> Build:
    """Hidden states kept, entropy differentiated by autograd, and read with `.item()` for a gate."""

    def build(size: Size) -> Step:
        model, tokens = build_model(size), batch(size)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def step() -> float:
            loss, value = _forward(model, tokens, entropy)
            (loss + WEIGHT * value).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            return loss.item() + value.item()

        return step

    return build


def two_backwards(size: Size) -> Step:
    """The plain way to parameter alignment: two retained backward passes, gradients flattened."""
    model, tokens = build_model(size), batch(size)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def flat(loss: Tensor) -> Tensor:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(gradients, parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])

    def step() -> float:
        loss, entropy = _forward(model, tokens, entropy_by_autograd)
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


def torchjd_pcgrad(size: Size) -> Step:
    """TorchJD's backward with its PCGrad aggregator on the two losses."""
    from torchjd.aggregation import PCGrad
    from torchjd.autojac import backward, jac_to_grad

    model, tokens = build_model(size), batch(size)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    aggregator = PCGrad()

    def step() -> None:
        loss, entropy = _forward(model, tokens, entropy_by_autograd)
        backward([loss, WEIGHT * entropy], inputs=parameters, parallel_chunk_size=1)
        jac_to_grad(parameters, aggregator)
        optimizer.step()
        optimizer.zero_grad()

    return step


STEPS: dict[str, Build] = {
    BARE: bare,
    "memorization": wrapped("memorization", every=10),
    "memorization, nothing measured": wrapped("memorization"),
    "memorization, measured every step": wrapped("memorization", every=1),
    "compression": wrapped("compression", every=10),
    "compression, nothing measured": wrapped("compression"),
    "compression, measured every step": wrapped("compression", every=1),
    "compression, measured and read every step": wrapped("compression", every=1, read=True),
    "compression, linear kernel": wrapped("compression", kernel="linear", center=False),
    "compression, order 1/2": wrapped("compression", alpha=0.5),
    "compression, order 1": wrapped("compression", alpha=1.0),
    "compression, order 3": wrapped("compression", alpha=3.0),
    "compression, order inf": wrapped("compression", alpha=float("inf")),
    "compression, window 64": wrapped("compression", window=64),
    "compression, parameter alignment every 50 steps": wrapped("compression", parameter_every=50),
    "compression, parameter alignment every step": wrapped("compression", parameter_every=1),
    "by hand: autograd, .item()": by_hand(entropy_by_autograd),
    "by hand: eigenvalues": by_hand(entropy_by_eigenvalues),
    "by hand: two retained backward passes": two_backwards,
    "TorchJD, PCGrad": torchjd_pcgrad,
}
"""Order 2 and nothing measured, unless said otherwise. All take the same model and batch."""

SELDOM: dict[str, tuple[str, str, int]] = {
    "memorization": ("memorization, nothing measured", "memorization, measured every step", 10),
    "compression": ("compression, nothing measured", "compression, measured every step", 10),
    "compression, parameter alignment every 50 steps": (
        "compression, nothing measured", "compression, parameter alignment every step", 50,
    ),
}  # fmt: skip
"""Rows that do something on one step in so many, which a median does not see: they are taken from the rows that never
and always do it."""

WINDOWS: dict[str, Build] = {
    BARE: bare,
    "memorization, window 8": wrapped("memorization", window=8),
    "compression, window 8": wrapped("compression", window=8),
    "compression, window 64": wrapped("compression", window=64),
    "compression, whole sequence": wrapped("compression", window=None),
    "by hand: autograd, whole sequence": by_hand(lambda h: entropy_by_autograd(h, None)),
    "by hand: eigenvalues, whole sequence": by_hand(lambda h: entropy_by_eigenvalues(h, None)),
}
"""A sequence of 1,024 tokens of width 768."""
