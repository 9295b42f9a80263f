"""Networks: sizes, shapes, batches, and the first loss."""

import dataclasses
import math

import pytest
import torch
from torch import nn

import data
import train
import vae
from model import PRESETS, VAE, VaeConfig, begin_at_mean, build, macs, with_data

NETS = {
    "mlp": VaeConfig(latent=3, width=8),
    "conv": VaeConfig(latent=3, net="conv", width=8),
    "tanh": VaeConfig(latent=2, width=5, depth=1, activation="tanh"),
    "logistic": VaeConfig(latent=3, width=8, likelihood="logistic"),
    "gaussian": VaeConfig(latent=3, net="conv", width=8, likelihood="gaussian"),
    "codes": VaeConfig(latent=3, net="conv", width=8, n_code=5),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 8, 8), (3, 13, 7), (1, 1, 5)])
def test_pictures_of_any_size(name, shape):
    """AntixK's networks want 3 channels of 64 × 64."""
    sizes = with_data(NETS[name], shape)
    model, x = build(sizes), torch.rand(4, *shape).round()
    found = model(x, torch.randn(4, 2, sizes.latent))
    assert found[0].shape == (4, 1 if sizes.n_code else 2) and found[0].isfinite().all()
    z = found[2] if sizes.n_code else found[3][:, 0]
    picture = model.picture(z)
    assert picture.shape == (4, *shape) and 0 <= picture.min() <= picture.max() <= 1


@pytest.mark.parametrize("name", NETS)
def test_two_networks_from_one_config_are_alike(name):
    """AntixK reverses the caller's list of widths in place: the second network is another one."""
    a, b = build(NETS[name]), build(NETS[name])
    assert {k: v.shape for k, v in a.state_dict().items()} == {
        k: v.shape for k, v in b.state_dict().items()
    }
    b.load_state_dict(a.state_dict())


@pytest.mark.parametrize("name", NETS)
def test_a_picture_scores_the_same_alone_and_in_a_batch(name):
    """In float64: the loss of a picture is its own, whatever else is in the batch."""
    sizes = NETS[name]
    model = build(sizes).double().eval()
    x, eps = torch.rand(6, 1, 8, 8).round().double(), torch.randn(6, 2, sizes.latent).double()
    together = model(x, eps)
    for i in range(6):
        alone = model(x[i : i + 1], eps[i : i + 1])
        for a, b in zip(together, alone, strict=True):
            assert a.dtype == b.dtype and a.dtype != torch.float32
            torch.testing.assert_close(a[i : i + 1], b)


def test_encoder_and_decoder_of_the_mlp_are_what_they_say():
    """One hidden layer by hand."""
    model = build(NETS["tanh"])
    x = torch.rand(2, 1, 8, 8)
    w1, b1 = model.encoder.hidden[0].weight, model.encoder.hidden[0].bias
    head = model.encoder.head
    hidden = torch.tanh(x.flatten(1) @ w1.T + b1)
    mu, logvar = (hidden @ head.weight.T + head.bias).split(2, dim=1)
    torch.testing.assert_close(model.encode(x), (mu, logvar))


def test_squares_of_pixels_go_where_they_came_from():
    """What the decoder puts into a place of the grid lands on that place's square."""
    sizes = VaeConfig(net="conv", width=4, patch=4, latent=2, image_height=10, image_width=9)
    model = build(sizes)
    nn.init.zeros_(model.decoder.out.weight)
    model.decoder.out.bias.data = torch.arange(16.0)
    picture = model.decoder(torch.zeros(1, 2))[0, 0]
    square = torch.arange(16.0).view(4, 4)
    assert picture.shape == (10, 9)
    torch.testing.assert_close(picture[:4, :4], square)
    torch.testing.assert_close(picture[4:8, 4:8], square)
    torch.testing.assert_close(picture[8:, 8], square[:2, 0])


@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_the_first_reconstruction_is_that_of_the_mean_picture(net):
    """Nothing is learned yet: each pixel a coin with the odds of the data."""
    dataset = data.load("digits")
    sizes = VaeConfig(net=net, width=16)
    model = train.network(sizes, dataset, None)
    score = train.evaluate(model, dataset.test.images, sizes)
    coin = data.alone(dataset.mean, dataset.test.images)
    if net == "mlp":  # within the noise of binarising
        assert score["reconstruction"] == pytest.approx(coin, abs=0.3)
    else:  # one mean for each pixel of a square, the same in all squares
        assert coin < score["reconstruction"] < 64 * math.log(2) + 1
    assert score["kl"] < 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["gaussian", "logistic"])
def test_grey_and_colour_pictures_get_the_nats_of_bytes(kind, channels):
    """A decoder that knows nothing cannot beat 8 bits a byte of even noise, ln 256 nats."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (50, channels, 6, 6), dtype=torch.uint8)
    sizes = with_data(VaeConfig(latent=2, width=4, likelihood=kind), (channels, 6, 6))
    model = build(sizes)
    begin_at_mean(model.decoder, torch.full((channels, 6, 6), 0.5), sizes)
    best = math.inf
    for log_scale in torch.linspace(-3, 2, 30):
        model.pixels.log_scale.data.fill_(log_scale)
        best = min(best, train.evaluate(model, images, sizes)["reconstruction"])
    even = channels * 36 * math.log(256)
    assert even - 1 < best < even * 1.1


def test_multiply_adds_are_counted():
    """64 · 128 + 128 · 128 + 128 · 32 to encode, 16 · 128 + 128 · 128 + 128 · 64 to decode."""
    model, x = build(PRESETS["digits"]), torch.zeros(1, 1, 8, 8)
    assert macs(model.encoder, x) == 64 * 128 + 128 * 128 + 128 * 32
    assert macs(model.decoder, torch.zeros(1, 16)) == 16 * 128 + 128 * 128 + 128 * 64
    both = macs(model.encoder, x) + 5 * macs(model.decoder, torch.zeros(1, 16))
    assert train.macs_of_picture(model, PRESETS["digits"], 5) == both  # encoded once, however many
    sizes = VaeConfig(net="conv", width=4, depth=1, latent=2)
    conv = build(sizes)  # 4 pixels of a square to 4 channels, 3 × 3, at 16 places
    assert macs(conv.encoder, x) == 16 * 9 * 4 * 4 + 64 * 4
    assert macs(conv.decoder, torch.zeros(1, 2)) == 2 * 64 + 16 * 9 * 4 * 4


@pytest.mark.parametrize(
    "wrong",
    [{"latent": 0}, {"width": 10**6}, {"n_code": 1}, {"n_code": 4}, {"net": "conv", "patch": 9}],
    ids=str,
)
def test_sizes_that_make_no_network(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).replace("net", "patch")):
        VaeConfig(**wrong)


def test_free_dice_make_free_draws():
    """The same eps, the same z; eps 0 is the mean."""
    model = build(NETS["mlp"])
    x = torch.rand(2, 1, 8, 8).round()
    _, mu, _, z = model(x, torch.zeros(2, 1, 3))
    torch.testing.assert_close(z[:, 0], mu)
    assert isinstance(model, VAE)
    sizes = dataclasses.replace(NETS["mlp"], latent=4)
    assert vae.active_units(build(sizes).encode(x)[0]).shape == (4,)
