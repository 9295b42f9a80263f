"""Weights in and out: runs of our own, and the folders of the library diffusers, both ways.

    run directory       config.json, model.safetensors
    diffusers' folder   model_index.json, unet/config.json with its weights, and
                        scheduler/scheduler_config.json: a DDPMPipeline, or the unet alone

Our U-Net has diffusers' names, so the weights need no translation; the sizes do.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

import diffusion
import sources
from diffusion import Schedule
from loop import save_tensors
from model import NetConfig, build
from options import UserError, check, make_config, option, say
from run import RunDirectory, place_to_export, read_json, refuse_endless, write_json

WEIGHTS = "diffusion_pytorch_model.safetensors"
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
THEIR_TARGETS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


@dataclass(frozen=True)
class Process:
    """What a network was taught.

    clip: samples are held within ±clip at each step; 0 for rows without bounds.
    """

    schedule: str = option("linear", "", diffusion.SCHEDULES)
    n_step: int = option(1000, "", least=2, most=100_000)
    target: str = option("eps", "", diffusion.TARGETS)
    first: float = option(1e-4, "", above=0, below=1)
    last: float = option(0.02, "", above=0, below=1)
    variance: str = option("small", "", ("small", "large"))
    clip: float = option(1.0, "", least=0)

    def __post_init__(self):
        check(self)
        if self.first > self.last:
            raise ValueError(f"betas from {self.first} to {self.last} do not rise")
        if self.schedule == "zero-snr" and self.target == "eps":
            raise ValueError("the noise of a schedule that ends at noise alone (zero-snr) does not "
                             "tell the data")  # fmt: skip

    def make_schedule(self) -> Schedule:
        return Schedule(self.schedule, self.n_step, self.first, self.last)


@dataclass
class Loaded:
    """A network ready to use, and what it must know about its rows."""

    path: Path
    model: nn.Module
    sizes: NetConfig
    process: Process
    classes: tuple[str, ...] = ()
    source: str | None = None  # the training data
    seed: int = 0  # of its validation part
    image_size: int = 0
    is_pictures: bool = True

    @property
    def null(self) -> int | None:
        """The label that means any class, where there is one."""
        return self.sizes.n_class if self.sizes.n_class and self.sizes.null_label else None

    @property
    def clip(self) -> float:
        return self.process.clip if self.is_pictures else 0.0

    def rows(self, name: str | None = None, image_size: int = 0) -> sources.Source:
        """The data `name`, else those that it was trained on. UserError if nobody says."""
        if not (name or self.source):
            raise UserError(f"{self.path} does not say what it was trained on: name it by --data")
        folder = self.path if self.path.is_dir() else self.path.parent
        size = image_size or (0 if name in sources.INSIDE else self.image_size)
        found = sources.load(name or self.source, self.seed, size, folder / "pictures.npz")
        if found.shape != self.sizes.shape:
            raise UserError(f"--data {found.name}: rows of {found.shape} (channels, height, "
                            f"width), the network wants {self.sizes.shape}")  # fmt: skip
        if self.sizes.n_class and len(found.classes) != self.sizes.n_class:
            raise UserError(f"--data {found.name}: {len(found.classes)} classes, the network has "
                            f"{self.sizes.n_class}")  # fmt: skip
        return found

    def refuse_changes(self, asked: dict) -> None:
        """UserError if the command line asks for another network than these weights are of."""
        for name, value in asked.items():
            if value != getattr(self.sizes, name):
                flag, has = "--" + name.replace("_", "-"), getattr(self.sizes, name)
                raise UserError(f"{flag} {value}: the network in --weights {self.path} has {has}")


def load(path: str | Path) -> Loaded:
    """Read a run or a folder of diffusers, in float32. UserError says what is wrong."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"--weights {path}: there is no such folder")
    refuse_endless(path)
    config = read_json(path / "config.json", optional=True)
    if (path / "unet").is_dir() or config.get("_class_name") == "UNet2DModel":
        return load_diffusers(path)
    if "model" not in config or "process" not in config:
        raise UserError(f"{path} is no run, and no folder of a diffusers pipeline with unet/")
    sizes = make_config(NetConfig, config["model"], f"{path}/config.json, model")
    if 0 in sizes.shape:
        raise UserError(f"{path}/config.json: pictures of {sizes.shape} cannot be")
    process = make_config(Process, config["process"], f"{path}/config.json, process")
    known = facts_about_rows(config, sizes, path)
    model = fill(build(sizes), read_tensors(RunDirectory(path).weights), path)
    return Loaded(path, model.eval(), sizes, process, **known)


def facts_about_rows(config: dict, sizes: NetConfig, path: Path) -> dict:
    """What config.json says of the data, as fields of Loaded. UserError for what is unfit."""
    rows, trained = config.get("data"), config.get("train", {})
    if not isinstance(rows, dict) or not isinstance(trained, dict):
        raise UserError(f"{path}/config.json: data and train must be objects")
    classes, name = rows.get("classes"), rows.get("name")
    if not isinstance(classes, list) or not isinstance(name, str):
        raise UserError(f"{path}/config.json: data needs a name and classes")
    if sizes.n_class not in (0, len(classes)):
        raise UserError(f"{path}/config.json: {len(classes)} classes, the network has "
                        f"{sizes.n_class}")  # fmt: skip
    numbers = {name: trained.get(name, 0) for name in ("seed", "image_size")}
    if any(type(value) is not int or value < 0 for value in numbers.values()):
        raise UserError(f"{path}/config.json: seed and image_size must be numbers from 0")
    known = {"classes": tuple(map(str, classes)), "source": name}
    return known | {"is_pictures": rows.get("pictures") is not False} | numbers


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The named tensors of a .safetensors file. UserError if it is none, or not whole."""
    try:
        return safetensors.torch.load_file(file)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{file} is missing") from None
    except Exception as error:  # what a damaged file makes the library raise has no common class
        raise UserError(f"{file} is damaged: {str(error).splitlines()[0]}") from None


def fill(model: nn.Module, state: dict[str, Tensor], where: str | Path) -> nn.Module:
    """The model with these weights. UserError names the first missing, extra or misshapen one."""
    wanted = model.state_dict()
    for name, tensor in wanted.items():
        if name not in state:
            raise UserError(f"the weights in {where} lack {name}")
        if state[name].shape != tensor.shape:
            there, needed = tuple(state[name].shape), tuple(tensor.shape)
            raise UserError(f"{where}: {name} is {there}, the configuration needs {needed}")
        if not state[name].float().isfinite().all():
            raise UserError(f"{where}: {name} holds numbers that are not finite")
    if extra := sorted(state.keys() - wanted.keys()):
        raise UserError(f"the weights in {where} have {extra[0]}, which the network does not")
    model.load_state_dict({name: state[name].to(t.dtype) for name, t in wanted.items()})
    return model


# ── diffusers ─────────────────────────────────────────────────────────────────────────────────────


def load_diffusers(path: Path) -> Loaded:
    """A DDPMPipeline's folder, or the folder of its unet alone (noise of DDPM is assumed then)."""
    unet = path / "unet" if (path / "unet").is_dir() else path
    sizes = our_sizes(read_json(unet / "config.json"), f"{unet}/config.json")
    scheduler = read_json(path / "scheduler" / "scheduler_config.json", optional=True)
    process = our_process(scheduler, f"{path}/scheduler/scheduler_config.json")
    state = {}
    for name, tensor in read_tensors(unet / WEIGHTS).items():
        parts = [OLD_NAMES.get(part, part) for part in name.split(".")]
        state[".".join(parts)] = tensor
    classes = tuple(str(i) for i in range(sizes.n_class))
    model = fill(build(sizes), state, unet)
    return Loaded(path, model.eval(), sizes, process, classes)


def expect(config: dict, where: str, **supported) -> None:
    """UserError unless each key has one of the values that we support; missing ones are fine."""
    for name, values in supported.items():
        if name in config and config[name] not in values:
            said = ", ".join(map(str, values))
            raise UserError(f"{where}: {name} {config[name]} is not supported here, only {said}")


def our_sizes(config: dict, where: str) -> NetConfig:
    """Sizes from unet/config.json. UserError for what our U-Net cannot be."""
    expect(config, where, _class_name=("UNet2DModel",), time_embedding_type=("positional",),
           downsample_type=("conv",), upsample_type=("conv",), act_fn=("silu", "swish"),
           mid_block_scale_factor=(1, 1.0), add_attention=(True,), class_embed_type=(None,),
           center_input_sample=(False,), mid_block_type=("UNetMidBlock2D",),
           attn_norm_num_groups=(None,), time_embedding_dim=(None,),
           resnet_time_scale_shift=("default",))  # fmt: skip
    try:
        widths, side = config["block_out_channels"], config["sample_size"]
        height, width = side if isinstance(side, list) else (side, side)
        down, up = config["down_block_types"], config["up_block_types"]
        attended = [i for i, name in enumerate(down) if name == "AttnDownBlock2D"]
        known = {"DownBlock2D": "UpBlock2D", "AttnDownBlock2D": "AttnUpBlock2D"}
        if [known.get(name) for name in down] != up[::-1] or len(down) != len(widths):
            raise ValueError("the blocks on the way up must mirror those on the way down, with "
                             "attention or without")  # fmt: skip
        head = config.get("attention_head_dim", 8)
        if head is None and len({widths[i] for i in (*attended, -1)}) > 1:
            raise ValueError("heads of several sizes are not supported here")
        if config["in_channels"] != config["out_channels"]:
            raise ValueError("learned variances are not supported here")
        n_class = config.get("num_class_embeds") or 0
        values = {
            "widths": ",".join(map(str, widths)),
            "attention": ",".join(map(str, attended)),
            "n_block": config.get("layers_per_block", 2),
            "n_group": config.get("norm_num_groups", 32),
            "d_head": widths[-1] if head is None else head,
            "dropout": config.get("dropout", 0.0),
            "channels": config["in_channels"],
            "image_height": height,
            "image_width": width,
            "n_class": n_class,
            "null_label": False,
            "norm_eps": config.get("norm_eps", 1e-5),
            "downsample_padding": config.get("downsample_padding", 1),
            "flip_sin_to_cos": config.get("flip_sin_to_cos", True),
            "freq_shift": config.get("freq_shift", 0),
        }
    except KeyError as error:
        raise UserError(f"{where}: {error} is missing") from None
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None
    return make_config(NetConfig, values, where)


def our_process(config: dict, where: str) -> Process:
    """The process of scheduler_config.json. UserError for what is not in diffusion.py."""
    expect(config, where, _class_name=("DDPMScheduler", "DDIMScheduler"), trained_betas=(None,),
           thresholding=(False,), beta_schedule=("linear", "squaredcos_cap_v2"),
           prediction_type=tuple(THEIR_TARGETS.values()),
           variance_type=("fixed_small", "fixed_large"))  # fmt: skip
    cosine = config.get("beta_schedule") == "squaredcos_cap_v2"
    zero = config.get("rescale_betas_zero_snr", False)
    if cosine and zero:
        raise UserError(f"{where}: rescale_betas_zero_snr goes with the linear schedule here")
    targets = {theirs: ours for ours, theirs in THEIR_TARGETS.items()}
    limit = config.get("clip_sample_range", 1.0) if config.get("clip_sample", True) else 0.0
    values = {
        "schedule": "cosine" if cosine else "zero-snr" if zero else "linear",
        "n_step": config.get("num_train_timesteps", 1000),
        "target": targets[config.get("prediction_type", "epsilon")],
        "first": config.get("beta_start", 1e-4),
        "last": config.get("beta_end", 0.02),
        "variance": str(config.get("variance_type", "fixed_small")).removeprefix("fixed_"),
        "clip": limit,
    }
    return make_config(Process, values, where)


def their_sizes(sizes: NetConfig) -> dict:
    """unet/config.json of our U-Net."""
    down = [
        "AttnDownBlock2D" if i in sizes.attended else "DownBlock2D"
        for i in range(len(sizes.levels))
    ]
    side = [sizes.image_height, sizes.image_width]
    return {
        "_class_name": "UNet2DModel",
        "sample_size": side[0] if side[0] == side[1] else side,
        "in_channels": sizes.channels,
        "out_channels": sizes.channels,
        "block_out_channels": list(sizes.levels),
        "layers_per_block": sizes.n_block,
        "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in down[::-1]],
        "attention_head_dim": sizes.d_head,
        "norm_num_groups": sizes.n_group,
        "norm_eps": sizes.norm_eps,
        "dropout": sizes.dropout,
        "downsample_padding": sizes.downsample_padding,
        "flip_sin_to_cos": sizes.flip_sin_to_cos,
        "freq_shift": sizes.freq_shift,
        "num_class_embeds": sizes.n_label or None,
    }


def their_process(process: Process) -> dict:
    """scheduler_config.json of our process. UserError for a flow, which DDPM cannot sample."""
    if process.schedule == "flow":
        raise UserError("--export: a DDPMPipeline knows no flow; train with another --schedule")
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": process.n_step,
        "beta_schedule": "squaredcos_cap_v2" if process.schedule == "cosine" else "linear",
        "beta_start": process.first,
        "beta_end": process.last,
        "prediction_type": THEIR_TARGETS[process.target],
        "variance_type": f"fixed_{process.variance}",
        "clip_sample": process.clip > 0,
        "clip_sample_range": process.clip or 1.0,
        "rescale_betas_zero_snr": process.schedule == "zero-snr",
        "timestep_spacing": "trailing",
    }


def for_one_label(model: nn.Module, sizes: NetConfig, label: int) -> tuple[dict, NetConfig]:
    """(weights, sizes) of a network without labels that answers as this one does for `label`.

    The class is added to the features of the time, so it can be moved into the bias of the layer
    that makes them.
    """
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = state.pop("class_embedding.weight")
    state["time_embedding.linear_2.bias"] += classes[label]
    return state, replace(sizes, n_class=0)


def export(loaded: Loaded, folder: str | Path, label: int | None = None) -> None:
    """Write a folder that `DDPMPipeline.from_pretrained` loads.

    A DDPMPipeline knows no labels. With `label` it draws that class; without, the folder holds
    the network with its classes, which the pipeline loads but cannot sample by itself.
    """
    if loaded.sizes.net != "unet":
        raise UserError(f"--export: diffusers has a U-Net like ours, but no {loaded.sizes.net}")
    scheduler, sizes = their_process(loaded.process), loaded.sizes
    state = loaded.model.state_dict()
    if label is not None:
        state, sizes = for_one_label(loaded.model, sizes, label)
    elif sizes.n_class:
        say(f"a DDPMPipeline gives no labels to its unet: export one class with --label, 0 to "
            f"{sizes.n_class - 1}, or call the unet with class_labels")  # fmt: skip
    place = place_to_export(folder)
    for part in ("unet", "scheduler"):
        (place / part).mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous().cpu() for name, tensor in state.items()}
    save_tensors(place / "unet" / WEIGHTS, state)
    write_json(place / "unet" / "config.json", their_sizes(sizes))
    write_json(place / "scheduler" / "scheduler_config.json", scheduler)
    index = {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"],
             "unet": ["diffusers", "UNet2DModel"]}  # fmt: skip
    write_json(place / "model_index.json", index)


def label_number(text: str, loaded: Loaded) -> int:
    """The number of a class given by name or number. UserError if there is none such."""
    if text in loaded.classes:
        return loaded.classes.index(text)
    if text.isascii() and text.isdigit() and int(text[:9]) < loaded.sizes.n_class:
        return int(text)
    known = ", ".join(loaded.classes[:20]) or "none"
    raise UserError(f"--label {text}: the network's classes are {known}")
