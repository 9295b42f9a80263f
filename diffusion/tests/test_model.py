"""The networks: shapes, first answers, and random UNet2DModels of diffusers."""

import dataclasses

import pytest
import torch
from torch import nn

from model import MLP, PRESETS, DiT, NetConfig, UNet, build, places, sinusoids

SMALL = NetConfig(widths="16,24", attention="1", n_group=4, d_head=8, n_class=3)
SIDES = {
    name: {"image_height": side, "image_width": side}
    for name, side in {"toy": 1, "digits": 8, "dit": 8, "mnist": 28, "shapes": 32}.items()
}


def inputs(config: NetConfig, n: int = 3):
    labels = torch.arange(n) % config.n_label if config.n_class else None
    return torch.randn(n, *config.shape), torch.tensor([0.0, 17.5, 999.0])[:n], labels


def awake(model: nn.Module) -> nn.Module:
    """With no weight at zero, so that everything reaches the answer."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_answer_in_the_shape_of_the_question(name):
    config = dataclasses.replace(PRESETS[name], n_class=4, **SIDES[name])
    x, times, labels = inputs(config)
    assert build(config).eval()(x, times, labels).shape == x.shape


@pytest.mark.parametrize("net", ["dit", "mlp"])
def test_first_answer_is_zero(net):
    """adaLN-Zero, and the last layer of the MLP."""
    config = NetConfig(net=net, d_model=24, d_head=8)
    x, times, _ = inputs(config)
    assert not build(config)(x, times).any()


def test_blocks_of_a_new_dit_do_nothing():
    """§3.2 of arXiv:2212.09748: every gate begins at zero, so a block gives what it was given."""
    model = DiT(NetConfig(net="dit", d_model=24, d_head=8))
    tokens, features = torch.randn(2, 16, 24), torch.randn(2, 24)
    assert torch.equal(model.blocks[0](tokens, features), tokens)


@pytest.mark.parametrize("config", [
    SMALL,
    NetConfig(net="dit", d_model=24, d_head=8, n_class=3),
    NetConfig(net="mlp", d_model=24, n_class=3),
], ids=lambda config: config.net)  # fmt: skip
def test_time_label_and_rows_matter(config):
    """Another time or label is another answer; other rows of the batch are not."""
    model = awake(build(config))
    x, times, labels = inputs(config)
    with torch.no_grad():
        answer = model(x, times, labels)
        assert not torch.allclose(model(x, times + 50, labels), answer, atol=1e-4)
        assert not torch.allclose(model(x, times, (labels + 1) % 3), answer, atol=1e-4)
        alone = model(x[1:2], times[1:2], labels[1:2])
    torch.testing.assert_close(alone, answer[1:2], rtol=1e-4, atol=1e-5)


def test_no_label_is_the_label_for_any():
    model = awake(build(SMALL))
    x, times, _ = inputs(SMALL)
    anything = torch.full((3,), SMALL.n_class)
    assert torch.equal(model(x, times), model(x, times, anything))


def test_waves_by_hand():
    """Time 1 and width 4: the frequencies are 1 and 1/100 (with shift 1: 1 and 1/10000)."""
    found = sinusoids(torch.tensor([1.0]), 4)[0]
    one, hundredth = torch.tensor(1.0), torch.tensor(0.01)
    wanted = torch.stack([one.cos(), hundredth.cos(), one.sin(), hundredth.sin()])
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(sinusoids(torch.tensor([1.0]), 4, shift=1)[0, 3].item(), 1e-4)


def test_places_tell_rows_from_columns():
    found = places(2, 3, 8)
    assert found.shape == (6, 8) and len(found.unique(dim=0)) == 6
    assert torch.equal(found[0, :4], found[2, :4]) and torch.equal(found[0, 4:], found[3, 4:])


def test_patches_are_put_back_where_they_were():
    """A DiT whose blocks do nothing: a bright patch moves the answer in its own place alone."""
    config = NetConfig(net="dit", d_model=24, d_head=8, n_layer=1)
    model = DiT(config)
    nn.init.normal_(model.out.weight)
    x, times = torch.zeros(1, 1, 8, 8), torch.zeros(1)
    y = x.clone()
    y[0, 0, 2:4, 6:8] = 1
    changed = (model(y, times) - model(x, times)).abs()[0, 0] > 1e-6
    assert changed[2:4, 6:8].all() and changed.sum() == 4


def test_networks_are_made_of_known_names():
    assert {type(build(NetConfig(net=net))) for net in ("unet", "dit", "mlp")} == {UNet, DiT, MLP}


SHAPES = {  # of UNet2DModel
    "plain": {"block_out_channels": (16, 24), "sample_size": 8},
    "attention": {"attended": (1,), "block_out_channels": (16, 24), "sample_size": 8},
    "three": {
        "attended": (1, 2),
        "block_out_channels": (8, 16, 32),
        "sample_size": (16, 12),
        "layers_per_block": 2,
        "in_channels": 3,
    },
    "as ddpm-cifar10-32": {
        "attended": (1,),
        "block_out_channels": (16, 32, 32),
        "sample_size": 16,
        "layers_per_block": 2,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-2,
        "attention_head_dim": 32,
        "attended_all": False,
    },
    "classes": {"block_out_channels": (16, 16), "sample_size": 8, "num_class_embeds": 5},
    "one width": {"block_out_channels": (32,), "sample_size": 5},
}


def random_unet(block_out_channels, attended=(), in_channels=1, attended_all=None, **more):
    """A UNet2DModel of diffusers with random weights, also where it begins with zeros and ones."""
    from diffusers import UNet2DModel

    down = ["AttnDownBlock2D" if i in attended else "DownBlock2D"
            for i in range(len(block_out_channels))]  # fmt: skip
    up = [name.replace("Down", "Up") for name in reversed(down)]
    base = {"norm_num_groups": 8, "attention_head_dim": 8, "layers_per_block": 1}
    model = UNet2DModel(
        in_channels=in_channels,
        out_channels=in_channels,
        block_out_channels=block_out_channels,
        down_block_types=down,
        up_block_types=up,
        **(base | more),
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("name", SHAPES)
def test_random_unets_of_diffusers_answer_the_same(name, tmp_path):
    """Written by diffusers, read by us: the same answers, and the same file back."""
    pytest.importorskip("diffusers")
    import checkpoint

    theirs = random_unet(**SHAPES[name])
    theirs.save_pretrained(tmp_path / "unet")
    ours = checkpoint.load(tmp_path)
    x, times, _ = inputs(ours.sizes)
    labels = torch.tensor([0, 4, 2]) if ours.sizes.n_class else None
    with torch.no_grad():
        wanted = theirs(x, times, class_labels=labels).sample
        found = ours.model(x, times, labels)
    assert (found - wanted).abs().max() <= 1e-5 * max(1, wanted.abs().max())
    assert checkpoint.their_sizes(ours.sizes).items() <= json_config(theirs).items()


def json_config(model) -> dict:
    """The config of a model of diffusers as it reads from its file."""
    config = dict(model.config) | {"_class_name": "UNet2DModel"}
    lists = {key: list(value) for key, value in config.items() if isinstance(value, tuple)}
    return config | lists


def test_a_dit_knows_where_a_patch_is():
    """Without the waves of `places` attention would give shuffled patches a shuffled answer."""
    model = awake(DiT(NetConfig(net="dit", d_model=24, d_head=8, n_layer=1)))
    x, times = torch.randn(1, 1, 8, 8), torch.zeros(1)
    with torch.no_grad():
        moved = model(x.roll(2, dims=3), times)
        assert not torch.allclose(moved, model(x, times).roll(2, dims=3), atol=1e-3)
