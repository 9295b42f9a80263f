"""The whole network against torch.nn, by weights that go there and back."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import cells
import torch_names
from model import SequenceConfig, SequenceModel, locked_dropout
from options import UserError

KINDS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
LENGTHS = torch.tensor([3, 7, 1, 6, 6])
VARIANTS = [
    *[{"cell": kind, "n_layer": n} for kind in KINDS for n in (1, 3)],
    *[{"cell": kind, "n_layer": 2, "bidirectional": True} for kind in KINDS],
    {"d_proj": 3, "n_layer": 2},
    {"d_proj": 3, "n_layer": 2, "bidirectional": True},
]


class Theirs(nn.Module):
    """The same network out of torch.nn, as many scripts have it."""

    def __init__(self, config: SequenceConfig):
        super().__init__()
        self.encoder = nn.Embedding(config.vocab_size, config.d_embed)
        more = {"proj_size": config.d_proj} if config.d_proj else {}
        self.core = KINDS[config.cell](
            config.d_embed, config.d_model, config.n_layer, batch_first=True,
            bidirectional=config.bidirectional, **more,
        )  # fmt: skip
        self.decoder = nn.Linear(config.d_out, config.n_answer)
        with torch.no_grad():  # so that float32, and the sum of two biases, has every digit
            for parameter in self.parameters():
                parameter.mul_(4096).round_().div_(4096)

    def forward(self, tokens, state=None, lengths=None):
        x = self.encoder(tokens)
        if lengths is not None:
            x = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, state = self.core(x, state)
        if lengths is not None:
            y, _ = pad_packed_sequence(y, batch_first=True, total_length=tokens.shape[1])
        return self.decoder(y), (state if isinstance(state, tuple) else (state,))


def config_of(**variant) -> SequenceConfig:
    """Sizes of which no two are alike by accident; answers differ from tokens in number."""
    return SequenceConfig(d_model=7, d_embed=5, vocab_size=11, n_answer=9, **variant)


def pair(**variant) -> tuple[SequenceModel, Theirs]:
    """Our network with the weights of theirs, both in float64."""
    config = config_of(**variant)
    theirs = Theirs(config).double()
    ours = torch_names.build(theirs.state_dict(), "here").double()
    ours.config = config
    return ours, theirs


def random_state(model: SequenceModel, n_row: int):
    return tuple(torch.randn_like(part).requires_grad_() for part in model.start(n_row))


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "packed"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_outputs_states_and_gradients_are_torchs(variant, lengths):
    """Forward to 1e-12, and every gradient: of weights, both biases, and the first state."""
    ours, theirs = pair(**variant)
    tokens = torch.randint(11, (5, 7))
    state = random_state(ours, 5)
    their_state = state if variant.get("cell", "lstm") == "lstm" else state[0]
    y, end = ours(tokens, state, lengths)
    expected, their_end = theirs(tokens, their_state, lengths)
    assert (y - expected).abs().max() < 1e-12
    for one, other in zip(end, their_end, strict=True):
        assert (one - other).abs().max() < 1e-12
    weight = torch.randn_like(y)
    grads = [
        torch.autograd.grad((out * weight).sum() + sum(s.square().sum() for s in last), state,
                            retain_graph=True)
        for out, last in ((y, end), (expected, their_end))
    ]  # fmt: skip
    for one, other in zip(*grads, strict=True):
        assert (one - other).abs().max() < 1e-12
    ((y * weight).sum() + sum(s.square().sum() for s in end)).backward()
    ((expected * weight).sum() + sum(s.square().sum() for s in their_end)).backward()
    ours_by_name = {name: p.grad for name, p in theirs.named_parameters()}
    for layer, direction, ending in torch_names.places(ours.config):
        cell = ours.layers[layer].directions[direction]
        pairs = {"weight_ih": cell.w_input, "weight_hh": cell.w_state, "bias_ih": cell.bias}
        if ours.config.d_proj:
            pairs["weight_hr"] = cell.w_proj
        for name, parameter in pairs.items():
            there = ours_by_name[f"core.{name}_{ending}"]
            assert (parameter.grad - there).abs().max() < 1e-12, (name, ending)
        if isinstance(cell, cells.GRU):
            there = ours_by_name[f"core.bias_hh_{ending}"].view(3, -1)[2]
            assert (cell.bias_n.grad - there).abs().max() < 1e-12
    assert (ours.embedding.weight.grad - theirs.encoder.weight.grad).abs().max() < 1e-12
    assert (ours.head.weight.grad - theirs.decoder.weight.grad).abs().max() < 1e-12


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_weights_go_there_and_back(variant):
    ours, theirs = pair(**variant)
    exported = torch_names.to_torch(ours)
    names = {"embedding": "encoder", "rnn": "core", "head": "decoder"}
    renamed = {names[n.split(".")[0]] + n[n.index(".") :]: t for n, t in exported.items()}
    again = Theirs(ours.config).double()
    again.load_state_dict(renamed)  # strict: every name and shape
    tokens = torch.randint(11, (2, 6))
    assert (again(tokens)[0] - theirs(tokens)[0]).abs().max() < 1e-12


@pytest.mark.parametrize("prefix", ["", "module.", "model.net.0."])
@pytest.mark.parametrize("kind", KINDS)
def test_any_prefix(kind, prefix):
    theirs = Theirs(config_of(cell=kind)).double()
    state = {prefix + name: tensor for name, tensor in theirs.state_dict().items()}
    ours = torch_names.build(state, "here").double()
    assert ours.config.cell == kind
    tokens = torch.randint(11, (2, 6))
    answers = theirs(tokens)[0]
    assert (ours(tokens)[0] - answers[:, -1]).abs().max() < 1e-12  # 9 labels: once a row


def test_networks_without_embedding_and_without_biases():
    core, head = nn.GRU(3, 7, bias=False), nn.Linear(7, 2)
    state = {f"a.{n}": t for n, t in core.state_dict().items()}
    state |= {f"b.{n}": t for n, t in head.state_dict().items()}
    ours = torch_names.build(state, "here")
    x = torch.randn(4, 6, 3)
    expected = head(core(x.transpose(0, 1))[0][-1])
    assert ours.config.n_number == 3 and (ours(x)[0] - expected).abs().max() < 1e-6


def test_tied_language_model_is_read_as_one():
    """V × D twice under two names, no bias in the head: still embedding and head."""
    embedding, core = nn.Embedding(11, 7), nn.LSTM(7, 7)
    state = {f"rnn.{n}": t for n, t in core.state_dict().items()}
    state |= {"emb.weight": embedding.weight, "out.weight": embedding.weight}
    ours = torch_names.build(state, "here")
    assert ours.config.answer == "every" and torch.equal(ours.head.weight, ours.embedding.weight)


def broken(state: dict) -> dict[str, dict]:
    """State dicts that cannot be a network of ours."""
    fewer = dict(state)
    del fewer["core.weight_hh_l0"]
    other = {name: tensor for name, tensor in state.items() if not name.startswith("core")}
    return {
        "lack core.weight_hh_l0": fewer,
        "no weight_ih_l0": other,
        "2 recurrent parts": state | {"x.weight_ih_l0": torch.zeros(4, 1)},
        "has banana": state | {"banana": torch.zeros(3)},
        "are no cell": state | {"core.weight_hh_l0": torch.zeros(35, 7)},
        "has not 28 numbers": state | {"core.bias_hh_l0": torch.zeros(27)},
        "not finite": state | {"core.bias_hh_l0": torch.full((28,), torch.nan)},
        "could be the head": {**state, "b.weight": torch.zeros(4, 7), "b.bias": torch.zeros(4)},
    }  # fmt: skip


def test_state_dicts_of_something_else_are_refused():
    for message, state in broken(Theirs(config_of()).state_dict()).items():
        with pytest.raises(UserError, match=message):
            torch_names.build(state, "here")


@pytest.mark.parametrize("more", [{"peephole": True}, {"layer_norm": True}], ids=str)
def test_what_torch_does_not_have_is_not_exported(more):
    with pytest.raises(UserError, match="cannot be exported"):
        torch_names.to_torch(SequenceModel(config_of(**more)))


# ── Forget bias, once ─────────────────────────────────────────────────────────────────────────────


def test_forget_bias_is_one_on_every_layer_and_direction_exactly_once():
    """In torch's terms: b_ih + b_hh is 1 on the forget gate of each, 0 on the others."""
    model = SequenceModel(config_of(n_layer=3, bidirectional=True))
    exported = torch_names.to_torch(model)
    ends = [f"l{k}{end}" for k in range(3) for end in ("", "_reverse")]
    assert {n.split("bias_ih_")[1] for n in exported if "bias_ih" in n} == set(ends)
    for end in ends:
        total = exported[f"rnn.bias_ih_{end}"] + exported[f"rnn.bias_hh_{end}"]
        assert total.tolist() == [0.0] * 7 + [1.0] * 7 + [0.0] * 14


def test_chrono_is_on_every_layer_and_direction():
    model = SequenceModel(config_of(n_layer=2, bidirectional=True, chrono=50))
    for layer in model.layers:
        for cell in layer.directions:
            i, f, _, _ = cell.bias.view(4, -1)
            assert torch.equal(i, -f) and f.max() > 1


# ── Carried state ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("cuts", [[7], [1, 6], [3, 4], [2, 2, 3], [1] * 7], ids=str)
@pytest.mark.parametrize("cell", KINDS)
def test_chunks_with_carried_state_are_one_long_pass(cell, cuts):
    model = SequenceModel(config_of(cell=cell, n_layer=2)).double()
    tokens = torch.randint(11, (3, 7))
    whole, end = model(tokens)
    state, answers = None, []
    for piece in tokens.split(cuts, dim=1):
        one, state = model(piece, state)
        answers.append(one)
    assert (torch.cat(answers, dim=1) - whole).abs().max() < 1e-12
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(state, end, strict=True))


def test_rows_do_not_see_one_another():
    """Each row alone, without filling, gives what it gives in the batch."""
    model = SequenceModel(config_of(n_layer=2, bidirectional=True, answer="last")).double()
    tokens = torch.randint(11, (5, 7))
    together, _ = model(tokens, None, LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        alone, _ = model(tokens[row : row + 1, :length])
        assert (together[row] - alone[0]).abs().max() < 1e-12


def test_filling_is_not_read():
    model = SequenceModel(config_of(bidirectional=True, answer="mean")).double()
    tokens = torch.randint(11, (5, 7))
    answers, _ = model(tokens, None, LENGTHS)
    other = torch.where(torch.arange(7) < LENGTHS[:, None], tokens, (tokens + 1) % 11)
    assert torch.equal(model(other, None, LENGTHS)[0], answers)


def test_the_past_does_not_see_the_future(sizes):
    model = SequenceModel(sizes).double()
    tokens = torch.randint(11, (2, 7))
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 11
    assert torch.equal(model(tokens)[0][:, :4], model(changed)[0][:, :4])
    assert not torch.equal(model(tokens)[0][:, 4], model(changed)[0][:, 4])


# ── What regularises ──────────────────────────────────────────────────────────────────────────────


def test_dropout_is_the_same_at_all_steps_and_differs_by_row():
    x = locked_dropout(torch.ones(50, 8, 64), 0.5, True)
    assert torch.equal(x, x[:1].expand_as(x))
    assert set(x.unique().tolist()) == {0.0, 2.0} and not torch.equal(x[0, 0], x[0, 1])
    assert x.mean().item() == pytest.approx(1.0, abs=0.15)
    assert torch.equal(locked_dropout(x, 0.5, False), x)


def test_dropped_weights_come_back():
    model = SequenceModel(config_of(weight_drop=0.5))
    before = {n: p.clone() for n, p in model.named_parameters()}
    tokens = torch.randint(11, (2, 7))
    one, other = model(tokens)[0], model(tokens)[0]
    assert not torch.equal(one, other)
    one.sum().backward()
    grad = model.layers[0].directions[0].w_state.grad
    assert 0.2 < (grad == 0).float().mean() < 0.8  # a dropped weight gets no gradient
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    model.eval()
    assert torch.equal(model(tokens)[0], model(tokens)[0])


def test_tied_head_is_the_embedding():
    config = SequenceConfig(d_model=7, d_embed=7, vocab_size=11, n_answer=11, tie_embeddings=True)
    model = SequenceModel(config)
    assert model.head.weight is model.embedding.weight
    assert len(list(model.parameters())) == 5


def test_weight_count_is_right():
    for variant in VARIANTS:
        model = SequenceModel(config_of(**variant))
        matrices = [p for p in model.parameters() if p.dim() == 2]
        assert model.config.n_parameter == sum(p.numel() for p in matrices)


@pytest.mark.parametrize("cell", KINDS)
def test_overfits_one_batch(cell):
    torch.manual_seed(0)
    model = SequenceModel(SequenceConfig(d_model=24, cell=cell, vocab_size=11, n_answer=11))
    rows = torch.randint(11, (4, 13))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(150):
        loss = nn.functional.cross_entropy(
            model(rows[:, :-1])[0].flatten(0, 1), rows[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.15
