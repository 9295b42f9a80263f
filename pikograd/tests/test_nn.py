"""Layers and losses against torch with the same weights, and the manners of Module."""

import numpy as np
import pytest
import torch
import torch.nn.functional as TF

import nn
import tensor as pg
from engine import ShapeError
from tensor import Tensor

RNG = np.random.default_rng(0)
X2, IMAGE = RNG.standard_normal((6, 8)), RNG.standard_normal((3, 4, 9, 8))
SEQUENCE = RNG.standard_normal((3, 5, 8))


def assert_same(ours, theirs, tolerance=1e-12):
    np.testing.assert_allclose(
        ours.detach().numpy(), theirs.detach().numpy(), rtol=tolerance, atol=tolerance
    )


def pair(ours, theirs):
    """Both in float64 with torch's weights."""
    theirs = theirs.double()
    ours.to(np.float64).load_state_dict(theirs.state_dict())
    return ours, theirs


LAYERS = {
    "Linear": (nn.Linear(8, 3), torch.nn.Linear(8, 3), X2),
    "Linear no bias": (nn.Linear(8, 3, bias=False), torch.nn.Linear(8, 3, bias=False), SEQUENCE),
    "Conv1d": (nn.Conv1d(5, 4, 3, stride=2, padding=1), torch.nn.Conv1d(5, 4, 3, 2, 1), SEQUENCE),
    "Conv2d": (nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, groups=2),
               torch.nn.Conv2d(4, 6, (3, 2), 2, 1, groups=2), IMAGE),
    "MaxPool2d": (nn.MaxPool2d(3, 2), torch.nn.MaxPool2d(3, 2), IMAGE),
    "MaxPool1d": (nn.MaxPool1d(2), torch.nn.MaxPool1d(2), SEQUENCE),
    "AvgPool2d": (nn.AvgPool2d(2), torch.nn.AvgPool2d(2), IMAGE),
    "AvgPool1d": (nn.AvgPool1d(3, 1), torch.nn.AvgPool1d(3, 1), SEQUENCE),
    "BatchNorm1d": (nn.BatchNorm1d(8, eps=1e-2), torch.nn.BatchNorm1d(8, eps=1e-2), X2),
    "BatchNorm2d": (nn.BatchNorm2d(4, momentum=0.3), torch.nn.BatchNorm2d(4, momentum=0.3), IMAGE),
    "LayerNorm": (nn.LayerNorm((9, 8), eps=1e-2), torch.nn.LayerNorm((9, 8), eps=1e-2), IMAGE),
    "RMSNorm": (nn.RMSNorm(8, eps=1e-2), torch.nn.RMSNorm(8, eps=1e-2), SEQUENCE),
    "GroupNorm": (nn.GroupNorm(2, 4, eps=1e-2), torch.nn.GroupNorm(2, 4, eps=1e-2), IMAGE),
    "MaxPool2d padding": (nn.MaxPool2d(3, 2, 1), torch.nn.MaxPool2d(3, 2, 1), IMAGE),
    "MaxPool1d padding": (nn.MaxPool1d(2, 1, 1), torch.nn.MaxPool1d(2, 1, 1), SEQUENCE),
    "AvgPool2d padding": (nn.AvgPool2d(3, 2, 1), torch.nn.AvgPool2d(3, 2, 1), IMAGE),
    "AdaptiveAvgPool2d": (nn.AdaptiveAvgPool2d((2, 3)), torch.nn.AdaptiveAvgPool2d((2, 3)), IMAGE),
    "AdaptiveAvgPool2d larger": (nn.AdaptiveAvgPool2d((12, None)),
                                 torch.nn.AdaptiveAvgPool2d((12, None)), IMAGE),
    "ConvTranspose2d": (nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), 1, 1, groups=2),
                        torch.nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), 1, 1, groups=2), IMAGE),
    "ConvTranspose2d plain": (nn.ConvTranspose2d(4, 3, 2, bias=False),
                              torch.nn.ConvTranspose2d(4, 3, 2, bias=False), IMAGE),
    "Identity": (nn.Identity(), torch.nn.Identity(), X2),
    "Sigmoid": (nn.Sigmoid(), torch.nn.Sigmoid(), X2),
    "SiLU": (nn.SiLU(), torch.nn.SiLU(), X2),
    "LeakyReLU": (nn.LeakyReLU(0.2), torch.nn.LeakyReLU(0.2), X2),
    "Softplus": (nn.Softplus(), torch.nn.Softplus(), X2),
    "Softmax": (nn.Softmax(dim=0), torch.nn.Softmax(dim=0), X2),
    "LogSoftmax": (nn.LogSoftmax(1), torch.nn.LogSoftmax(1), X2),
    "GELU": (nn.GELU(), torch.nn.GELU(), 3 * X2),
    "GELU tanh": (nn.GELU(approximate="tanh"), torch.nn.GELU(approximate="tanh"), 3 * X2),
    "Embedding": (nn.Embedding(7, 3), torch.nn.Embedding(7, 3), np.array([[0, 6, 6], [2, 0, 1]])),
    "Sequential": (nn.Sequential(nn.Flatten(), nn.Linear(288, 5), nn.Tanh(), nn.Linear(5, 2)),
                   torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(288, 5), torch.nn.Tanh(),
                                       torch.nn.Linear(5, 2)), IMAGE),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("training", [True, False])
def test_layer_equals_torch(name, training):
    """Value, gradients of input and parameters, buffers; twice, so that running averages move."""
    ours, theirs, data = LAYERS[name]
    ours, theirs = pair(ours.train(training), theirs.train(training))
    floats = data.dtype.kind == "f"
    x, t = Tensor(data, requires_grad=floats), torch.tensor(data, requires_grad=floats)
    for _ in range(2):
        ours.zero_grad()
        theirs.zero_grad()
        y, s = ours(x), theirs(t)
        assert_same(y, s)
        (y * y * y).sum().backward()
        (s * s * s).sum().backward()
    if floats:
        assert_same(x.grad, t.grad, 1e-10)
    for (n, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert n in dict(theirs.named_parameters())
        assert_same(p.grad, q.grad, 1e-10)
    for name, value in ours.state_dict().items():
        assert_same(value, theirs.state_dict()[name])


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells_equal_torch(name):
    ours, theirs = pair(getattr(nn, name)(8, 4), getattr(torch.nn, name)(8, 4))
    xs, state = SEQUENCE.transpose(1, 0, 2), None
    outputs, _ = nn.unroll(ours, Tensor(xs))
    for i, x in enumerate(xs):
        state = theirs(torch.tensor(x), state)
        assert_same(outputs[i], state[0] if isinstance(state, tuple) else state)
    (outputs * outputs).sum().backward()
    state = None
    total = 0
    for x in xs:
        state = theirs(torch.tensor(x), state)
        h = state[0] if isinstance(state, tuple) else state
        total = total + (h * h).sum()
    total.backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_same(p.grad, q.grad)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_attention_equals_torch(causal, cross):
    ours, theirs = pair(
        nn.MultiHeadAttention(8, 2), torch.nn.MultiheadAttention(8, 2, batch_first=True)
    )
    theirs.in_proj_bias.data.normal_(generator=torch.Generator().manual_seed(0))
    ours.load_state_dict(theirs.state_dict())
    memory = RNG.standard_normal((3, 5, 8)) if cross else SEQUENCE
    x, t, m = Tensor(SEQUENCE), torch.tensor(SEQUENCE), torch.tensor(memory)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1) if causal else None
    expected = theirs(t, m, m, attn_mask=mask, need_weights=False)[0]
    assert_same(
        ours(x, Tensor(memory), is_causal=causal) if cross else ours(x, is_causal=causal), expected
    )


def test_attention_mask_and_causality():
    """Torch's scaled_dot_product_attention, and: the future cannot change the past."""
    q, k, v = (RNG.standard_normal((2, 3, 4)) for _ in range(3))
    mask = np.array([[True, False, False], [True, True, False], [False, True, True]])
    ours = nn.scaled_dot_product_attention(*map(Tensor, (q, k, v)), attn_mask=mask)
    assert_same(
        ours, TF.scaled_dot_product_attention(*map(torch.tensor, (q, k, v)), torch.tensor(mask))
    )
    both = nn.scaled_dot_product_attention(
        *map(Tensor, (q, k, v)), attn_mask=mask[0] | True, is_causal=True
    )
    changed = [a.copy() for a in (k, v)]
    for a in changed:
        a[:, 2] += 5.0
    after = nn.scaled_dot_product_attention(Tensor(q), *map(Tensor, changed), is_causal=True)
    np.testing.assert_array_equal(both.numpy()[:, :2], after.numpy()[:, :2])


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_lstm_equals_torch(batch_first, num_layers):
    ours, theirs = pair(
        nn.LSTM(8, 4, num_layers, batch_first), torch.nn.LSTM(8, 4, num_layers,
                                                              batch_first=batch_first)
    )  # fmt: skip
    start = RNG.standard_normal((2, num_layers, 3 if batch_first else 5, 4))
    for state in (None, start):
        y, (h, c) = ours(Tensor(SEQUENCE), state if state is None else tuple(map(Tensor, state)))
        s, (u, v) = theirs(
            torch.tensor(SEQUENCE), state if state is None else tuple(map(torch.tensor, state))
        )
        for a, b in ((y, s), (h, u), (c, v)):
            assert_same(a, b)
        ours.zero_grad()
        theirs.zero_grad()
        (y * y * y).sum().backward()
        (s * s * s).sum().backward()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert_same(p.grad, q.grad)


MASKS = {
    "attn": {"attn_mask": np.triu(np.ones((5, 5), bool), 1)},
    "numbers": {"attn_mask": RNG.standard_normal((5, 5))},
    "per head": {"attn_mask": np.arange(6 * 25).reshape(6, 5, 5) % 7 == 3},
    "padding": {"key_padding_mask": np.array([[False] * 4 + [True]] * 2 + [[True] + [False] * 4])},
    "both": {"attn_mask": np.triu(np.ones((5, 5), bool), 1),
             "key_padding_mask": np.array([[False] * 4 + [True]] * 3)},
    "both numbers": {"attn_mask": RNG.standard_normal((5, 5)),
                     "key_padding_mask": np.array([[False] * 4 + [True]] * 3)},
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
def test_masks_of_the_attention_layer_mean_what_torchs_mean(name):
    ours, theirs = pair(
        nn.MultiHeadAttention(8, 2), torch.nn.MultiheadAttention(8, 2, batch_first=True)
    )
    t = torch.tensor(SEQUENCE)
    masks = {key: torch.tensor(mask) for key, mask in MASKS[name].items()}
    assert_same(ours(Tensor(SEQUENCE), **MASKS[name]), theirs(t, t, t, **masks)[0])


@pytest.mark.parametrize("kind", ["booleans", "numbers"])
def test_a_row_that_may_look_nowhere_gives_zero_and_no_nan(kind):
    mask = np.array([[False, False], [True, False]])
    mask = mask if kind == "booleans" else np.where(mask, 0.5, -np.inf)
    a = RNG.standard_normal((1, 2, 4))
    x, t = Tensor(a, requires_grad=True), torch.tensor(a, requires_grad=True)
    y = nn.scaled_dot_product_attention(x, x, x, mask)
    s = TF.scaled_dot_product_attention(t, t, t, torch.tensor(mask))
    assert_same(y, s)
    assert y.tolist()[0][0] == [0.0] * 4
    y.square().sum().backward()
    s.square().sum().backward()
    assert_same(x.grad, t.grad)


LOSSES = {
    "MSELoss": (X2, RNG.standard_normal(X2.shape)),
    "L1Loss": (X2, RNG.standard_normal(X2.shape)),
    "BCEWithLogitsLoss": (X2, RNG.random(X2.shape)),
    "CrossEntropyLoss": (X2, np.arange(6) % 8),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_layers_equal_torch(name):
    x, y = LOSSES[name]
    for options in ({}, {"reduction": "sum"}):
        ours, theirs = getattr(nn, name)(**options), getattr(torch.nn, name)(**options)
        assert_same(ours(Tensor(x), Tensor(y)), theirs(torch.tensor(x), torch.tensor(y)))
    assert isinstance(nn.CrossEntropyLoss(label_smoothing=0.1), nn.Module)
    with pytest.raises(TypeError, match="its options are"):
        nn.MSELoss(reductoin="sum")


def test_module_dict_slices_and_a_forgotten_super():
    net = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.ReLU()})
    net["c"] = nn.Linear(3, 1)
    assert list(net) == ["a", "b", "c"] and len(net) == 3 and "c" in net
    assert net.state_dict().keys() == {"a.weight", "a.bias", "c.weight", "c.bias"}
    assert net["b"](net["a"](pg.ones(1, 2))).shape == (1, 3)
    assert [type(m) for m in net.values()] == [type(m) for _, m in net.items()]
    part = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))[:2]
    assert (
        isinstance(part, nn.Sequential) and len(part) == 2 and part(pg.ones(1, 2)).shape == (1, 3)
    )
    assert len(nn.ModuleList([nn.ReLU(), nn.ReLU()])[1:]) == 1

    class Forgetful(nn.Module):
        def __init__(self):
            self.layer = nn.Linear(1, 1)

    with pytest.raises(AttributeError, match=r"Forgetful.__init__ must call super\(\).__init__"):
        Forgetful()
    with pytest.raises(AttributeError, match="Linear has no attribute 'wieght'"):
        nn.Linear(1, 1).wieght  # noqa: B018


LOGITS = RNG.standard_normal((4, 5, 3))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ignore", [-100, 1])
def test_cross_entropy_equals_torch(reduction, smoothing, ignore):
    target = RNG.integers(0, 5, (4, 3))
    target[0, 0] = 1
    x, t = Tensor(LOGITS, requires_grad=True), torch.tensor(LOGITS, requires_grad=True)
    options = {"ignore_index": ignore, "label_smoothing": smoothing, "reduction": reduction}
    ours, theirs = nn.cross_entropy(x, target, **options), TF.cross_entropy(
        t, torch.tensor(target), **options)  # fmt: skip
    assert_same(ours, theirs)
    (ours * ours).sum().backward()
    (theirs * theirs).sum().backward()
    assert_same(x.grad, t.grad)


@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "binary_cross_entropy_with_logits"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses_equal_torch(name, reduction):
    y = RNG.random(LOGITS.shape)
    ours = getattr(nn, name)(Tensor(30 * LOGITS), Tensor(y), reduction=reduction)
    assert_same(
        ours, getattr(TF, name)(torch.tensor(30 * LOGITS), torch.tensor(y), reduction=reduction)
    )


def test_cross_entropy_of_large_logits_keeps_its_digits():
    """ln(1 + e⁻¹) = 0.313262: float32 numbers near 10,000 are 0.001 apart."""
    loss = nn.cross_entropy(Tensor([[10_000.0, 9_999.0]]), [0])
    assert loss.item() == pytest.approx(np.log1p(np.exp(-1)), rel=1e-6)


def test_cross_entropy_by_hand_and_its_refusals():
    assert nn.cross_entropy(pg.zeros(2, 10), [3, 4]).item() == pytest.approx(np.log(10), rel=1e-6)
    with pytest.raises(IndexError, match="target 10 of 10 classes"):
        nn.cross_entropy(pg.zeros(2, 10), [3, 10])
    with pytest.raises(IndexError, match="target -1"):
        nn.cross_entropy(pg.zeros(2, 10), [3, -1])
    with pytest.raises(ShapeError, match=r"\(2, 10\) and \(3,\)"):
        nn.cross_entropy(pg.zeros(2, 10), [3, 4, 5])
    with pytest.raises(ShapeError, match="mse_loss"):
        nn.mse_loss(pg.zeros(2, 1), pg.zeros(2))
    with pytest.raises(ValueError, match="reduction 'average'"):
        nn.mse_loss(pg.zeros(2), pg.zeros(2), reduction="average")


# ── Module ────────────────────────────────────────────────────────────────────────────────────────


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.BatchNorm1d(4)]).append(nn.Dropout(0.5))
        self.scale = nn.Parameter(np.ones(1, np.float32))
        self.again = self.first

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x * self.scale


def test_names_order_and_sharing_as_torch():
    class Torch(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Linear(3, 4)
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4),
                                               torch.nn.Dropout(0.5)])  # fmt: skip
            self.scale = torch.nn.Parameter(torch.ones(1))
            self.again = self.first

    ours, theirs = Net(), Torch()
    names = [n for n, _ in ours.named_parameters()]
    assert names == [n for n, _ in theirs.named_parameters()]
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    assert {n for n, _ in ours.named_buffers()} == {n for n, _ in theirs.named_buffers()}
    assert ours.state_dict().keys() <= theirs.state_dict().keys()


def test_state_dict_round_trip_and_refusals():
    a, b = Net(), Net()
    b.load_state_dict({n: t.numpy().copy() for n, t in a.state_dict().items()})
    for n, t in a.state_dict().items():
        np.testing.assert_array_equal(t.numpy(), b.state_dict()[n].numpy())
    state = a.state_dict()
    before = b.first.weight.detach().numpy().copy()
    with pytest.raises(KeyError, match=r"missing \['scale'\], unexpected \['extra'\]"):
        b.load_state_dict(
            {n: t for n, t in state.items() if n != "scale"} | {"extra": state["scale"]}
        )
    wrong = state | {"first.weight": np.full((4, 3), 9.0), "scale": np.ones(2)}
    with pytest.raises(ShapeError, match=r"scale has shape \(2,\), the net has \(1,\)"):
        b.load_state_dict(wrong)
    np.testing.assert_array_equal(b.first.weight.detach().numpy(), before)


def test_train_eval_zero_grad_and_repr():
    net = Net()
    assert not any(m.training for m in net.eval().modules())
    assert all(m.training for m in net.train().modules())
    net(pg.ones(4, 3)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    net.zero_grad()
    assert all(p.grad is None for p in net.parameters())
    assert "(first): Linear(3, 4)" in repr(net) and "Dropout(p=0.5)" in repr(net)
    del net.scale
    assert "scale" not in net.state_dict()


def test_what_an_attribute_held_before_counts_no_longer():
    layer = nn.Linear(2, 3)
    layer.bias = None
    assert layer.state_dict().keys() == {"weight"} and layer(pg.ones(1, 2)).shape == (1, 3)
    layer.weight = nn.Linear(2, 2)
    assert layer.state_dict().keys() == {"weight.weight", "weight.bias"}


def test_empty_batches():
    for layer, shape in ((nn.GroupNorm(2, 4), (0, 4, 5)), (nn.MultiHeadAttention(4, 2), (0, 3, 4)),
                         (nn.MaxPool2d(1), (0, 1, 2, 2)), (nn.LayerNorm(4), (0, 4))):  # fmt: skip
        assert layer(pg.zeros(shape)).shape == shape


def test_hooks_see_change_and_go():
    layer, seen = nn.Linear(2, 2), []
    before = layer.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    after = layer.register_forward_hook(
        lambda m, args, out: seen.append(args[0].tolist()) or out * 0
    )
    assert layer(pg.ones(1, 2)).tolist() == [[0.0, 0.0]] and seen == [[[2.0, 2.0]]]
    before.remove()
    before.remove()  # a second time does nothing
    after.remove()
    x = pg.ones(1, 2)
    assert layer(x).tolist() != [[0.0, 0.0]] and len(seen) == 1
    layer.register_forward_pre_hook(lambda m, args: args[0] * 0)
    np.testing.assert_array_equal(layer(x).detach().numpy()[0], layer.bias.detach().numpy())


def test_first_weights_are_torchs_distribution():
    """Uniform in ±1/√fan_in: the variance is the bound² / 3."""
    pg.manual_seed(0)
    for layer, fan_in in ((nn.Linear(100, 400), 100), (nn.Conv2d(8, 64, 3), 72),
                          (nn.Conv2d(8, 64, 3, groups=2), 36)):  # fmt: skip
        w = layer.weight.detach().numpy()
        assert np.abs(w).max() <= fan_in**-0.5
        assert w.var() == pytest.approx(1 / fan_in / 3, rel=0.1)


def test_layers_refuse_what_does_not_fit():
    with pytest.raises(IndexError, match="index 7 outside the table of 7"):
        nn.Embedding(7, 3)(Tensor([7]))
    with pytest.raises(IndexError, match="Embedding: index -1 outside"):
        nn.Embedding(7, 3)(Tensor([-1, 2]))
    with pytest.raises(ShapeError, match="one value per channel"):
        nn.BatchNorm(3)(pg.ones(1, 3))
    for make in (lambda: nn.GroupNorm(3, 4), lambda: nn.MultiHeadAttention(8, 3)):
        with pytest.raises(ValueError, match="divide"):
            make()
    with pytest.raises(NotImplementedError, match="ModuleList"):
        nn.ModuleList([nn.Linear(1, 1)])(pg.ones(1))
    with pytest.raises(ShapeError, match="layer_norm"):
        nn.LayerNorm(3)(pg.ones(2, 4))
    with pytest.raises(ValueError, match="p must lie"):
        nn.Dropout(1.0)(pg.ones(2))


def torch_net(kind):
    t = torch.nn
    if kind == "mlp":
        return t.Sequential(t.Linear(8, 16), t.ReLU(), t.BatchNorm1d(16), t.Linear(16, 3))
    return t.Sequential(t.Conv2d(4, 6, 3, padding=1), t.BatchNorm2d(6), t.ReLU(), t.MaxPool2d(2),
                        t.Flatten(), t.Linear(6 * 4 * 4, 3))  # fmt: skip


def our_net(kind):
    if kind == "mlp":
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 3))
    return nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
                         nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 4 * 4, 3))  # fmt: skip


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_a_net_trained_by_torch_loads_and_gives_the_same_logits(kind):
    torch.manual_seed(0)
    theirs = torch_net(kind)
    x = torch.tensor(X2 if kind == "mlp" else np.concatenate([IMAGE, IMAGE])).float()
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        TF.cross_entropy(theirs(x), y).backward()
        optimizer.step()
    ours = our_net(kind)
    ours.load_state_dict(theirs.state_dict())
    for mode in (False, True):
        ours.train(mode)
        theirs.train(mode)
        assert_same(ours(Tensor(x.numpy())), theirs(x), 1e-5)  # float32
    pair(ours, theirs)
    assert_same(ours.eval()(Tensor(x.double().numpy())), theirs.eval()(x.double()))


def test_learns_one_batch():
    import optim

    pg.manual_seed(1)
    net, x, y = our_net("cnn"), Tensor(IMAGE, dtype=np.float32), [0, 2, 1]
    optimizer = optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.cross_entropy(net(x), y).backward()
        optimizer.step()
    assert nn.cross_entropy(net(x), y).item() < 0.02
