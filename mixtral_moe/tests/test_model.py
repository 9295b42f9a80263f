"""The model around the layer: sizes, start, gradients; what is llama's is tested in llama."""

import dataclasses
import math
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import model as model_file
from conftest import FOLDER
from model import PRESETS, Mixtral, MixtralConfig, RopeScaling
from moe import recording


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_counted_without_a_model(name):
    """8x7b: 46.7 billion, of which 12.9 work on a token; nothing of it is built."""
    sizes = PRESETS[name]
    with torch.device("meta"):
        model = Mixtral(sizes)
    assert sum(p.numel() for p in model.parameters()) == sizes.n_parameter
    kept = [p.numel() * sizes.n_active // sizes.n_expert if ".experts." in n else p.numel()
            for n, p in model.named_parameters()]  # fmt: skip
    assert sum(kept) == sizes.n_active_parameter


def test_mixtral_8x7b_has_the_published_numbers():
    sizes = PRESETS["8x7b"]
    assert (sizes.n_parameter, sizes.n_active_parameter) == (46_702_792_704, 12_879_925_248)


def test_comments_beside_the_presets_say_the_same():
    text = (FOLDER / "model.py").read_text(encoding="utf-8")
    block = text[text.index("PRESETS = {") : text.index("}  # fmt: skip")]
    pattern = r'(?s)"([\w-]+)": MixtralConfig\(.*?\),  # ([\d,]+)(?: and ([\d,]+))?'
    found = re.findall(pattern, block)
    assert [name for name, *_ in found] == list(PRESETS)
    for name, total, active in found:
        assert int(total.replace(",", "")) == PRESETS[name].n_parameter
        expected = PRESETS[name].n_active_parameter
        assert int((active or total).replace(",", "")) == expected


def test_dense_model_has_as_many_active_parameters():
    """At least as many and at most one in a hundred more: the mixture must not win by size."""
    dense, mixture = PRESETS["dense"], PRESETS["tiny"]
    assert dense.n_parameter == dense.n_active_parameter
    assert 1 <= dense.n_parameter / mixture.n_active_parameter < 1.01
    same = {"d_ff", "n_expert", "n_active"}
    for field in dataclasses.fields(MixtralConfig):
        if field.name not in same:
            assert getattr(dense, field.name) == getattr(mixture, field.name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_active": 6}, "n_active 6 is more than n_expert 5"),
        ({"n_expert": 0}, "n_expert must be at least 1"),
        ({"window": -1}, "window must be at least 0"),
        ({"n_kv_head": 3}, "n_kv_head 3 does not divide n_head 4"),
        ({"rope_theta": math.inf}, "rope_theta"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(sizes, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(sizes, **change)


def test_model_and_moe_can_be_copied_alone(tmp_path):
    for name in ("model.py", "moe.py"):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    code = "import torch, model\n"
    code += "print(model.Mixtral(model.PRESETS['tiny'])(torch.ones(1, 3).long()).shape)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert b"torch.Size([1, 3," in done.stdout, done.stderr


def test_moe_imports_torch_and_the_standard_library_alone():
    lines = (FOLDER / "moe.py").read_text(encoding="utf-8").splitlines()
    imported = {line.split()[1].split(".")[0] for line in lines
                if line.startswith(("import ", "from "))}  # fmt: skip
    assert imported == {"contextlib", "math", "collections", "dataclasses", "torch"}


def test_spread_of_the_initial_weights(sizes):
    """1/√columns, of the layers that write to the residual stream 1/√(2 · n_layer) of that."""
    model = Mixtral(dataclasses.replace(sizes, d_model=128, d_ff=96, n_expert=9))
    spread = {name: p.std().item() * p.shape[-1] ** 0.5 for name, p in model.named_parameters()
              if p.dim() > 1}  # fmt: skip
    for name, found in spread.items():
        expected = 0.5 if re.search(r"\.(wo|w2)\b", name) else 1.0
        if "gate" in name:
            expected = model_file.UNDECIDED
        if name == "embedding.weight":
            expected = model_file.FAINT
        assert found == pytest.approx(expected, rel=0.12), name


def test_router_begins_undecided(sizes):
    """All experts get nearly the same score, so what is learned first decides."""
    with recording(model := Mixtral(sizes)) as record:
        model(torch.randint(97, (4, 40)))
    for routing in record:
        assert 0 < routing.logits.std() < 0.05


@pytest.mark.parametrize("tied", [False, True])
def test_loss_before_training_is_ln_v_and_half_the_variance_of_the_logits(tied):
    """0.09 by the faint embedding that is the head too, 1 by a head of its own."""
    sizes = MixtralConfig(vocab_size=512, n_layer=2, tie_embeddings=tied)
    rows = torch.randint(512, (64, 33))
    with torch.no_grad():
        logits = Mixtral(sizes)(rows[:, :-1])
    loss = nn.functional.cross_entropy(logits.mT, rows[:, 1:]).item()
    assert loss == pytest.approx(math.log(512) + (0.045 if tied else 0.5), abs=0.1)


def test_no_token_sees_a_later_one(sizes):
    """Whatever the experts: dispatching in one batch must not mix the tokens."""
    for window in (0, 7):
        model = Mixtral(dataclasses.replace(sizes, window=window)).eval()
        rows, other = torch.randint(97, (2, 30)), None
        other = rows.clone()
        other[:, 20:] = torch.randint(97, (2, 10))
        with torch.no_grad():
            assert torch.allclose(model(rows)[:, :20], model(other)[:, :20], atol=1e-5)
            assert not torch.allclose(model(rows)[:, 20:], model(other)[:, 20:], atol=1e-2)


def test_every_weight_gets_a_gradient(sizes):
    """With enough tokens each expert has some; the router by the weights of the chosen."""
    model = Mixtral(sizes)
    model(torch.randint(97, (8, 40))).square().sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad.abs().max() > 0, name
    for block in model.blocks:
        assert block.ffn.experts.w1.grad.abs().amax(dim=(1, 2)).min() > 0


def test_mixture_of_one_expert_is_llama(sizes):
    """Scores of one expert are ignored, whatever they are."""
    model = Mixtral(dataclasses.replace(sizes, n_expert=1, n_active=1)).double()
    rows = torch.randint(97, (2, 20))
    with torch.no_grad():
        before = model(rows)
        for block in model.blocks:
            block.ffn.router.gate.weight.normal_(std=9.0)
        assert torch.allclose(model(rows), before, atol=1e-12)


def test_flops_by_hand():
    """6 a weight that works: D·(H·C + 2·K·C + H·C), router 5·D, 2 experts of 3·D·F, head V·D."""
    sizes = MixtralConfig(
        vocab_size=97, seq_len=40, n_layer=2, n_head=4, n_kv_head=2, d_model=24, d_head=10,
        d_ff=18, n_expert=5, n_active=2,
    )  # fmt: skip
    layer = 24 * (40 + 20 + 20 + 40) + 24 * 5 + 2 * 3 * 24 * 18
    expected = 6 * (2 * layer + 97 * 24) + 12 * 2 * 4 * 10 * 40
    assert Mixtral(sizes).flops_per_token(40) == expected


def test_bfloat16_is_float32_with_fewer_digits(sizes):
    """But where two experts score nearly the same: there it may choose the other one."""
    model, rows = Mixtral(sizes).eval(), torch.randint(97, (4, 30))
    for block in model.blocks:
        block.ffn.router.gate.weight.data.mul_(50)
    with torch.no_grad():
        exact = model(rows)
        rough = model.bfloat16()(rows).float()
    error = (rough - exact).abs().amax(dim=-1)
    assert error.quantile(0.9) < 0.1 * exact.std() + 0.05


def test_scaled_rotary_frequencies_are_taken_over(sizes):
    plain = Mixtral(sizes)
    scaled = Mixtral(dataclasses.replace(sizes, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64)))
    assert not torch.equal(plain.rotary.frequencies, scaled.rotary.frequencies)
