"""Grad-CAM on a network worked out by hand, and how far a pixel sees."""

import pytest
import torch
from torch import nn

from explain import grad_cam, last_features, receptive_field
from model import PRESETS, NetConfig, build, macs


class Two(nn.Module):
    """Features are the picture's own two channels; class k counts channel k."""

    def __init__(self):
        super().__init__()
        self.features, self.avgpool = nn.Identity(), nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2, 2, bias=False)
        self.fc.weight = nn.Parameter(torch.tensor([[1.0, -1.0], [0.0, 2.0]]))

    def forward(self, x):
        return self.fc(self.avgpool(self.features(x)).flatten(1))


def test_grad_cam_by_hand():
    """Class 0: channel 0 − channel 1, where positive, up to its own largest value."""
    x = torch.tensor([[[[4.0, 1.0], [0.0, 2.0]], [[0.0, 3.0], [0.0, 0.0]]]], requires_grad=True)
    maps = grad_cam(Two(), x, torch.tensor([0]))
    torch.testing.assert_close(maps, torch.tensor([[[1.0, 0.0], [0.0, 0.5]]]))
    maps = grad_cam(Two(), x, torch.tensor([1]))
    torch.testing.assert_close(maps, torch.tensor([[[0.0, 1.0], [0.0, 0.0]]]))


@pytest.mark.parametrize("name", ["fast", "resnet20"])
def test_grad_cam_of_our_networks(name):
    model = build(PRESETS[name])
    nn.init.normal_(model.fc.weight)
    maps = grad_cam(model, torch.randn(3, 3, 32, 32), torch.tensor([1, 2, 3]))
    assert maps.shape == (3, 32, 32)
    assert maps.min() >= 0 and maps.max() == 1
    assert set(maps.amax((1, 2)).tolist()) <= {0.0, 1.0}  # 0 where nothing speaks for the label
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("look", ["grad_cam", "receptive_field", "macs"])
def test_looking_leaves_every_module_in_its_mode(look):
    """A network in training whose first normalisation is frozen stays just so."""
    config = NetConfig(width=4)
    model = build(config).train()
    model.stem.bn1.eval()
    before = [module.training for module in model.modules()]
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():  # as the caller may have said; the gradients needed here are computed
        if look == "grad_cam":
            grad_cam(model, x, torch.tensor([1, 2]))
        elif look == "receptive_field":
            receptive_field(model, model.layer1, x)
        else:
            macs(model, config)
    assert [module.training for module in model.modules()] == before
    assert int(model.stem.bn1.num_batches_tracked) == int(model.layer1.bn1.num_batches_tracked) == 0


def test_grad_cam_of_a_frozen_network():
    model = build(NetConfig(width=4)).requires_grad_(False)
    nn.init.normal_(model.fc.weight)
    assert grad_cam(model, torch.randn(2, 3, 32, 32), torch.tensor([1, 2])).shape == (2, 32, 32)


def test_lenet_has_no_places_left():
    with pytest.raises(ValueError, match="ends with a mean over all places"):
        last_features(build(PRESETS["lenet"]))


def test_receptive_field_of_three_convolutions_is_seven_pixels():
    """1 + 3·2: the middle of 15 × 15 and three pixels each way."""
    conv = lambda c: nn.Conv2d(c, 4, 3, padding=1)  # noqa: E731
    model = nn.Sequential(conv(3), conv(4), conv(4))
    field = receptive_field(model, model[2], torch.randn(5, 3, 15, 15))
    assert field.sum().item() == pytest.approx(1)
    seen = field > 0
    assert seen[4:11, 4:11].all() and seen.sum() == 49
    assert field[7, 7] > 4 * field[4, 4]


def test_no_pixel_of_the_stem_sees_the_whole_picture():
    model = build(NetConfig())
    x = torch.randn(2, 3, 32, 32)
    wide = [
        int((receptive_field(model, model.get_submodule(name), x) > 0).any(0).sum())
        for name in ("stem", "layer1", "block1", "layer2")
    ]
    assert wide == sorted(wide) and wide[0] == 4 and wide[-1] > 16
