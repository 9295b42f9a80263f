"""Weights in and out: what a file is, names of torchvision and akamaster both ways, refusals."""

import contextlib
import dataclasses
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from harness import flip_a_bit
from torch import nn

import checkpoint
from checkpoint import Loaded, export, identify, load
from model import PRESETS, NetConfig, build
from options import UserError

TORCHVISION = [  # of resnet18, as documented there: stem, then per block, then fc
    "conv1.weight", "bn1", "layer1.0.conv1.weight", "layer1.0.bn1", "layer1.0.conv2.weight",
    "layer1.0.bn2", "layer1.1.conv1.weight", "layer1.1.bn1", "layer1.1.conv2.weight",
    "layer1.1.bn2", "layer2.0.conv1.weight", "layer2.0.bn1", "layer2.0.conv2.weight",
    "layer2.0.bn2", "layer2.0.downsample.0.weight", "layer2.0.downsample.1",
    "layer2.1.conv1.weight", "layer2.1.bn1", "layer2.1.conv2.weight", "layer2.1.bn2",
]  # fmt: skip
BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
AKAMASTER = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "cifar10"


def torchvision_names() -> set[str]:
    """All 122 keys of torchvision's resnet18: layer3 and layer4 repeat layer2."""
    later = [name for name in TORCHVISION if "layer2" in name]
    stems = TORCHVISION + [name.replace("layer2", f"layer{i}") for i in (3, 4) for name in later]
    names = {n for s in stems for n in ([s] if s.endswith("weight") else [f"{s}.{b}" for b in BN])}
    return names | {"fc.weight", "fc.bias"}


def random(config: NetConfig) -> nn.Module:
    """A network in which no two weights are the same by accident."""
    model = build(config).eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape) * 0.2 + 0.05)
    return model


def loaded(config: NetConfig) -> Loaded:
    classes = tuple(f"class {i}" for i in range(config.n_class))
    constants = ([0.5] * config.channels, [0.25] * config.channels)
    return Loaded(Path("x"), random(config), config, classes, *constants, ("shift",), "some data")


def same(a: nn.Module, b: nn.Module, config: NetConfig) -> None:
    x = torch.rand(2, config.channels, config.image_height, config.image_width)
    with torch.no_grad():
        torch.testing.assert_close(a.eval()(x), b.eval()(x), rtol=0, atol=0)


THIN = dataclasses.replace(PRESETS["resnet18-imagenet"], width=4, image_height=224, image_width=224)
VARIANTS = [
    THIN,
    dataclasses.replace(PRESETS["resnet20"], width=4),
    dataclasses.replace(PRESETS["resnet20"], width=4, depth=8, shortcut="B", n_class=7),
    dataclasses.replace(PRESETS["resnet18"], width=4),
]


def test_our_names_are_torchvisions():
    assert len(torchvision_names()) == 122
    assert set(build(PRESETS["resnet18-imagenet"]).state_dict()) == torchvision_names()


@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: f"{c.depth}{c.shortcut}{c.stem}")
def test_the_network_is_read_off_the_shapes(config):
    assert identify(random(config).state_dict(), Path("x")) == config


@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: f"{c.depth}{c.shortcut}{c.stem}")
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_file_of_somebody_elses(config, wrapped, tmp_path):
    """As akamaster saves it: in a dictionary, with module., linear and shortcut, without counts."""
    model = random(config)
    state = {
        f"module.{k}".replace("fc.", "linear.").replace("downsample", "shortcut"): v
        for k, v in model.state_dict().items()
        if not k.endswith("num_batches_tracked")
    }
    torch.save({"state_dict": state, "best_prec1": 91.7} if wrapped else state, tmp_path / "a.th")
    found = load(tmp_path / "a.th")
    same(found.model, model, config)
    assert (found.mean, found.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert found.classes == tuple(str(i) for i in range(config.n_class))


@pytest.mark.parametrize("config", [*VARIANTS, NetConfig(width=4)], ids=lambda c: c.net + c.stem)
def test_export_and_back(config, tmp_path):
    before = loaded(config)
    export(before, tmp_path)
    after = load(tmp_path)
    same(before.model, after.model, config)
    assert after.facts == before.facts
    state = torch.load(tmp_path / "weights.pth", weights_only=True)
    names = set(state)
    if config == THIN:
        assert names == torchvision_names()
    elif config.net == "resnet":
        assert {"linear.weight", "linear.bias"} < names
        assert not any("downsample" in name or name.startswith("fc") for name in names)
        assert any("shortcut.0" in name for name in names) == (config.shortcut == "B")


def test_a_file_beside_its_config_is_that_run(tmp_path):
    before = loaded(NetConfig(width=4, n_class=3))
    export(before, tmp_path)
    assert load(tmp_path / "weights.pth").facts == before.facts


@pytest.mark.skipif(not AKAMASTER.exists(), reason="the real weights are not part of the folder")
def test_real_weights_know_real_pictures():
    """akamaster's ResNet-20 on pictures that it was trained on: at least 99.5 %."""
    import data
    import train

    net = load(AKAMASTER / "resnet20-12fca82f.th")
    pictures = data.read(str(AKAMASTER / "first4000_train.npz")).train[:300]
    assert train.evaluate(net.model, pictures, net, torch.float32)["accuracy"] >= 0.995


# ── What it refuses ───────────────────────────────────────────────────────────────────────────────


class Bomb:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("as_torch", [True, False])
def test_code_in_a_pickle_does_not_run(tmp_path, as_torch):
    bomb, file = {"conv1.weight": Bomb(tmp_path / "marker")}, tmp_path / "bomb.pth"
    if as_torch:
        torch.save(bomb, file)
    else:
        file.write_bytes(pickle.dumps(bomb))
    with pytest.raises(UserError, match="damaged or holds more than tensors"):
        load(file)
    assert not (tmp_path / "marker").exists()
    pickle.loads(pickle.dumps(bomb))  # else this would show nothing
    assert (tmp_path / "marker").exists()


def edited(**changes) -> dict:
    return random(VARIANTS[1]).state_dict() | changes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "something else than named tensors"),
        ({}, "something else than named tensors"),
        ({"state_dict": {"a": "b"}}, "something else than named tensors"),
        ({"a": torch.ones(3).to_sparse()}, "something else than named tensors"),
        ({"a": torch.empty(3, device="meta")}, "something else than named tensors"),
        ({"features.0.weight": torch.ones(3)}, "is no ResNet: it lacks conv1, layer1 or fc"),
        (edited(**{"layer1.0.conv3.weight": torch.ones(1)}), "bottleneck blocks"),
        (edited(**{"layer1.3.conv1.weight": torch.ones(1)}), "stages of 4, 3, 3 blocks"),
        (edited(**{"bn1.weight": torch.ones(5)}), r"bn1.weight is \(5,\), .* needs \(4,\)"),
        (edited(**{"head.weight": torch.ones(5)}), "have head.weight, which the network does not"),
        (
            {k: v for k, v in edited().items() if k != "layer2.1.bn1.bias"},
            "lack layer2.1.bn1.bias",
        ),
        (random(dataclasses.replace(VARIANTS[1], channels=1)).state_dict(), "1 channels"),
    ],
)
def test_files_that_are_no_network(content, message, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_truncated_files(name, tmp_path):
    file = tmp_path / name
    state = random(VARIANTS[1]).state_dict()
    if name.endswith("pth"):
        torch.save(state, file)
    else:
        safetensors.torch.save_file(state, file)
    assert load(file).sizes == VARIANTS[1]
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UserError, match="damaged"):
        load(file)


def test_damaged_pickles_are_read_or_refused(tmp_path):
    """What torch raises for them has many names; a text file leads to an IndexError."""
    torch.save(random(VARIANTS[1]).state_dict(), tmp_path / "whole.pth")
    whole, dice = (tmp_path / "whole.pth").read_bytes(), np.random.default_rng(0)
    legacy = [b"root:x:0:0:root:/root:/bin/bash\n" * 9, b"\x80\x02", b"", pickle.dumps([1])]
    for start in dice.integers(len(whole), size=40):
        damaged = bytearray(whole)
        damaged[start : start + 8] = dice.integers(256, size=8, dtype=np.uint8).tobytes()
        legacy.append(bytes(damaged))
    for content in legacy:
        (tmp_path / "a.pth").write_bytes(content)
        with contextlib.suppress(UserError):
            assert load(tmp_path / "a.pth").sizes == VARIANTS[1]


def test_flipped_bit_in_a_pickle_is_refused(tmp_path):
    torch.save(random(VARIANTS[1]).state_dict(), tmp_path / "a.pth")
    flip_a_bit(tmp_path / "a.pth")
    with pytest.raises(UserError, match="damaged .* checksum"):
        load(tmp_path / "a.pth")


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        load(tmp_path / "none")
    with pytest.raises(UserError, match=r"has no config.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"].update(width=0), "width must be at least 1"),
        (lambda c: c["model"].update(hat=1), "hat"),
        (lambda c: c["model"].update(net="x"), "net must be one of fast, lenet, resnet"),
        (lambda c: c["data"].update(mean=[0.5]), "mean and std must be 3 numbers"),
        (lambda c: c["data"].update(std=[1, 0, 1]), "mean and std must be 3 numbers of 0 … 1, std"),
        (lambda c: c["data"].update(std=[1, -1, 1]), "mean and std must be 3 numbers of 0 … 1"),
        (lambda c: c["data"].update(mean=[1, 1, 255]), "mean and std must be 3 numbers of 0 … 1"),
        (lambda c: c["data"].update(mean=["0", "0", "0"]), "must be lists of numbers"),
        (lambda c: c["data"].update(mean="000"), "must be lists of numbers"),
        (lambda c: c["data"].update(std=[True] * 3), "must be lists of numbers"),
        (lambda c: c["data"].update(classes=[None] * 10), "must be a list of texts"),
        (lambda c: c["data"].update(classes="0123456789"), "must be a list of texts"),
        (lambda c: c.update(views={}), "views some of"),
        (lambda c: c["data"].update(classes=["a"]), "1 classes, the network has 10"),
        (lambda c: c.pop("data"), "'data'"),
        (lambda c: c["model"].update(width=8), r"needs \(8, 3, 3, 3\)"),
        (lambda c: c.update(int8=True), "has torch.int8"),
    ],
)
def test_a_config_that_does_not_fit(change, message, tmp_path):
    export(loaded(NetConfig(width=4)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", "\x00"])
def test_a_config_that_is_damaged(content, tmp_path):
    export(loaded(NetConfig(width=4)), tmp_path)
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="config.json"):
        load(tmp_path)


def test_export_to_a_file(tmp_path):
    (tmp_path / "there").touch()
    with pytest.raises(UserError, match="name a new folder"):
        export(loaded(NetConfig(width=4)), tmp_path / "there")
    with pytest.raises(UserError, match="name a new folder"):
        checkpoint.export_int8(
            loaded(NetConfig(width=4)), torch.rand(2, 3, 32, 32), tmp_path / "there"
        )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_files_with_a_nested_tensor(tmp_path):
    torch.save({"a": torch.nested.nested_tensor([torch.ones(3)])}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="something else than named tensors"):
        load(tmp_path / "a.pth")


@pytest.mark.filterwarnings("error")  # torch warns as it forgets imaginary parts
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.uint8, torch.bool])
def test_weights_in_another_kind_of_number(tmp_path, dtype):
    """Each could be made a float, of another network."""
    state = random(VARIANTS[1]).state_dict()
    state["conv1.weight"] = state["conv1.weight"].to(dtype)
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=f"conv1.weight holds {dtype}, the network has .*float32"):
        load(tmp_path / "a.safetensors")
    state["conv1.weight"] = random(VARIANTS[1]).conv1.weight.detach().half()
    state["bn1.num_batches_tracked"] = torch.tensor(3.5)
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="num_batches_tracked holds torch.float32"):
        load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite(tmp_path, value):
    model = build(PRESETS["resnet20"])
    with torch.no_grad():
        model.fc.weight[0, 0] = value
    torch.save(model.state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match="fc.weight holds numbers that are not finite"):
        load(tmp_path / "a.pth")
