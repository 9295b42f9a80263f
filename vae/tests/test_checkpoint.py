"""Weights in and out: pytorch/examples' VAE both ways, and files that are none."""

import pytest
import torch

import checkpoint
import train
import vae
from bench import Example, example_loss
from model import VaeConfig, build
from options import UserError
from run import write_json


def example_file(folder, n_pixel=784, width=400, latent=20):
    net = Example(n_pixel, width, latent)
    torch.save(net.state_dict(), folder / "vae.pth")
    return net, folder / "vae.pth"


@pytest.mark.parametrize("sizes", [(784, 400, 20), (64, 7, 3), (30, 5, 2)], ids=str)
def test_a_file_of_the_example_gives_the_same_elbo(tmp_path, monkeypatch, sizes):
    """Their loss with their formula and our bound with ours, with the same dice: any widths."""
    net, file = example_file(tmp_path, *sizes)
    loaded = checkpoint.load(file)
    x, eps = torch.rand(5, *loaded.sizes.shape), torch.randn(5, sizes[2])
    monkeypatch.setattr(torch, "randn_like", lambda _: eps)
    found, mu, logvar = net(x)
    theirs = example_loss(found, x, mu, logvar)
    log_px, mu_ours, logvar_ours, _ = loaded.model(x, eps[:, None])
    ours = -vae.elbo(log_px, vae.kl_closed(mu_ours, logvar_ours)).sum()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close((mu_ours, logvar_ours), (mu, logvar), rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_the_example_too(tmp_path, monkeypatch):
    net, file = example_file(tmp_path, 64, 9, 3)
    loaded, eps = checkpoint.load(file), torch.randn(5, 3)
    x = torch.rand(5, 1, 8, 8).round()
    monkeypatch.setattr(torch, "randn_like", lambda _: eps)
    found, mu, logvar = net(x)
    example_loss(found, x, mu, logvar).backward()
    log_px, mu, logvar, _ = loaded.model(x, eps[:, None])
    (-vae.elbo(log_px, vae.kl_closed(mu, logvar)).sum()).backward()
    head = loaded.model.encoder.head.weight.grad
    torch.testing.assert_close(head, torch.cat([net.fc21.weight.grad, net.fc22.weight.grad]))
    torch.testing.assert_close(loaded.model.decoder.out.weight.grad, net.fc4.weight.grad)


def test_export_writes_the_file_of_the_example(command, trained, tmp_path):
    out = trained("run", "--depth", 1, "--activation", "relu")
    outcome = command("--weights", out, "--export", tmp_path / "there")
    assert outcome.code == 0 and "pytorch/examples" in outcome.err
    state = torch.load(tmp_path / "there" / "weights.pth", weights_only=True)
    net = Example(48, 8, 3)
    net.load_state_dict(state)  # strict: every name and shape
    model = checkpoint.load(out).model
    x = torch.rand(4, 1, 8, 6)
    mu, logvar = model.encode(x)
    torch.testing.assert_close(net(x)[1:], (mu, logvar))
    picture = torch.sigmoid(net.fc4(torch.relu(net.fc3(mu)))).view(4, 1, 8, 6)
    torch.testing.assert_close(picture, model.picture(mu))
    again = checkpoint.load(tmp_path / "there")
    torch.testing.assert_close(again.model.encode(x), (mu, logvar))


@pytest.mark.parametrize(
    "more", [[], ["--net", "conv"], ["--net", "conv", "--n-code", "4"]], ids=str
)
def test_export_of_other_networks_has_our_names_and_loads(command, trained, tmp_path, more):
    out = trained("run", *more)
    outcome = command("--weights", out, "--export", tmp_path / "there")
    assert outcome.code == 0 and "this folder" in outcome.err
    a, b = (checkpoint.load(path).model.state_dict() for path in (out, tmp_path / "there"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_round_trip_of_a_run(trained):
    out = trained("run")
    loaded = checkpoint.load(out)
    assert loaded.sizes == VaeConfig(latent=3, width=8, image_height=8, image_width=6)
    score = train.test(loaded.model, loaded.dataset().test.images, loaded.sizes, 4)
    assert score["pictures"] == 9 and str(loaded.source).endswith("bars.npz")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_names_behind_data_parallel_are_understood(tmp_path, prefix):
    state = {prefix + name: tensor for name, tensor in Example(64, 5, 2).state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "vae.pth")
    assert checkpoint.load(tmp_path / "vae.pth").sizes.width == 5


def spoilt(state: dict) -> dict[str, tuple[dict, str]]:
    """Files of the example that are wrong, and what is said of them."""
    nan = state["fc3.bias"].clone()
    nan[0] = torch.nan
    return {
        "a layer is missing": ({k: v for k, v in state.items() if k != "fc3.bias"}, "lack fc3"),
        "a head is missing": ({k: v for k, v in state.items() if k != "fc22.bias"}, "lack fc22"),
        "heads differ": (state | {"fc22.weight": torch.zeros(3, 5)}, "do not fit together"),
        "a layer is misshapen": (state | {"fc4.bias": torch.zeros(3)}, "decoder.out.bias is (3,)"),
        "not finite": (state | {"fc3.bias": nan}, "not finite"),
        "one more": (state | {"fc5.bias": nan}, "have fc5.bias"),
        "something else": ({"x": torch.zeros(2)}, "no VAE of pytorch/examples"),
    }


def test_spoilt_files_are_one_line(tmp_path):
    net, file = example_file(tmp_path, 64, 5, 2)
    for name, (state, message) in spoilt(net.state_dict()).items():
        torch.save(state, file)
        with pytest.raises(UserError) as refused:
            checkpoint.load(file)
        assert message in str(refused.value), name


def test_truncated_and_hostile_files_are_one_line(tmp_path):
    _, file = example_file(tmp_path, 64, 5, 2)
    good = file.read_bytes()
    for bad in (b"", good[:100], good[:-7], b"\x80\x04cos\nsystem\n(S'true'\ntR."):
        file.write_bytes(bad)
        with pytest.raises(UserError):
            checkpoint.load(file)


def test_config_of_a_run_that_is_wrong_about_the_data(trained):
    out = trained("run")
    config = checkpoint.read_json(out / "config.json")
    for wrong in ({"data": 7}, {"seed": -1}, {"image_size": "8"}):
        write_json(out / "config.json", config | {"train": config["train"] | wrong})
        with pytest.raises(UserError):
            checkpoint.load(out)


def test_weights_for_other_pictures_are_refused(command, trained):
    out = trained("run")
    said = command("--eval", "--weights", out, "--data", "digits").complaint
    assert "pictures of (1, 8, 8)" in said and "wants (1, 8, 6)" in said


def test_eval_of_a_file_without_data_asks_for_some(command, tmp_path):
    _, file = example_file(tmp_path, 64, 5, 2)
    assert "name some with --data" in command("--eval", "--weights", file).complaint
    outcome = command("--eval", "--weights", file, "--data", "digits", "--importance", 5)
    assert outcome.code == 0 and '"nll"' in outcome.out.splitlines()[-1]


def test_build_is_the_same_network_as_loaded(tmp_path):
    sizes = checkpoint.load(example_file(tmp_path)[1]).sizes
    assert sum(p.numel() for p in build(sizes).parameters()) == 652_824
    assert checkpoint.is_example(sizes)
