"""Questions to autograd's graph: which calls of a module a loss was computed by."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .grams import Grams


def nodes_behind(loss: Tensor) -> set[Any]:
    """Every node of the graph that ``loss`` was computed by."""
    found: set[Any] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting.extend(following for following, _ in node.next_functions)
    return found


def nodes_averaged_by_ddp(loss: Tensor) -> set[Any] | None:
    """Nodes behind ``loss`` whose parameters DistributedDataParallel knows to be in use.

    None where it does not look: without find_unused_parameters and after the first step with static_graph. The first
    takes for used what the model returns, the second only what gets a gradient in that step.
    """
    sinks = [node for node in nodes_behind(loss) if node.name() == "_DDPSinkBackward"]
    if not sinks:
        return None
    if not any(sink.ddp_weakref().static_graph for sink in sinks):
        return nodes_behind(loss)
    found: set[Any] = set()
    waiting: list[tuple[Any, int]] = [(loss.grad_fn, loss.output_nr)]
    while waiting:
        node, output = waiting.pop()
        if node in sinks:  # passes all that the model returns, each by itself
            needed = [i for i, needs in enumerate(node.needs_input_grad[1:]) if needs]
            edges = [edge for edge in node.next_functions if edge[0] is not None]
            waiting.append(edges[needed.index(output)])
        elif node is not None and node not in found:
            found.add(node)
            waiting.extend(node.next_functions)
    return found


def belongs_to(call: Grams, nodes: set[Any]) -> bool:
    """The call is one of ``nodes``; above frozen layers it has no graph, and counts."""
    return call.carrier is None or call.carrier.grad_fn in nodes


def unspent(calls: list[Grams]) -> list[Grams]:
    """Without the calls that a backward already went through, of another wrapper or of a loss of the user's own."""
    return [call for call in calls if not _spent(call)]


def _spent(call: Grams) -> bool:
    node: Any = call.carrier.grad_fn if call.carrier is not None else None
    try:
        return node is not None and node._raw_saved_tensors is None
    except RuntimeError:  # the buffers of the graph are freed
        return True
