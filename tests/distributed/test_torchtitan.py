"""torchtitan's own Llama, parallel plan, loss and optimizer container, on CPU processes."""

from __future__ import annotations

import tempfile
import warnings
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import Shard

from gapt_optim import EntropyConfig, GAPTConfig, GAPTOptimizer, RepresentationHook
from tests.distributed import table
from tests.distributed.loop import Loop
from tests.distributed.ranks import Ranks
from tests.distributed.runs import RESTLESS, Seen, full
from tests.distributed.test_training_over_ranks import assert_equal_metrics
from tests.training import distance

pytest.importorskip("triton", reason="torchtitan imports triton, which is not installed")
pytest.importorskip("torchtitan", reason="torchtitan is not installed")
pytest.importorskip("torchtitan.models.llama3", reason="this torchtitan has no Llama 3, or lacks a package")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

WIDTH, HEADS, WORDS, BATCH, LENGTH, STEPS = 16, 4, 32, 4, 16, 20


def on_cpu(backend: str) -> None:
    """torchtitan looks for its device once, and takes CUDA where there is none."""
    warnings.simplefilter("ignore")
    from torchtitan.distributed import parallel_dims, utils
    from torchtitan.models import llama3
    from torchtitan.models.common.attention import ScaledDotProductAttention

    parallel_dims.device_type = "cpu"
    utils.set_spmd_backend(backend)
    llama3.get_attention_config = lambda _: ScaledDotProductAttention.Config()  # flex attention needs a compiler


def llama(sharded: bool) -> nn.Module:
    from torchtitan.models import llama3
    from torchtitan.models.llama3.sharding import set_llama3_sharding_config

    rope = llama3.ComplexRoPE.Config(dim=WIDTH // HEADS, max_seq_len=LENGTH, theta=500000, scaling="llama")
    layers = llama3._build_llama3_layers(
        n_layers=3, dim=WIDTH, n_heads=HEADS, hidden_dim=2 * WIDTH, rope=rope, attn_backend="sdpa"
    )
    config = llama3.Llama3Model.Config(
        dim=WIDTH,
        vocab_size=WORDS,
        tok_embeddings=llama3.Embedding.Config(num_embeddings=WORDS, embedding_dim=WIDTH, param_init=None),
        norm=llama3.RMSNorm.Config(normalized_shape=WIDTH, param_init=None),
        lm_head=llama3.Linear.Config(in_features=WIDTH, out_features=WORDS, param_init=None),
        layers=layers,
    )
    if sharded:
        set_llama3_sharding_config(config, enable_sp=True)
    model: nn.Module = config.build()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.ones_like(p) if "norm" in name else torch.randn(p.shape, generator=generator) / WIDTH**0.5)
    return model


def rows(step: int, part: int, parts: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(WORDS, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    ids = ids[part * BATCH // parts : (part + 1) * BATCH // parts]
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


_DIMS: dict[str, Any] = {}
"""Once a process: fully_shard takes parameters of the very mesh that it was given, and torch keeps the first."""


class Titan(Loop):
    """One rank's part of torchtitan's loop, or all of it on one process where ``backend`` is empty."""

    def __init__(self, backend: str, *, declared: bool = True, told: bool = True) -> None:
        from torchtitan.components.loss import CrossEntropyLoss
        from torchtitan.components.optimizer.optimizer import OptimizersContainer, default_adamw
        from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
        from torchtitan.distributed import ParallelDims, utils
        from torchtitan.models.llama3 import parallelize_llama

        self.backend = backend
        on_cpu(backend or "partial_dtensor")
        self.model = llama(bool(backend))
        self.part, self.parts, placements, self.context = 0, 1, None, nullcontext
        if backend:
            world = dist.get_world_size()
            options = ParallelismConfig(
                tensor_parallel_degree=2, data_parallel_shard_degree=world // 2, spmd_backend=backend
            )
            if backend not in _DIMS:
                _DIMS[backend] = ParallelDims.from_config(options, world)
                _DIMS[backend].build_mesh()
            self.dims = _DIMS[backend]
            if backend == "spmd_types":  # with fully_shard it needs a torch after 2.13
                self.model.parallelize(self.dims)
                placements = (self.dims.get_mesh("tp"), Shard(1))
            else:
                parallelize_llama(
                    self.model,
                    parallel_dims=self.dims,
                    training=TrainingConfig(mixed_precision_param="float32"),
                    parallelism=options,
                    compile_config=CompileConfig(enable=False),
                    ac_config=None,
                    dump_folder="",
                )
            for module in self.model.modules():
                if hasattr(module, "set_force_sum_reduction_for_comms"):
                    module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
            self.part, self.parts = dist.get_rank() // 2, world // 2
            self.context = utils.get_spmd_context(parallel_dims=self.dims)
        self.loss_fn = CrossEntropyLoss.Config(global_vocab_size=WORDS).build()
        of_all = default_adamw(lr=1e-3)
        of_all.implementation = "for-loop"
        self.optimizers = OptimizersContainer(of_all, model_parts=[self.model])
        # The lines that a user writes: a hook, and the wrapper in the place of the optimizer.
        hook = RepresentationHook(self.model, "layers.*", placements=placements if declared else None)
        config = GAPTConfig(gate=RESTLESS, entropy=EntropyConfig(window=4))
        self.optimizer = GAPTOptimizer(self.optimizers.optimizers[0], hook, config)
        self.optimizers.optimizers[0] = self.optimizer
        # Under full_dtensor the loss is a DTensor, of which every rank knows the whole.
        self.share = 1 / self.parts if told and backend != "full_dtensor" else 1.0

    def inputs(self, step: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        x, y = rows(step, self.part, self.parts)
        more = {"positions": torch.arange(LENGTH).expand(len(x), LENGTH).contiguous()}
        if self.backend == "full_dtensor":
            from torchtitan.distributed.full_dtensor import parallelize_inputs

            return parallelize_inputs(self.dims, x, y, more)
        if self.backend == "spmd_types":
            from torchtitan.distributed.spmd_types import annotate_input_spmd_types

            return annotate_input_spmd_types(self.dims, x, y, more)
        return x, y, more

    def step(self, step: int) -> Seen:
        x, y, more = self.inputs(step)
        with self.context():
            loss, _ = self.loss_fn(self.model(x, **more), y, torch.tensor(BATCH * LENGTH))
            self.optimizer.backward(loss, scaled_by=self.share)
        if self.backend == "spmd_types":  # what fully_shard would add up
            for name, p in self.model.named_parameters():
                if "norm" in name:
                    dist.all_reduce(p.grad)
        gradients = {name: full(p.grad) for name, p in self.model.named_parameters()}
        self.optimizers.step()
        self.optimizers.zero_grad()
        assert self.optimizer.metrics is not None
        return Seen(self.optimizer.metrics, gradients, 0.0)

    def state(self) -> dict[str, Any]:
        return {"model": dict(self.model.state_dict()), "optimizer": self.optimizers.state_dict()}

    def load(self, folder: str) -> None:
        with torch.no_grad():
            for p in self.model.parameters():
                p.zero_()
        state = self.state()
        dcp.load(state, checkpoint_id=folder)
        self.model.load_state_dict(state["model"])
        self.optimizers.load_state_dict(state["optimizer"])


def train(backend: str) -> list[Seen]:
    loop = Titan(backend)
    return [loop.step(step) for step in range(STEPS)]


ENGINES = {
    f"torchtitan, {backend}": table.Engine(4, partial(Titan, backend), partial(Titan, ""))
    for backend in ("partial_dtensor", "full_dtensor")
}


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_is_one_process(four: Ranks, name: str) -> None:
    table.assert_right(table.measure(four, ENGINES[name]), name)


def part_of(whole: dict[str, Tensor], own: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """What a rank of two has of each tensor, which it may have all of."""
    found = {}
    for name, tensor in whole.items():
        for axis, size in enumerate(own[name].shape):
            if size < tensor.shape[axis]:
                tensor = tensor.narrow(axis, rank * size, size)
        found[name] = tensor
    return found


def test_plain_parts_of_spmd_types(ranks: Ranks) -> None:
    """Blocks return plain parts, and so are the parameters, without fully_shard."""
    expected = train("")
    assert {seen.metrics.phase for seen in expected} == {"memorization", "compression"}
    for rank, of_rank in enumerate(ranks(train, "spmd_types")):
        for here, there in zip(of_rank, expected, strict=True):
            assert distance(here.gradients, part_of(there.gradients, here.gradients, rank)) < 1e-5
            assert_equal_metrics(here, there, 1e-5)


def without_angles(seen: Seen) -> Seen:
    """The norm of a loss that is a share is that of the share."""
    return replace(seen, metrics=replace(seen.metrics, alignment=None))


def refused(backend: str, options: dict[str, bool]) -> str:
    try:
        Titan(backend, **options).step(0)
    except ValueError as error:
        return str(error)
    return ""


def test_a_share_that_was_not_told_is_refused(four: Ranks) -> None:
    for message in four(refused, "partial_dtensor", {"told": False}):
        assert "here 0.5" in message


def test_plain_parts_that_were_not_declared_are_refused(ranks: Ranks) -> None:
    for message in ranks(refused, "spmd_types", {"declared": False}):
        assert 'the same loss, and different entropies of layer "layers.0"' in message


def save_and_go_on(folder: str, until: int) -> list[Seen]:
    loop = Titan("partial_dtensor")
    for step in range(until):
        loop.step(step)
    loop.save(folder)
    return [loop.step(step) for step in range(until, STEPS)]


def load_and_go_on(folder: str, start: int) -> list[Seen]:
    loop = Titan("partial_dtensor")
    loop.load(folder)
    return [loop.step(step) for step in range(start, STEPS)]


def test_its_flat_checkpoint_of_four_ranks_goes_on_over_two(four: Ranks, ranks: Ranks) -> None:
    """FSDP2 over two and tensor parallel over two, then tensor parallel alone."""
    with tempfile.TemporaryDirectory() as folder:
        expected = four(save_and_go_on, folder, 7)[0]
        found = ranks(load_and_go_on, folder, 7)
    assert {seen.metrics.phase for seen in expected} == {"memorization", "compression"}
    for of_rank in found:
        for here, there in zip(of_rank, expected, strict=True):
            assert distance(here.gradients, there.gradients) < 1e-5
            assert_equal_metrics(without_angles(here), without_angles(there), 1e-5)
