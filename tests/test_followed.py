"""Models whose shapes say too little, and whose operations tell what the axes are: of videos, graphs and tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from gapt_optim import GAPTConfig, GAPTOptimizer, GateConfig, RepresentationHook, matrix_entropy

WINDOW = 8


def by_hand(rows: Tensor) -> float:
    """Mean entropy of the windows of (batch, length, features), where all rows count."""
    windows = [rows[:, i : i + WINDOW] for i in range(0, rows.shape[1], WINDOW)]
    return float(torch.cat([matrix_entropy(each) for each in windows if each.shape[1] > 2]).mean())


def encoder(width: int) -> nn.Module:
    return nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True)


class Frames(nn.Module):
    """A convolution of each frame, then attention over the frames."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.layer = nn.Conv2d(3, 24, 3), nn.AdaptiveAvgPool2d(1), encoder(24)

    def forward(self, x: Tensor) -> Tensor:
        h = self.pool(self.conv(x.flatten(0, 1))).flatten(1)
        return self.layer(h.view(len(x), -1, 24))


class Pixels(nn.Module):
    """Attention over the frames of each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.layer = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _, height, width = x.shape
        h = self.conv(x.flatten(0, 1)).view(b, t, 16, height, width).permute(0, 3, 4, 1, 2)
        h = self.layer(h.reshape(b * height * width, t, 16))
        return self.attention(h, h, h)[0]


class SpaceAndTime(nn.Module):
    """Attention within each frame, then across frames."""

    def __init__(self) -> None:
        super().__init__()
        self.space, self.time, self.layer = encoder(32), encoder(32), nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        b, t, n, d = x.shape
        h = self.space(x.flatten(0, 1)).view(b, t, n, d).transpose(1, 2)
        return self.layer(self.time(h.flatten(0, 1)).view(b, n, t, d))


class Chunks(nn.Module):
    """A recurrent layer within each chunk of a signal, between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.rnn, self.layer = nn.Conv2d(1, 24, 1), nn.LSTM(24, 24, batch_first=True), nn.GroupNorm(1, 24)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        b, f, s, k = h.shape
        y, _ = self.rnn(h.permute(0, 3, 2, 1).reshape(b * k, s, f))
        return h + self.layer(y.reshape(b, k, s, f).permute(0, 3, 2, 1))


class Shared(nn.Module):
    """One activation for tokens, and for channels that come before their positions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv, self.layer = nn.Linear(12, 40), nn.Conv1d(40, 40, 3, padding=1), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.conv(self.layer(self.linear(x)).transpose(1, 2)))


class Turned(nn.Module):
    """It is called with the sequence first, and turns its tokens itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.layer, self.inner = nn.Linear(12, 32), inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(self.layer(x).transpose(0, 1))


class HeadsInTheBatch(nn.Module):
    """Attention by products of three axes, with the sequence first."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.layer = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(len(x), -1, 32).transpose(0, 1)  # two frames as one
        length, b, _ = x.shape
        q, k, v = (t.contiguous().view(length, b * 4, 8).transpose(0, 1) for t in self.qkv(x).chunk(3, -1))
        h = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        return self.layer(h.transpose(0, 1).contiguous().view(length, b, 32))


class Pooled(nn.Module):
    """(batch, time, frequency, channels), pooled over the frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.pool = nn.Conv2d(3, 24, 3, padding=1), nn.LayerNorm(24), nn.MaxPool2d((1, 2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return self.pool(h.transpose(2, 3)).transpose(2, 3)


class Mixer(nn.Module):
    """A convolution over channels that are tokens, added to them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(40)
        self.mix = nn.Sequential(nn.Conv1d(24, 48, 1), nn.GELU(), nn.Conv1d(48, 24, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.norm(x)) + x


class Both(nn.Module):
    """A recurrent layer and a convolution that take the same tokens, one of them with time steps for channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.rnn = nn.Tanh(), nn.LSTM(12, 24, batch_first=True)
        self.conv = nn.Conv1d(24, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return self.rnn(x)[0].mean(1)[:, :16] + self.conv(x).mean(2)


class Gate(nn.Module):
    """A number for each token, by which it is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.weigh = nn.Sequential(nn.Linear(20, 7), nn.ReLU(), nn.Linear(7, 20), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.weigh(x.mean(-1)).unsqueeze(2))


class Columns(nn.Module):
    """A vector for each column of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(11, 32)), nn.Parameter(torch.randn(11, 32))

    def forward(self, x: Tensor) -> Tensor:
        return x[..., None] * self.weight + self.bias


class Sum(nn.Module):
    def forward(self, x: Tensor, index: Tensor, n: int) -> Tensor:
        return x.new_zeros(n, *x.shape[1:]).scatter_add_(0, index[:, None, None].expand_as(x), x)


class Graph(nn.Module):
    """Attention over edges, with heads of each node."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.layer = nn.Linear(12, 24, bias=False), Sum()
        self.weight = nn.Parameter(torch.randn(1, 4, 6))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = self.linear(x).view(-1, 4, 6)
        alpha = (h * self.weight).sum(-1).index_select(0, edges[0]).exp()
        return self.layer(alpha.unsqueeze(-1) * h.index_select(0, edges[0]), edges[1], len(x))


class Packed(nn.Module):
    """Tokens of which only their lengths are known, packed for a recurrent layer."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed, self.rnn = nn.Embedding(50, 32), nn.LSTM(32, 24, batch_first=batch_first)
        self.layer = nn.Linear(24, 28)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embed(ids), lengths, self.batch_first, enforce_sorted=False)
        return self.layer(pad_packed_sequence(self.rnn(packed)[0], self.batch_first)[0])


class Case(NamedTuple):
    model: nn.Module
    inputs: tuple[Tensor, ...]
    rows: Callable[[list[Tensor]], list[Tensor]]
    """From the outputs of the layer in one pass to their rows."""
    learns: bool = False
    """The first pass shows that its tokens are laid out otherwise than assumed."""
    layer: str = "layer"


def as_it_is(outputs: list[Tensor]) -> list[Tensor]:
    return outputs


def turned(outputs: list[Tensor]) -> list[Tensor]:
    return [h.transpose(0, 1) for h in outputs]


def positions(outputs: list[Tensor]) -> list[Tensor]:
    return [h.flatten(1, -2) for h in outputs]


def channels(outputs: list[Tensor]) -> list[Tensor]:
    return [h.flatten(2).mT for h in outputs]


torch.manual_seed(0)
CASES: dict[str, Case] = {
    "frames": Case(Frames(), (torch.randn(5, 7, 3, 11, 13),), as_it_is),
    "frames of pixels": Case(Pixels(), (torch.randn(5, 7, 3, 4, 6),), as_it_is),
    "space and time": Case(SpaceAndTime(), (torch.randn(5, 7, 11, 32),), positions),
    "chunks": Case(Chunks(), (torch.randn(5, 1, 11, 7),), channels),
    "a shared activation": Case(Shared(), (torch.randn(5, 24, 12),), lambda h: [h[0], h[1].mT]),
    "heads in the batch": Case(HeadsInTheBatch(), (torch.randn(5, 48, 16),), turned),
    "pooled beside channels": Case(nn.Sequential(Pooled()), (torch.randn(5, 17, 20, 3),), positions, layer="0"),
    "mixed tokens": Case(nn.Sequential(nn.Linear(12, 40), Mixer()), (torch.randn(5, 24, 12),), as_it_is, layer="1"),
    "a convolution beside a recurrent layer": Case(Both(), (torch.randn(5, 24, 12),), as_it_is),
    "a gate over tokens": Case(
        nn.Sequential(nn.Embedding(50, 32), Gate()), (torch.randint(50, (20, 20)),), as_it_is, layer="1"
    ),
    "pooled behind a norm of whole images": Case(
        nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.LayerNorm([12, 20, 20]), nn.ReLU(), nn.MaxPool2d(2))
        ),
        (torch.randn(4, 3, 20, 20),),
        channels,
        layer="0",
    ),
    "columns": Case(nn.Sequential(Columns(), nn.Linear(32, 7)), (torch.randn(19, 11),), as_it_is, layer="0"),
    "nodes": Case(Graph(), (torch.randn(40, 12), torch.randint(40, (2, 160))), lambda h: [h[0].reshape(1, 40, 24)]),
    "turned for a recurrent layer": Case(
        Turned(nn.LSTM(32, 24, batch_first=True)), (torch.randn(24, 5, 12),), turned, learns=True
    ),
    "turned for attention": Case(Turned(encoder(32)), (torch.randn(17, 5, 12),), turned, learns=True),
    "channels first": Case(
        nn.Sequential(nn.Tanh(), nn.Conv1d(12, 24, 3)), (torch.randn(5, 12, 24),), channels, learns=True, layer="0"
    ),
    "packed": Case(Packed(batch_first=True), (torch.randint(50, (5, 24)), torch.full((5,), 24)), as_it_is),
    "packed, sequence first": Case(
        Packed(batch_first=False), (torch.randint(50, (24, 5)), torch.full((5,), 24)), turned
    ),
}


@pytest.mark.filterwarnings("ignore:the first forward pass of:UserWarning")
@pytest.mark.filterwarnings('ignore:argument "lengths":UserWarning')
@pytest.mark.parametrize("name", CASES)
def test_rows_are_followed(name: str) -> None:
    case = CASES[name]
    outputs: list[Tensor] = []
    handle = case.model.get_submodule(case.layer).register_forward_hook(lambda _, args, h: outputs.append(h.detach()))
    case.model(*case.inputs)
    handle.remove()
    rows = case.rows(outputs)
    expected = sum(map(by_hand, rows)) / len(rows)
    hook = RepresentationHook(case.model, case.layer)
    for turn in range(4):
        with torch.no_grad(), hook.measuring() as measured:
            case.model(*case.inputs)
        if turn or not case.learns:
            assert measured.entropies[case.layer] == pytest.approx(expected, abs=1e-5)
    fresh = RepresentationHook(case.model, case.layer)
    shown = fresh.explain(*case.inputs).layers
    assert len(shown) == len(rows)
    again = hook.explain(*case.inputs).layers  # what the later passes of another hook are read as
    assert [each.axes for each in shown] == [each.axes for each in again]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.learns])
def test_what_a_first_pass_shows_is_told(name: str) -> None:
    case = CASES[name]
    hook = RepresentationHook(case.model, case.layer)
    with hook.measuring():
        case.model(*case.inputs)
        with pytest.warns(UserWarning, match=f"first forward pass of {case.layer} was read otherwise"):
            case.model(*case.inputs)
    hook.remove()


@pytest.mark.parametrize("training", [False, True])
def test_a_pass_that_reads_nothing_uses_up_no_look(training: bool) -> None:
    """A validation before the first step, say."""
    model = ChannelsLast()
    ids = torch.randint(0, 50, (5, 24))
    optimizer = GAPTOptimizer(
        torch.optim.SGD(model.parameters(), 0.0),
        RepresentationHook(model, "layer"),
        GAPTConfig(gate=GateConfig(frozen=True)),
    )
    for _ in range(40):
        with torch.set_grad_enabled(training):
            model.eval()(ids)
    h = model.train()(ids)
    optimizer.backward(h.square().mean())
    optimizer.step()
    assert optimizer.metrics is not None
    assert optimizer.metrics.entropy == pytest.approx(by_hand(h.detach().mT), abs=1e-5)


class ChannelsLast(nn.Module):
    """As many channels as tokens, behind a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(50, 32), nn.Linear(32, 24)
        self.conv, self.layer = nn.Conv1d(24, 24, 3, padding=1), nn.GELU()

    def forward(self, ids: Tensor) -> Tensor:
        return self.layer(self.conv(self.linear(self.embed(ids)).transpose(1, 2)))


class Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.layer = nn.Linear(32, 24), nn.Linear(32, 24), nn.Softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.q(x) @ self.k(x).transpose(1, 2)) @ x


def test_attention_weights_have_no_features() -> None:
    model, x = Scores(), torch.randn(5, 17, 32)
    hook = RepresentationHook(model, "layer")
    assert "no axis for features" in str(hook.explain(x))
    optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters(), 0.1), hook)
    with pytest.warns(UserWarning, match="no axis for features.*Until then the layer is left out"):
        optimizer.backward(model(x).square().mean())
    optimizer.step()


def test_lengths_are_told() -> None:
    model, lengths = Packed(batch_first=True), torch.tensor([24, 8, 16])
    ids = torch.randint(50, (3, 24))
    hook = RepresentationHook(model, "layer")
    with pytest.warns(UserWarning, match='argument "lengths".*all 24 do until mask= says'), hook.measuring():
        model(ids, lengths)
    hook.remove()
    masked = RepresentationHook(
        model, "layer", mask=lambda call: torch.arange(24) < call["lengths"][:, None]
    )  # as it says
    with torch.no_grad(), masked.measuring() as measured:
        h = model(ids, lengths)
    windows = torch.cat([matrix_entropy(h[i, :n].view(-1, WINDOW, 28)) for i, n in enumerate(lengths.tolist())])
    assert measured.entropies["layer"] == pytest.approx(float(windows.mean()), abs=1e-5)


class SequenceFirst(nn.Module):
    """Tokens (length, batch), with a mask of the model's own (batch, length)."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0)
        self.embed, self.head = nn.Embedding(30, 8), nn.Linear(8, 8)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, src: Tensor, src_padding_mask: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(src), src_key_padding_mask=src_padding_mask))


def test_a_mask_of_tokens_that_have_the_sequence_first() -> None:
    model = SequenceFirst()
    padding = torch.arange(14)[None] >= torch.tensor([14, 9, 5, 12, 3])[:, None]
    src = torch.randint(1, 30, (5, 14)).masked_fill(padding, 0)
    hook = RepresentationHook(model, ["embed", "head"])
    with torch.no_grad(), hook.measuring() as measured:
        head = model(src.T, padding)
    for name, h in (("embed", model.embed(src).detach()), ("head", head.transpose(0, 1))):
        live = ~padding
        windows = [
            matrix_entropy(h[b, i : i + WINDOW], mask=live[b, i : i + WINDOW])
            for b in range(5)
            for i in (0, WINDOW)
            if live[b, i : i + WINDOW].sum() > 2
        ]
        assert measured.entropies[name] == pytest.approx(float(torch.stack(windows).mean()), abs=1e-5)


def test_a_module_that_is_given_a_sparse_tensor() -> None:
    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 16))

        def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
            return torch.sparse.mm(adjacency, torch.mm(x, self.weight))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = Convolution(), nn.Linear(16, 4)

        def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
            return self.head(self.layer(x, adjacency).relu())

    model = Network()
    x, adjacency = torch.rand(32, 8), torch.eye(32).to_sparse()
    for phase in ("memorization", "compression"):
        config = GAPTConfig(gate=GateConfig(initial_phase=phase, frozen=True))  # type: ignore[arg-type]
        optimizer = GAPTOptimizer(torch.optim.Adam(model.parameters()), RepresentationHook(model, "layer"), config)
        expected = by_hand(model.layer(x, adjacency).detach()[None])  # type: ignore[operator]
        optimizer.backward(model(x.to_sparse(), adjacency).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.metrics is not None
        assert optimizer.metrics.entropy == pytest.approx(expected, abs=1e-5)
        optimizer.hook.remove()


@pytest.mark.parametrize(("spread", "alike"), [(1e-2, False), (1e-4, True)])
def test_rows_that_float32_cannot_tell_apart(spread: float, alike: bool) -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters(), 0.0), RepresentationHook(model, "1"))
    optimizer.backward(model(torch.ones(64, 32) + spread * torch.randn(64, 32)).square().mean())
    if alike:
        with pytest.warns(UserWarning, match='rows of layer "1" differ by less than 0.2% of their length'):
            optimizer.step()
    else:
        optimizer.step()
    assert optimizer.metrics is not None
    assert (optimizer.metrics.entropy == 0) == alike


def test_a_table_that_is_read_by_its_rows() -> None:
    """Rows of zeros stand before its tokens, so that the mask does not fit, which is told."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.layer = nn.Parameter(torch.randn(50, 32)), nn.Linear(32, 32)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            h = torch.index_select(self.weight, 0, input_ids.flatten()).view(*input_ids.shape, -1)
            return self.layer(torch.cat((h.new_zeros(len(h), 3, 32), h), 1))

    model, ids = Table(), torch.randint(50, (4, 13))
    mask = torch.arange(13) < torch.tensor([13, 9, 5, 11])[:, None]
    with pytest.warns(UserWarning, match=r"attention_mask of shape \(4, 13\) does not fit"):
        RepresentationHook(model, "layer").explain(ids, mask)


def test_what_cannot_be_read_in_one_batch_is_read_in_the_next() -> None:
    class Lost(nn.Module):
        """Its output comes of no operation of torch, and has channels and positions in some order."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return (1 + self.weight.mean()) * torch.from_numpy(x.detach().numpy())

    model = nn.Sequential(nn.Conv2d(3, 16, 1), Lost())
    hook = RepresentationHook(model, "1")
    for width, refused in ((16, True), (20, False)):
        with torch.no_grad(), hook.measuring() as measured:
            if refused:
                with pytest.raises(ValueError, match="can be read as"):
                    model(torch.randn(4, 3, 12, width))
            else:
                model(torch.randn(4, 3, 12, width))
                assert measured.entropies["1"] > 0


@pytest.mark.parametrize("phase", ["memorization", "compression"])
def test_two_objectives_of_one_pass_before_any_backward(phase: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    config = GAPTConfig(gate=GateConfig(initial_phase=phase, frozen=True))
    optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters(), 0.1), RepresentationHook(model, "1"), config)
    out = model(torch.randn(64, 8))
    first, second = out.square().mean(), out.abs().mean()
    with pytest.warns(UserWarning, match="several losses"):
        (optimizer.objective(first) + optimizer.objective(second)).backward()
    optimizer.step()
    assert optimizer.metrics is not None
    assert optimizer.metrics.loss == pytest.approx(float((first + second).detach()), rel=1e-6)
    assert optimizer.metrics.entropy is not None


def test_a_layer_that_cannot_be_read_hides_nothing_else() -> None:
    model = nn.Sequential(Scores(), nn.Linear(32, 8))
    optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters(), 0.1), RepresentationHook(model, ["0.layer", "1"]))
    with pytest.warns(UserWarning, match="no axis for features"):
        loss = model(torch.randn(5, 17, 32)).square().mean()
    with pytest.raises(RuntimeError, match="loss does not require grad"):
        optimizer.backward(loss.detach())


def test_double_precision_tells_rows_apart() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 1)).double()
    optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters(), 0.0), RepresentationHook(model, "1"))
    x = torch.ones(64, 32) + 1e-4 * torch.randn(64, 32)
    optimizer.backward(model(x.double()).square().mean())
    optimizer.step()
    assert optimizer.metrics is not None
    assert optimizer.metrics.entropy is not None
    assert optimizer.metrics.entropy > 1
