"""Weights in and out: runs, and pipelines of diffusers both ways, with the same pictures."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from test_model import SMALL, awake, random_unet

import checkpoint
import sources
from checkpoint import Loaded, Process
from measure import SampleConfig, sample
from model import NetConfig, build
from options import UserError
from samplers import Denoiser, ddpm, make_grid

OURS = NetConfig(widths="16,24", attention="1", n_group=4, d_head=8)


def loaded(sizes=OURS, **process) -> Loaded:
    """A random network and a process, as if read."""
    classes = tuple(map(str, range(sizes.n_class)))
    return Loaded(Path("nowhere"), awake(build(sizes)), sizes, Process(**process), classes)


PIPELINES = {
    "linear": {},
    "cosine, v": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    "zero-snr, x0": {"rescale_betas_zero_snr": True, "prediction_type": "sample"},
    "clipped narrowly": {"clip_sample_range": 0.5},
    "100 steps, large, no clipping": {
        "num_train_timesteps": 100,
        "beta_end": 0.1,
        "variance_type": "fixed_large",
        "clip_sample": False,
        "prediction_type": "v_prediction",
    },
}


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_of_diffusers_draw_the_same_pictures_here(name, tmp_path):
    """DDPMPipeline.save_pretrained, read by us: ancestral steps from the same noise and dice."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(timestep_spacing="trailing", **PIPELINES[name])
    unet = random_unet((16, 24), attended=(1,), sample_size=8)
    pipeline = diffusers.DDPMPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    ours = checkpoint.load(tmp_path)
    n_step = 20
    dice = torch.Generator().manual_seed(7)
    wanted = pipeline(2, dice, n_step, output_type="pt").images
    dice = torch.Generator().manual_seed(7)
    noise = torch.randn(2, 1, 8, 8, generator=dice)
    schedule = ours.process.make_schedule()
    predict = Denoiser(
        lambda x, times, _: ours.model(x, times), ours.process.target, clip=ours.clip
    )
    with torch.no_grad():
        x = steps_of_theirs(
            predict, noise, make_grid(schedule, n_step), dice, ours.process.variance
        )
    found = (x / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)  # 20 steps of a random network


def steps_of_theirs(predict, noise, grid, dice, variance):
    """`ddpm`, and the noise that diffusers adds after the last step where the grid ends above 0."""
    before_last = ddpm(predict, noise, type(grid)(*(part[:-1] for part in grid)), dice, variance)
    x0, _ = predict(before_last, grid.times[-2], grid.alpha[-2], grid.sigma[-2])
    last = torch.randn(noise.shape, generator=dice)
    extra = float(1 - grid.alpha[-2] ** 2) if variance == "large" else 0.0
    return x0 + extra**0.5 * last


def test_our_export_is_a_pipeline_of_diffusers(tmp_path):
    """Written by us, loaded and sampled by diffusers: the same pictures as by our own sampler."""
    diffusers = pytest.importorskip("diffusers")
    ours = loaded(schedule="cosine", target="v")
    checkpoint.export(ours, tmp_path / "out")
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    dice = torch.Generator().manual_seed(3)
    noise = torch.randn(4, 1, 8, 8, generator=dice)
    x = noise
    pipeline.scheduler.set_timesteps(10)
    with torch.no_grad():
        for time in pipeline.scheduler.timesteps:
            out = pipeline.unet(x, time).sample
            x = pipeline.scheduler.step(out, time, x, use_clipped_model_output=True).prev_sample
    config = SampleConfig(sampler="ddim", sample_steps=10, seed=3)
    torch.testing.assert_close(sample(ours, config, None, 4), x, rtol=0, atol=1e-4)


def test_export_of_one_class_answers_as_the_network_does_for_it(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    ours = loaded(SMALL)
    checkpoint.export(ours, tmp_path / "out", label=2)
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "out" / "unet")
    x, times = torch.randn(3, 1, 8, 8), torch.tensor([0.0, 400.0, 999.0])
    with torch.no_grad():
        wanted = ours.model(x, times, torch.full((3,), 2))
        torch.testing.assert_close(unet(x, times).sample, wanted, rtol=1e-5, atol=1e-5)
        back = checkpoint.load(tmp_path / "out")
        torch.testing.assert_close(back.model(x, times), wanted, rtol=1e-5, atol=1e-5)
    assert not back.sizes.n_class


def test_export_keeps_classes_without_a_label(tmp_path, capsys):
    diffusers = pytest.importorskip("diffusers")
    ours = loaded(SMALL)
    checkpoint.export(ours, tmp_path / "out")
    assert "gives no labels to its unet" in capsys.readouterr().err
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "out" / "unet")
    x, times, labels = torch.randn(3, 1, 8, 8), torch.zeros(3), torch.tensor([0, 2, 3])
    with torch.no_grad():
        found = unet(x, times, class_labels=labels).sample
        torch.testing.assert_close(found, ours.model(x, times, labels), rtol=1e-5, atol=1e-5)
    back = checkpoint.load(tmp_path / "out")
    assert back.sizes.n_class == 4 and back.null is None  # theirs do not say which is for any


def test_what_cannot_be_exported_is_refused(tmp_path):
    with pytest.raises(UserError, match="but no dit"):
        checkpoint.export(loaded(NetConfig(net="dit")), tmp_path / "a")
    with pytest.raises(UserError, match="knows no flow"):
        checkpoint.export(loaded(schedule="flow", target="flow"), tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.fixture
def folder(tmp_path):
    """An exported folder."""
    checkpoint.export(loaded(), tmp_path / "out")
    return tmp_path / "out"


UNET = "unet/config.json"
SCHEDULER = "scheduler/scheduler_config.json"


@pytest.mark.parametrize(("file", "changes", "complaint"), [
    (UNET, {"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel is not supported"),
    (UNET, {"act_fn": "gelu"}, "act_fn gelu is not supported"),
    (UNET, {"downsample_type": "resnet"}, "downsample_type resnet is not supported"),
    (UNET, {"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "must mirror"),
    (UNET, {"block_out_channels": [16]}, "must mirror"),
    (UNET, {"out_channels": 2}, "learned variances"),
    (UNET, {"block_out_channels": "many"}, "must mirror"),
    (UNET, {"sample_size": [8]}, "not enough values"),
    (UNET, {"norm_num_groups": 5}, "multiple of n_group"),
    (UNET, {"attention_head_dim": 10}, "attention 1"),
    (UNET, {"block_out_channels": [16, 48]}, "the configuration needs"),
    (SCHEDULER, {"_class_name": "PNDMScheduler"}, "PNDMScheduler is not supported"),
    (SCHEDULER, {"beta_schedule": "sigmoid"}, "beta_schedule sigmoid is not supported"),
    (SCHEDULER, {"trained_betas": [0.1]}, "trained_betas"),
    (SCHEDULER, {"variance_type": "learned"}, "variance_type learned is not supported"),
    (SCHEDULER, {"num_train_timesteps": 0}, "n_step must be at least 2"),
    (SCHEDULER, {"beta_start": 0.5}, "do not rise"),
    (SCHEDULER, {"rescale_betas_zero_snr": True}, "does not tell the data"),
    (UNET, {"freq_shift": 8}, "freq_shift 8 must be at least 0"),
])  # fmt: skip
def test_folders_that_are_not_ours_to_read_are_one_line(folder, file, changes, complaint):
    config = json.loads((folder / file).read_text(encoding="utf-8")) | changes
    (folder / file).write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=complaint):
        checkpoint.load(folder)


@pytest.mark.parametrize("damage", ["missing", "cut", "nan", "extra", "lacking"])
def test_damaged_weights_are_one_line(folder, damage):
    file = folder / "unet" / checkpoint.WEIGHTS
    state = safetensors.torch.load_file(file)
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:500])
    else:
        if damage == "nan":
            state["conv_in.bias"][0] = float("nan")
        elif damage == "extra":
            state["more"] = torch.zeros(1)
        else:
            del state["conv_in.bias"]
        safetensors.torch.save_file(state, file)
    words = {"missing": "is missing", "cut": "is damaged", "nan": "not finite",
             "extra": "have more", "lacking": "lack conv_in.bias"}  # fmt: skip
    with pytest.raises(UserError, match=words[damage]):
        checkpoint.load(folder)


def test_names_of_older_weights_are_known(folder):
    """query, key, value and proj_attn: attention before diffusers 0.15."""
    file = folder / "unet" / checkpoint.WEIGHTS
    state = safetensors.torch.load_file(file)
    old = {new: name for name, new in checkpoint.OLD_NAMES.items()}

    def older(name):
        for new, word in old.items():
            name = name.replace(new, word)
        return name

    safetensors.torch.save_file({older(name): x for name, x in state.items()}, file)
    assert "mid_block.attentions.0.query.weight" in safetensors.torch.load_file(file)
    again = checkpoint.load(folder).model.state_dict()
    assert all(torch.equal(again[name], x) for name, x in state.items())


def test_labels_by_name_and_number():
    network = loaded(SMALL)
    network.classes = ("cat", "dog", "1x")
    assert [checkpoint.label_number(word, network) for word in ("dog", "2")] == [1, 2]
    for word in ("3", "-1", "horse", "٢"):
        with pytest.raises(UserError, match="the network's classes are cat, dog"):
            checkpoint.label_number(word, network)


def test_data_that_do_not_fit_the_network_are_refused():
    with pytest.raises(UserError, match="the network wants"):
        loaded().rows("spiral")
    with pytest.raises(UserError, match="10 classes, the network has 3"):
        loaded(SMALL).rows("digits")
    with pytest.raises(UserError, match="does not say what it was trained on"):
        loaded().rows()
    assert loaded().rows("digits").shape == sources.load("digits").shape == (1, 8, 8)


@pytest.mark.parametrize("process", [
    Process("linear", 50, "v", 0.001, 0.05, "large", 0.0),
    Process("zero-snr", 100, "x0", clip=0.7),
    Process("cosine", target="eps", clip=2.0),
])  # fmt: skip
def test_processes_come_back_from_diffusers(process):
    """Ours in the words of their DDPMScheduler, and those read again."""
    assert checkpoint.our_process(checkpoint.their_process(process), "here") == process
