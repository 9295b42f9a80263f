"""The networks: parameter counts of the paper, parity with torch.nn written out, init, limits."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import layers
from bench import copied, plain_net
from model import (
    PRESETS,
    BasicBlock,
    NetConfig,
    PaddedShortcut,
    PooledConv,
    build,
    macs,
    parameters_by_kind,
)

COUNTS = {  # arXiv:1512.03385, Table 6: 0.27, 0.46, 0.66, 0.85 and 1.7 million
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "plain20": 269_722,
    "plain56": 853_018,
    "resnet18": 11_173_962,  # torchvision's 11,689,512 with 10 classes for 1000 and the small stem
    "resnet18-imagenet": 11_181_642,
    "fast": 261_730,
    "lenet": 83_126,
}
SMALL = {"image_height": 16, "image_width": 12}
ODD = {"image_height": 17, "image_width": 13}  # halving such a picture needs a decision each time


def n_parameter(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def sized(name: str, **changes) -> NetConfig:
    return dataclasses.replace(PRESETS[name], **changes)


def awake(config: NetConfig, kind=nn) -> nn.Module:
    """A network in float64 whose last layer and running statistics are not the trivial ones."""
    model = build(config, kind).double()
    for name, tensor in model.state_dict().items():
        if name.startswith("fc") or tensor.dim() == 1:
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return model


# ── Counts and shapes ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts(name):
    assert n_parameter(build(PRESETS[name])) == COUNTS[name]


def test_resnet18_of_a_thousand_classes_is_torchvisions():
    """11,689,512: the number in torchvision's documentation of ResNet18_Weights."""
    config = sized("resnet18-imagenet", n_class=1000, image_height=64, image_width=64)
    assert n_parameter(build(config)) == 11_689_512


def test_resnet20_needs_41_million_multiply_adds():
    """By hand: 32²·9·(3·16 + 6·16²) + 16²·9·(16·32 + 5·32²) + 8²·9·(32·64 + 5·64²) + 640."""
    by_hand = 1024 * 9 * (48 + 6 * 256) + 256 * 9 * (512 + 5 * 1024) + 64 * 9 * (2048 + 5 * 4096)
    assert macs(build(PRESETS["resnet20"]), PRESETS["resnet20"]) == by_hand + 640 == 40_551_040


def test_counting_leaves_the_network_as_it_was():
    model = build(PRESETS["fast"]).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    macs(model, PRESETS["fast"])
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not model.stem.conv1._forward_hooks


def test_lenet_on_28_by_28_is_the_papers():
    """156 + 2,416 + 48,120 + 10,164 + 850."""
    config = sized("lenet", channels=1, image_height=28, image_width=28)
    assert n_parameter(build(config)) == 61_706


@pytest.mark.parametrize("name", ["fast", "lenet", "resnet20", "plain20", "resnet18-imagenet"])
@pytest.mark.parametrize(
    ("channels", "height", "width"), [(1, 28, 28), (3, 33, 21), (2, 12, 17), (3, 32, 32)]
)
def test_any_picture_size(name, channels, height, width):
    config = sized(
        name, width=8, channels=channels, image_height=height, image_width=width, n_class=7
    )
    assert build(config)(torch.randn(2, channels, height, width)).shape == (2, 7)


# ── Parity ────────────────────────────────────────────────────────────────────────────────────────


class WrittenOut(nn.Module):
    """A ResNet of one file, as found in most repositories: the reference."""

    def __init__(self, config: NetConfig):
        super().__init__()
        c, large = config.width, config.stem == "imagenet"
        self.conv1 = nn.Conv2d(
            config.channels, c, 7 if large else 3, 2 if large else 1, 3 if large else 1, bias=False
        )
        self.bn1 = nn.BatchNorm2d(c)
        self.blocks, self.config, c_in = nn.ModuleList(), config, c
        for i in range(config.n_stage * config.n_block):
            stage, first = divmod(i, config.n_block)
            c_out, stride = c * 2**stage, 2 if stage and first == 0 else 1
            parts = [nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)]
            parts += [nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)]
            if config.shortcut == "B" and c_in != c_out:
                parts += [nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)]
            self.blocks.append(nn.ModuleList(parts))
            c_in = c_out
        self.fc = nn.Linear(c_in, config.n_class)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        if self.config.stem == "imagenet":
            x = F.max_pool2d(x, 3, 2, 1)
        for conv1, bn1, conv2, bn2, *project in self.blocks:
            y = bn2(conv2(F.relu(bn1(conv1(x)))))
            if project:
                x = project[1](project[0](x))
            elif y.shape != x.shape:
                quarter = y.shape[1] // 4
                x = F.pad(x[:, :, ::2, ::2], [0, 0, 0, 0, quarter, quarter])
            x = F.relu(y if self.config.shortcut == "none" else x + y)
        return self.fc(x.mean((2, 3)))


VARIANTS = [
    sized("resnet20", **SMALL),
    sized("plain20", **SMALL),
    sized("resnet20", shortcut="B", **SMALL),
    sized("resnet18", width=8, **SMALL),
    sized("resnet20", **ODD),
    sized("resnet20", shortcut="B", **ODD),
    sized("resnet18-imagenet", width=8, image_height=41, image_width=37),
    sized("resnet18-imagenet", width=8, image_height=40, image_width=40),
]


def gradients(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    logits = model(x)
    model.zero_grad()
    F.cross_entropy(logits, torch.arange(len(x))).backward()
    return logits, [p.grad for p in model.parameters()]


@pytest.mark.parametrize(
    "config", VARIANTS, ids=lambda c: f"{c.depth}{c.shortcut}{c.stem}{c.image_height}"
)
@pytest.mark.parametrize("training", [True, False])
def test_resnet_equals_torch_written_out(config, training):
    """Logits, all gradients and the buffers afterwards, in float64."""
    model = awake(config).train(training)
    reference = copied(WrittenOut(config).double(), model).train(training)
    x = torch.randn(3, 3, config.image_height, config.image_width, dtype=torch.float64)
    for ours, theirs in zip(gradients(model, x), gradients(reference, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sides", [SMALL, ODD])
def test_fast_net_equals_the_plain_script_of_the_bench(sides):
    config = sized("fast", width=4, **sides)
    model = awake(config)
    x = torch.randn(3, 3, *sides.values(), dtype=torch.float64)
    torch.testing.assert_close(copied(plain_net(config).double(), model)(x), model(x))


@pytest.mark.parametrize("name", ["fast", "lenet", "resnet20", "resnet18-imagenet"])
def test_our_own_layers_give_the_same_numbers(name):
    """--layers scratch: logits, gradients and buffers of a training step, in float64."""
    config = sized(name, width=4, image_height=20, image_width=20)
    model, ours = awake(config), build(config, layers).double()
    ours.load_state_dict(model.state_dict())
    assert {type(m).__module__ for m in ours.modules() if list(m.parameters(False))} > {"layers"}
    x = torch.randn(3, 3, 20, 20, dtype=torch.float64)
    for found, expected in zip(gradients(ours, x), gradients(model, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    for found, expected in zip(ours.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


# ── Limits ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["fast", "lenet", "resnet20", "plain20"])
def test_an_untrained_network_finds_all_classes_alike(name):
    """The loss is exactly ln K: the last layer begins at zero."""
    model = build(sized(name, n_class=7))
    loss = F.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.tensor([0, 3, 6, 2]))
    assert loss.item() == pytest.approx(torch.tensor(7.0).log().item(), abs=1e-6)


def test_zero_init_makes_a_block_the_identity():
    """On what is not negative already, as all of its inputs are."""
    model = build(NetConfig(net="resnet", zero_init=True, **SMALL))
    x = torch.randn(2, 24, 8, 8).relu()
    torch.testing.assert_close(model.layer1[0](x), x)
    assert not torch.allclose(build(NetConfig(net="resnet", **SMALL)).layer1[0](x), x)


def test_zero_init_zeroes_the_last_normalisation_of_each_block_and_no_other():
    """The second: with the first at zero, conv2 would get no signal and could never learn."""
    model = build(NetConfig(net="resnet", zero_init=True, **SMALL))
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            last = name.endswith("bn2")
            assert module.weight.unique().tolist() == [0.0 if last else 1.0], name


@pytest.mark.parametrize("part", ["layer2.0.conv1", "layer2.0.downsample.0", "conv1"])
def test_filters_begin_with_the_variance_of_he(part):
    """2 / (k² · channels out), where channels in and out differ: 64 → 128, and 3 → 64."""
    weight = build(PRESETS["resnet18"]).get_submodule(part).weight
    out, into, k, _ = weight.shape
    assert out != into
    assert weight.var().item() == pytest.approx(2 / (k * k * out), rel=0.1)


def test_a_head_that_does_not_begin_at_zero_has_the_variance_of_he():
    """2 / inputs, as the residual experiment has it: the first loss is then no longer ln K."""
    model = build(sized("resnet20", zero_head=False, n_class=1000))
    assert model.fc.weight.var().item() == pytest.approx(2 / 64, rel=0.02)
    assert model.fc.bias.abs().max() == 0


def test_every_parameter_has_one_kind():
    """By what holds it, not by its number of dimensions."""
    model = build(sized("resnet20", shortcut="B"))
    kinds = parameters_by_kind(model)
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in kinds["matrices"]] == ["fc.weight"]
    assert {"conv1.weight", "layer2.0.downsample.0.weight"} <= {
        names[id(p)] for p in kinds["filters"]
    }
    others = {names[id(p)] for p in kinds["norms and biases"]}
    assert {"bn1.weight", "bn1.bias", "fc.bias"} <= others
    assert sum(map(len, kinds.values())) == len(names) == len({*names})
    assert not [name for name in others if "conv" in name]


def test_padded_shortcut_by_hand():
    """Pixels 0 and 2 of each row and column; channels (0, x₀, x₁, 0)."""
    x = torch.arange(18.0).view(1, 2, 3, 3)
    y = PaddedShortcut(2, 4, 2)(x)
    assert y[0, :, 0].tolist() == [[0, 0], [0, 2], [9, 11], [0, 0]]


def test_pooling_before_relu_is_pooling_after_it():
    """To the bit, for odd sizes too: the maximum of ReLUs is the ReLU of the maximum."""
    stage = PooledConv(3, 5)
    nn.init.normal_(stage.bn1.weight)
    x = torch.randn(4, 3, 9, 7)
    after = stage.pool(F.relu(stage.bn1(stage.conv1(x))))
    assert torch.equal(stage(x), after)


def test_plain_twins_have_no_way_around():
    block = BasicBlock(4, 4, 1, "none")
    nn.init.zeros_(block.bn2.weight)
    assert block(torch.randn(2, 4, 5, 5)).abs().max() == 0


def test_pictures_of_a_batch_do_not_see_one_another_in_evaluation():
    model = awake(sized("fast", width=4)).eval()
    x = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model(x)[2:3], model(x[2:3]))


def test_a_batch_of_one_trains():
    assert build(sized("fast", width=4, **SMALL))(torch.randn(1, 3, 16, 12)).shape == (1, 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "width must be at least 1"),
        ({"net": "resnet", "depth": 21}, "depth 21: 3 stages need 6·n \\+ 2 layers, such as 8"),
        ({"net": "resnet", "depth": 2}, "depth 2"),
        ({"image_height": 7}, "pictures of 7 × 32 are too small for the net fast"),
        ({"net": "lenet", "image_width": 11}, "32 × 11 are too small for the net lenet"),
        ({"channels": 0}, "channels must be at least 1"),
    ],
)
def test_sizes_that_cannot_be_built(changes, message):
    with pytest.raises(ValueError, match=message):
        NetConfig(**changes)
