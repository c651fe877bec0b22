"""The tap: an identity on a hidden tensor that hands its Gram matrices to the objective.

Forward, a tapped tensor h becomes (h, K, t): h itself, the Gram matrices K of its windows, and t,
two zeros. :func:`link` turns the K of all layers into entropies at once and ties them to the loss.
Backward, a tap then receives three gradients: g for h, the entropy's factor for K, times the
scale of the whole loss (of a GradScaler, of accumulation), and for t the weight that its entropy has in
the objective and 1 where it is differentiated together with the loss, so that what arrives is the loss's
gradient; 0 where it is alone, or in a backward of something else. With d = factor @ h it passes on
g + weight * d, and leaves <g,d>,
|g|² and |d|² as the gradient of the `probe`, a leaf of three numbers, so that they add up over
micro-batches and need no Python in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..entropy import Kernel, entropy_gradient, gram_matrix
from .entropies import Factors
from .grams import Grams, measures_beside
from .windows import from_windows, windows

PROBE_SIZE = 3
"""Statistics per tap: <g,d>, |g|² and |d|², for the arriving gradient g and the entropy gradient d."""


class Tap(torch.autograd.Function):
    """(h, probe, ...) -> (h, K, t, *measures). Saves h itself, no copy, and nothing where nothing flows back.

    In memorization it is the identity to any order of differentiation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        probe: Tensor,
        mask: Tensor | None,
        alpha: float,
        cosine: bool,
        center: bool,
        window: int | None,
        compress: bool,
        alignment: bool,
        combine: str,
        module: str,
    ) -> tuple[Tensor, ...]:
        ctx.kernel = Kernel(cosine, center)
        rows = windows(h, window, mask)
        gram = gram_matrix(rows, alpha, ctx.kernel)
        measures = measures_beside(rows)
        carrier = h.new_zeros(2, dtype=gram.dtype)
        ctx.window, ctx.compress, ctx.alignment = window, compress, alignment
        ctx.combine, ctx.module = combine, module
        if not torch.compiler.is_compiling():  # a gradient that does not exist is no zero: see backward
            ctx.set_materialize_grads(False)
        if compress or alignment:
            ctx.save_for_backward(h, mask)
            ctx.mark_non_differentiable(*measures)
        else:
            ctx.mark_non_differentiable(gram, *measures)
        return h.view_as(h), gram, carrier, *measures

    @staticmethod
    def backward(
        ctx: Any, g: Tensor | None, factor: Tensor | None, carried: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if factor is None or carried is None:  # a backward of something else, or nothing to send
            return (g, *[None] * 10)
        h, mask = ctx.saved_tensors
        if ctx.compress and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                f'the entropy of module "{ctx.module}" cannot be differentiated twice, and this backward pass was '
                "asked for a graph (create_graph=True) in compression, or where parameter alignment is due; run "
                "what needs second derivatives inside `with hook.measuring():`, or keep the gate in memorization with "
                "GateConfig(frozen=True)"
            )
        with torch.no_grad():
            passed, statistics = _join_gradients(ctx, h, mask, g, factor, carried)
        return (passed if ctx.compress else g, statistics, *[None] * 9)


def _join_gradients(
    ctx: Any, h: Tensor, mask: Tensor | None, g: Tensor | None, factor: Tensor, carried: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """What the tap passes on in place of the loss gradient g, and the statistics of the two gradients."""
    if g is None:  # only the entropy reaches h
        # A weight of zero leaves the parameters below without a gradient, as they are without us; to see it takes
        # a wait for the device, on such side branches alone.
        if not (ctx.compress and carried[0]):
            return None, None
        g = torch.zeros_like(h)
    d = from_windows(entropy_gradient(factor, windows(h, ctx.window, mask), ctx.kernel), h)
    wide, statistics = g.to(d.dtype), None
    weight, with_loss = carried.to(d.dtype).unbind()
    if ctx.compress:
        # Without this, one overflowing layer would put nan into every weight below it.
        d = d.nan_to_num_(0.0, 0.0, 0.0)
    if ctx.alignment or ctx.combine != "sum":
        flat_g, flat_d = wide.reshape(-1), d.reshape(-1)
        gd, gg = torch.dot(flat_g, flat_d), torch.dot(flat_g, flat_g)
        if ctx.alignment:
            # The gradient of another loss, or of another wrapper's, is not what the angle is of.
            statistics = torch.stack((gd, gg * with_loss, torch.dot(flat_d, flat_d)))
    if not ctx.compress:
        return g, statistics
    total = torch.addcmul(wide, d, weight)
    if ctx.combine == "project":
        total.addcmul_(wide, _opposing_part(gd * weight, gg) * -with_loss)
    return total.to(g.dtype), statistics


class _Link(torch.autograd.Function):
    """A value whose gradient, the scale of the loss, sends each tap its factor and its weight."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, weights: Tensor, alone: bool, groups: int, *tensors: Tensor | None) -> Tensor:
        # tensors: the factors of each group of calls, then all calls' matrices and carriers that the gradients go to
        carried = F.pad(weights.unsqueeze(-1), (0, 1), value=0.0 if alone else 1.0)
        ctx.groups, ctx.flows = groups, [carrier is not None for carrier in tensors[-len(weights) :]]
        ctx.save_for_backward(carried, *tensors[:groups])
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        carried, *factors = ctx.saved_tensors
        scaled: list[Tensor] = []
        carriers: list[Tensor] = []
        for group, rows in zip(factors, carried.split([len(group) for group in factors]), strict=True):
            scaled += (group * scale.to(group)).unbind()
            carriers += rows.to(group).unbind()
        sent = [row if flows else None for row, flows in zip(carriers, ctx.flows, strict=True)]
        return (*[None] * (4 + ctx.groups), *scaled, *sent)


def link(value: Tensor, calls: list[Grams], factors: list[Factors], weights: Tensor, *, alone: bool = False) -> Tensor:
    """``value``, to add to the loss: it carries the entropy gradients of all calls to their taps.

    Args:
        value: scalar without a graph.
        calls: what the taps left; calls that nothing flows back to are passed over.
        factors: of the calls, in groups.
        weights: (calls,) weight of each call's entropy in the objective.
        alone: this is differentiated by itself; taps add the entropy gradients up and combine them with nothing.
    """
    if all(call.carrier is None for call in calls):  # every tapped layer lies above frozen parameters alone
        return value
    if len(factors) > 1:
        order = [i for group in factors for i in group.members]
        weights = torch.stack([weights[i] for i in order])  # a list as an index would wait for the device
        calls = [calls[i] for i in order]
    tensors = [
        *(group.matrices for group in factors),
        *(call.matrices for call in calls),
        *(call.carrier for call in calls),
    ]
    linked: Tensor = _Link.apply(value, weights, alone, len(factors), *tensors)  # type: ignore[no-untyped-call]
    return linked


def _opposing_part(gd: Tensor, gg: Tensor) -> Tensor:
    """Coefficient of d's projection on g where the two oppose each other, otherwise 0."""
    return torch.where(gg > 0, gd / gg, 0).clamp(max=0)
