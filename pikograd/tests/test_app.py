"""Data, training, resuming, the command line and the cost meter."""

import gzip
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch

import data
import nn
import pictures
import run
import tensor as pg
import train
from meter import CostMeter, gradient_cost, tape_bytes
from options import UserError
from transforms import checkpoint
from weights import load_tensors, save_tensors

HERE = Path(__file__).resolve().parent.parent


def command(*args, cwd=HERE):
    return subprocess.run(
        [sys.executable, str(cwd / "main.py"), *map(str, args)],
        capture_output=True, encoding="utf-8", cwd=cwd, timeout=120,
    )  # fmt: skip


# ── Data ──────────────────────────────────────────────────────────────────────────────────────────


def test_digits_are_split_once_for_all():
    images = data.load_images("")
    assert images.x.shape == (1438, 1, 8, 8) and images.x_test.shape == (359, 1, 8, 8)
    assert images.classes == 10 and set(np.bincount(images.y_test) > 20) == {True}
    assert images.x.mean() == pytest.approx(0, abs=1e-5) and images.x.std() == pytest.approx(1)
    both = np.concatenate([images.x, images.x_test]).reshape(1797, -1)
    assert len(np.unique(both, axis=0)) == 1797  # no image on both sides


def test_batches_are_permutations_of_an_epoch():
    images = data.load_images("")
    images.x = np.arange(1438)
    seen = np.concatenate([images.batch(i, 100, 3)[0] for i in range(14)])
    assert len(set(seen.tolist())) == 1400
    np.testing.assert_array_equal(images.batch(5, 100, 3)[0], images.batch(5, 100, 3)[0])
    assert not np.array_equal(images.batch(14, 100, 3)[0], images.batch(0, 100, 3)[0])
    assert not np.array_equal(images.batch(0, 100, 4)[0], images.batch(0, 100, 3)[0])


def test_text_targets_are_the_next_characters_and_held_out_is_whole():
    text = data.Text("", 64)
    x, y = text.batch(3, 5, seed=0)
    np.testing.assert_array_equal(x[:, 1:], y[:, :-1])
    rows = list(text.held_out())
    inputs, targets = (np.concatenate([r[i].ravel() for r in rows]) for i in (0, 1))
    used = targets != -100
    np.testing.assert_array_equal(targets[used], text.test[1:])
    np.testing.assert_array_equal(inputs[used], text.test[:-1])
    assert text.floor() == pytest.approx(0.2461, abs=1e-4)


def write_idx(path, array):
    raw = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(raw + array.tobytes()) if path.suffix == ".gz" else
                     raw + array.tobytes())  # fmt: skip


def idx_folder(tmp_path, zipped=""):
    rng = np.random.default_rng(0)
    for part, n in (("train", 40), ("t10k", 20)):
        images = rng.integers(0, 256, (n, 12, 10), dtype=np.uint8)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{zipped}", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{zipped}", np.arange(n, dtype=np.uint8) % 7)
    return tmp_path


@pytest.mark.parametrize("zipped", ["", ".gz"])
def test_idx_folders(tmp_path, zipped):
    images = data.load_images(idx_folder(tmp_path, zipped))
    assert images.x.shape == (40, 1, 12, 10)
    assert images.y_test.tolist()[:8] == [0, 1, 2, 3, 4, 5, 6, 0]
    assert images.classes == 7
    (tmp_path / f"t10k-images-idx3-ubyte{zipped}").write_bytes(b"\0\0\x08\x03\0\0")
    with pytest.raises(UserError, match="damaged"):
        data.load_images(tmp_path)
    damaged = bytearray(gzip.compress(bytes(range(256)) * 40))
    damaged[20:40] = b"\xff" * 20  # not only cut short: zlib complains in its own words
    (tmp_path / f"t10k-images-idx3-ubyte{zipped}").write_bytes(damaged)
    with pytest.raises(UserError, match="damaged"):
        data.load_images(tmp_path)
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{zipped}", np.zeros((20, 0, 10), np.uint8))
    with pytest.raises(UserError, match=r"\(20, 0, 10\)"):
        data.load_images(tmp_path)
    with pytest.raises(UserError, match="four MNIST idx files"):
        data.load_images(tmp_path / "nowhere")


PICTURES = [b"P2\n# grey\n3 2\n4\n0 1 2\n3 4 0\n", b"P5 3 2 4 " + bytes([0, 1, 2, 3, 4, 0])]


@pytest.mark.parametrize("raw", PICTURES)
def test_pgm(tmp_path, raw):
    (tmp_path / "x.pgm").write_bytes(raw)
    assert pictures.read_image(tmp_path / "x.pgm").tolist() == [[0, 0.25, 0.5], [0.75, 1, 0]]
    for broken in (raw[:-4], raw[:5], b"P3 1 1 1 0", b"", b"P5 x y z "):
        (tmp_path / "x.pgm").write_bytes(broken)
        with pytest.raises(UserError, match=r"x\.pgm"):
            pictures.read_image(tmp_path / "x.pgm")


def test_moons_lie_where_they_should():
    x, y = data.moons(200, noise=0.0)
    upper, lower = x[y > 0], x[y < 0]
    np.testing.assert_allclose(np.hypot(*upper.T), 1.0)
    np.testing.assert_allclose(np.hypot(lower[:, 0] - 1, lower[:, 1] - 0.5), 1.0)
    assert upper[:, 1].min() > -1e-9 and lower[:, 1].max() < 0.5 + 1e-9


# ── Training ──────────────────────────────────────────────────────────────────────────────────────


def config(tmp_path, model, steps=20, **options):
    options = {"batch_size": 8, **options}
    return train.TrainConfig(model=model, out=str(tmp_path / "run"), steps=steps, **options)


def short_text(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text(data.TEXT.read_text(encoding="utf-8")[:2000], encoding="utf-8")
    return path


@pytest.mark.parametrize("model", train.MODELS)
def test_kill_and_resume_is_bit_identical(tmp_path, model, monkeypatch):
    """20 steps in one go, and 20 steps with a kill in step 13 (last checkpoint: 12)."""
    options = {"data": str(short_text(tmp_path))} if model == "gpt" else {}
    whole, halves = (config(tmp_path / x, model, **options) for x in "ab")
    train.train(whole)
    task = train.TASKS[model]
    step = task.step

    def dies(self, number):
        if number == 13:
            raise MemoryError
        return step(self, number)

    monkeypatch.setattr(task, "step", dies)
    with pytest.raises(MemoryError):
        train.train(halves)
    monkeypatch.setattr(task, "step", step)
    pg.manual_seed(999)  # a new process has another state
    train.train(halves, resume=True)
    for name in ("model.safetensors", "checkpoint.safetensors"):
        assert (tmp_path / "a" / "run" / name).read_bytes() == (
            tmp_path / "b" / "run" / name
        ).read_bytes()
    a, b = (run.RunDirectory(tmp_path / x / "run").history() for x in "ab")
    assert [(line["step"], line["loss"]) for line in a] == [(li["step"], li["loss"]) for li in b]


def test_first_loss_is_ln_classes(tmp_path):
    for model, classes in (("cnn", 10), ("mlp", 10), ("gpt", 27)):
        log = train.train(config(tmp_path / model, model, steps=1, batch_size=64))
        assert log[0]["loss"] == pytest.approx(np.log(classes), rel=0.1)


def test_a_short_training_learns(tmp_path):
    log = train.train(config(tmp_path, "cnn", steps=60, batch_size=64, lr=4e-3))
    assert log[-1]["accuracy"] > 0.85


def test_weights_open_in_torch_under_torchs_names(tmp_path):
    train.train(config(tmp_path, "mlp", steps=1))
    home = tmp_path / "run"
    state = safetensors.torch.load_file(home / "model.safetensors")
    assert {k: tuple(v.shape) for k, v in state.items()} == {
        "1.weight": (256, 64), "1.bias": (256,), "4.weight": (128, 256), "4.bias": (128,),
        "7.weight": (10, 128), "7.bias": (10,),
    }  # fmt: skip
    safetensors.torch.save_file(state, home / "model.safetensors")
    assert train.load_run(home)[0].evaluate()["images"] == 359


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    words = r"loss is nan at step \d+: try --lr"
    with np.errstate(all="ignore"), pytest.raises(UserError, match=words):
        train.train(config(tmp_path, "mlp", steps=30, lr=1e30))


def test_shipped_weights_keep_the_promises_of_the_readme():
    for model in train.MODELS:
        task, c = train.load_run(HERE / "pretrained" / model)
        assert train.verdict(c, task.evaluate()).startswith("on track")


def test_float64_is_float64(tmp_path):
    train.train(config(tmp_path, "cnn", steps=2, dtype="float64"))
    arrays, _ = load_tensors(tmp_path / "run" / "checkpoint.safetensors")
    assert {a.dtype for a in arrays.values()} == {np.dtype("f8"), np.dtype("i8")}


# ── Cost ──────────────────────────────────────────────────────────────────────────────────────────


def test_operations_of_a_linear_layer_by_hand():
    """x (4, 3), W (5, 3), b (5): forward 2·4·5·3 + 4·5 = 140; loss 20 products and 20 additions."""
    layer, x = nn.Linear(3, 5), pg.randn(4, 3)
    forward, backward = gradient_cost(lambda: (layer(x) * 2.0).sum())
    assert forward == 140 + 20 + 20
    # back: 20 products by 2; W: 2·5·3·4 = 120; b: 20 additions; x wants no gradient
    assert backward == 20 + 120 + 20


NETS = {
    "mlp": lambda: (nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5)), (8, 20)),
    "cnn": lambda: (nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm(4), nn.ReLU(), nn.MaxPool2d(2),
                                  nn.Flatten(), nn.Linear(36, 5)), (8, 2, 8, 8)),
    "attention": lambda: (nn.Sequential(nn.LayerNorm(16), nn.MultiHeadAttention(16, 2), nn.GELU(),
                                        nn.Flatten(), nn.Linear(64, 5)), (8, 4, 16)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_cheap_gradient(name):
    """Function and gradient together cost at most 5 × the function, the input's slopes included."""
    net, shape = NETS[name]()
    x = pg.randn(*shape, requires_grad=True)
    forward, backward = gradient_cost(lambda: nn.cross_entropy(net(x), np.arange(8) % 5))
    assert 2 * forward < forward + backward < 5 * forward


def test_tape_bytes_and_what_checkpoint_saves():
    """One exp of 1,000 float32 keeps its result: 4,000 bytes; a view of it is no second block."""
    x = pg.randn(1000, requires_grad=True)
    assert tape_bytes(x.exp()) == 4000
    assert tape_bytes(x.exp().reshape(10, 100).square()) == 4000
    blocks = [nn.Sequential(nn.Linear(50, 50), nn.GELU()) for _ in range(8)]

    def peak(wrap):
        meter, h = CostMeter(memory=True), pg.randn(400, 50)
        with meter.measure():
            for block in blocks:
                h = wrap(block, h)
            h.sum().backward()
        return max(live for _, live in meter.live), meter.flops

    (kept, flops), (saved, more) = peak(lambda f, x: f(x)), peak(checkpoint)
    assert saved < 0.75 * kept and flops < more < 1.5 * flops


# ── Command line ──────────────────────────────────────────────────────────────────────────────────


def test_help_and_a_whole_user_story(tmp_path):
    shown = command()
    assert shown.returncode == 0 and "--classify" in shown.stdout and not shown.stderr
    out = tmp_path / "run"
    trained = command("--train", "--steps", 2, "--batch-size", 8, "--out", out)
    assert trained.returncode == 0, trained.stderr
    assert not trained.stdout and "promises nothing" in trained.stderr
    assert {f.name for f in out.iterdir()} == {
        "config.json", "log.jsonl", "model.safetensors", "checkpoint.safetensors"
    }  # fmt: skip
    scored = command("--eval", "--weights", out)
    assert json.loads(scored.stdout.splitlines()[-1])["images"] == 359
    again = command("--train", "--resume", "--out", out, "--steps", 4)
    assert again.returncode == 0 and "step     4" in again.stderr
    assert command("--export", tmp_path / "e", "--weights", out).returncode == 0
    assert (tmp_path / "e" / "model.safetensors").exists()


def test_shipped_models_speak_before_any_training(tmp_path):
    home = tmp_path / "alone"
    shutil.copytree(HERE, home, ignore=shutil.ignore_patterns("runs", "__pycache__", ".*"))
    assert "the net says" in command("--sample", cwd=home).stdout
    moons = command("--sample", "--model", "moons", cwd=home).stdout
    assert "#" in moons and "·" in moons
    text = command("--sample", "--model", "gpt", "--prompt", "one and ", cwd=home).stdout
    assert text.startswith("one and ") and len(text) > 250
    assert text == command("--sample", "--model", "gpt", "--prompt", "one and ", cwd=home).stdout
    images = data.load_images("")
    picture = images.x_test[0, 0] * images.std + images.mean
    for name, value in (("raw.npy", picture.round().astype(np.uint8)), ("unit.npy", picture / 16)):
        np.save(home / name, value)
        said = command("--classify", home / name, cwd=home).stdout
        assert f"the net says {images.y_test[0]} (" in said
    trained = command("--train", "--steps", 2, cwd=home)
    assert trained.returncode == 0 and (home / "runs" / "default" / "model.safetensors").exists()


BAD = {
    "unknown flag": (["--trian"], "--trian"),
    "unknown model": (["--train", "--model", "rnn"], "rnn"),
    "not a number": (["--train", "--steps", "many"], "many"),
    "zero steps": (["--train", "--steps", "0"], "steps"),
    "negative lr": (["--train", "--lr", "-1"], "lr"),
    "NaN lr": (["--train", "--lr", "nan"], "lr"),
    "dropout 1": (["--train", "--dropout", "1"], "dropout"),
    "cuda": (["--train", "--device", "cuda"], "cuda"),
    "no such folder": (["--train", "--data", "/nowhere"], "/nowhere"),
    "no such text": (["--train", "--model", "gpt", "--data", "/nowhere.txt"], "/nowhere.txt"),
    "data for moons": (["--train", "--model", "moons", "--data", "x"], "leave it out"),
    "nothing to resume": (["--train", "--resume", "--out", "/tmp/pikograd-nowhere"], "resume"),
    "resume alone": (["--resume"], "--train"),
    "unwritable out": (["--train", "--steps", "1", "--out", "/dev/null/x"], "/dev/null"),
    "no such weights": (["--eval", "--weights", "/nowhere"], "/nowhere"),
    "no such picture": (["--classify", "/nowhere.pgm"], "/nowhere.pgm"),
    "strange prompt": (["--sample", "--model", "gpt", "--prompt", "Ω"], "Ω"),
    "empty out": (["--train", "--out="], "--out"),
    "export over something": (["--export", str(HERE / "data")], "there is something in it"),
    "more memory than there is": (
        ["--train", "--model", "gpt", "--batch-size", "900000000", "--out", "/tmp/pikograd-none"],
        "memory",
    ),
    "seed of a sample": (["--sample", "--seed", "-1"], "seed"),
    "temperature": (["--sample", "--model", "gpt", "--temperature", "0"], "temperature"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_2(name):
    args, word = BAD[name]
    result = command(*args)
    lines = result.stderr.splitlines()
    assert result.returncode == 2 and not result.stdout
    assert lines[-1].startswith("error: ") and word in lines[-1]
    assert "Traceback" not in result.stderr


def tiny_images(folder):
    for part in ("train", "t10k"):
        write_idx(folder / f"{part}-images-idx3-ubyte", np.zeros((8, 2, 2), np.uint8))
        write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(8, dtype=np.uint8))
    return folder


def test_bad_files_are_one_line_and_exit_2(tmp_path):
    (tmp_path / "short.txt").write_text("abc", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes(b"\xe9\xff" * 2000)
    np.save(tmp_path / "nan.npy", np.full((8, 8), np.nan))
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    for args, word in (
        (["--train", "--model", "gpt", "--data", tmp_path / "short.txt"], "3 characters"),
        (["--train", "--model", "gpt", "--data", tmp_path / "latin.txt"], "UTF-8"),
        (["--train", "--data", tiny_images(tmp_path)], "(2, 2) is too small"),
        (["--classify", tmp_path / "nan.npy"], "NaN"),
        (["--classify", tmp_path / "pickle.npy"], "pickle.npy"),
        (["--classify", HERE / "README.md"], "README.md"),
    ):
        result = command(*args)
        assert result.returncode == 2 and word in result.stderr.splitlines()[-1], result.stderr


@pytest.mark.parametrize("damage", ["truncated", "garbage", "huge header", "other net", "pickle",
                                    "config", "no config", "wrong kind"])  # fmt: skip
def test_damaged_weights_are_refused(tmp_path, damage):
    home = tmp_path / "run"
    shutil.copytree(HERE / "pretrained" / "cnn", home)
    file, settings = home / "model.safetensors", home / "config.json"
    raw = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(raw[: len(raw) // 2])
    elif damage in ("garbage", "pickle"):
        file.write_bytes(b"\x80\x04cos\nsystem\n" if damage == "pickle" else b"garbage")
    elif damage == "huge header":
        file.write_bytes(struct.pack("<Q", 2**62) + raw[8:])
    elif damage == "other net":
        shutil.copy(HERE / "pretrained" / "mlp" / "model.safetensors", file)
    elif damage == "no config":
        settings.unlink()
    else:
        text = settings.read_text(encoding="utf-8")
        broken = text[:50] if damage == "config" else text.replace('"kind": "cnn"', '"kind": "x"')
        settings.write_text(broken, encoding="utf-8")
    result = command("--eval", "--weights", home)
    assert result.returncode == 2 and result.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("damage", [
    lambda arrays, meta: meta.update(rng="[1]"),
    lambda arrays, meta: meta.update(step="-5"),
    lambda arrays, meta: arrays.update({"optimizer.group9.lr": np.zeros(1)}),
    lambda arrays, meta: arrays.pop("optimizer.0.mean"),
])  # fmt: skip
def test_checkpoints_that_do_not_fit_are_refused(tmp_path, damage):
    c = config(tmp_path, "mlp", steps=1)
    train.train(c)
    file = tmp_path / "run" / "checkpoint.safetensors"
    arrays, metadata = load_tensors(file)
    damage(arrays, metadata)
    save_tensors(file, arrays, metadata)
    with pytest.raises(UserError, match="does not fit this run"):
        train.train(c, resume=True)


@pytest.mark.parametrize("field", ["model", "batch_size", "dtype"])
def test_configs_that_make_no_sense_are_refused(tmp_path, field):
    shutil.copytree(HERE / "pretrained" / "mlp", tmp_path / "run")
    settings = run.read_json(tmp_path / "run" / "config.json")
    settings["train"][field] = {"model": "rnn", "batch_size": 0.5, "dtype": "float16"}[field]
    run.write_json(tmp_path / "run" / "config.json", settings)
    with pytest.raises(UserError, match=field):
        train.load_run(tmp_path / "run")


def test_junk_in_the_log_is_dropped_and_a_write_that_fails_is_named(tmp_path):
    home = run.RunDirectory(tmp_path)
    first, fifth = ({"step": step, "split": "train"} for step in (1, 5))
    lines = (json.dumps(first).encode(), b"[]", b'{"a": 1}', b"\xff", json.dumps(fifth).encode())
    home.log_file.write_bytes(b"\n".join(lines) + b'\n{"st')
    assert home.history() == [first, fifth]
    home.truncate_log(3)
    assert home.history() == [first]
    with pytest.raises(UserError, match=r"cannot write .*gone.x\.json"):
        run.write_json(tmp_path / "gone" / "x.json", {})


def test_what_follows_training_is_about_that_run(tmp_path):
    done = command("--train", "--eval", "--model", "mlp", "--steps", 1, "--out", tmp_path / "x")
    assert json.loads(done.stdout.splitlines()[-1])["weights"] == str(tmp_path / "x")


@pytest.mark.parametrize("temperature", ["1e-300", "inf"])
def test_extreme_temperatures(temperature):
    said = command("--sample", "--model", "gpt", "--temperature", temperature)
    assert said.returncode == 0 and len(said.stdout) > 250


def test_safetensors_round_trip_with_the_reference(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(7)}
    arrays["c"] = np.ones((0, 2))
    save_tensors(tmp_path / "x.safetensors", arrays, {"note": "ü"})
    theirs = safetensors.torch.load_file(tmp_path / "x.safetensors")
    ours, metadata = load_tensors(tmp_path / "x.safetensors")
    assert metadata == {"note": "ü"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(theirs[name].numpy(), array)
        np.testing.assert_array_equal(ours[name], array)


def test_figures_svg_is_well_formed_and_shows_values_and_gradients():
    import xml.dom.minidom

    from figures import graph_svg, neuron

    text = graph_svg(neuron())
    assert xml.dom.minidom.parseString(text).documentElement.tagName == "svg"
    assert "value 0.7071" in text and "gradient -1.5000" in text


def test_selfcheck_passes():
    result = command("--selfcheck")
    assert result.returncode == 0 and result.stdout.count("ok ") == 3
