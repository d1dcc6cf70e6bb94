"""Every setting of a training run, with its unit and default: the command line, the presets and config.yaml are made of it."""

import dataclasses
import functools
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from ijckd_fast.errors import UserError, did_you_mean

PRESET_FOLDER = Path(__file__).parents[1] / "configs"
COMPARISONS = Path(__file__).parents[1] / "comparisons"  # what `ijckd-fast compare --config` takes by name
_PREFIXES = ("imagenet_", "cifar100_")  # of presets' names, which may be left out


# results/parity.csv: rounding alone makes 0.14 to 0.18 grey levels; the mildest mistake, a bicubic for the bilinear filter, 2.37 on
# ImageNet-like pictures and 1.1 on the digits; a shift by a pixel or swapped channels 12 and more.
MAX_DRIFT = 0.5

CACHE_CHUNK_IMAGES = 4096  # of a teacher cache: images in a chunk, the unit that is written, checked and computed again
CACHE_VERIFY = 64  # and how many of its views are computed again when it is finished


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `train`. `help_of(name)` gives the description of one; None means 'chosen as the description says'."""

    data_dir: str = _setting("", "folder with train/<class>/* and val/<class>/* image files (required)")
    class_list: str | None = _setting(
        None, "file with one class folder name in a line, in the order of the labels; default: sorted by name"
    )
    val_labels: str | None = _setting(
        None, "for a val/ without class folders: file that names each image's class, e.g. Kaggle's LOC_val_solution.csv"
    )
    output_dir: str | None = _setting(None, "folder of this run; default: runs/<objective>-<student>-seed<seed>")
    student: str = _setting(
        "resnet18",
        "student: name of ours for small images (resnet8x4, wrn_40_2, cifar/NAME), torchvision/NAME or timm/NAME, or an earlier run",
    )
    student_checkpoint: str | None = _setting(None, "file with weights the student starts from; default: random")
    student_pretrained: bool = _setting(False, "start the student from the library's published weights")
    teacher: str | None = _setting(
        None,
        "teacher, named like the student (a run's folder or its best.pt brings its weights), or cache:FOLDER, its features written by"
        " ijckd-fast cache; none only for --objective ce",
    )
    teacher_checkpoint: str | None = _setting(None, "file with the teacher's weights, e.g. best.pt of an earlier run")
    teacher_pretrained: bool = _setting(False, "take the teacher's published weights from the library")
    teacher_cache: str | None = _setting(
        None,
        "folder that ijckd-fast cache wrote: the teacher's features come from there and its backbone is not built; an image is seen in"
        " the cache's V views, which begin again after V epochs; --teacher cache:FOLDER sets this and the teacher's name",
    )
    allow_weak_teacher: bool = _setting(False, "train even if the teacher's own top-1 is near chance")

    objective: str = _setting("ijckd", "ijckd, ijckd-pooled, srrl, simkd, kd, dkd, fitnet, at or ce")
    ce: float | None = _setting(None, "weight of the hard-label cross-entropy; default: the objective's")
    sr: float | None = _setting(
        None, "weight of the logit matching, mean over batch and classes; default: the objective's"
    )
    fm: float | None = _setting(
        None, "weight of the feature matching, mean over all elements; default: the objective's"
    )
    kl: float | None = _setting(None, "weight of T^2 KL(teacher || student); default: the objective's")
    ce_head: Literal["teacher", "student"] | None = _setting(
        None, "classifier the cross-entropy goes through; default: the objective's"
    )
    kl_head: Literal["teacher", "student"] | None = _setting(
        None, "classifier the KL term goes through; default: the objective's"
    )
    dkd_alpha: float | None = _setting(None, "weight of DKD's target-class term; default: the objective's")
    dkd_beta: float | None = _setting(None, "weight of DKD's other-classes term; default: the objective's")
    dkd_warmup: float | None = _setting(None, "epochs in which both DKD weights rise from 0; default: the objective's")
    at: float | None = _setting(
        None, "weight of the attention transfer, summed over the stages that both nets have; default: the objective's"
    )
    hint: float | None = _setting(
        None, "weight of the hint, one stage's map matched through a regressor; default: the objective's"
    )
    hint_stage: int | None = _setting(
        None,
        "stage of the hint, of those that both nets have, 1 the one of the largest maps; default: the objective's",
    )
    match: Literal["map", "pooled", "none"] | None = _setting(None, "features to match; default: the objective's")
    temperature: float | None = _setting(None, "temperature T of the KL and DKD terms; default: the objective's")
    connector: str | None = _setting(None, "bottleneck:FACTOR, conv1x1, linear, mlp or none; default: the objective's")
    infer_head: Literal["teacher", "student"] | None = _setting(
        None, "classifier the trained student answers through; default: the objective's"
    )
    label_smoothing: float = _setting(
        0.0, "label smoothing of the cross-entropy, share of the probability mass in [0, 1)"
    )

    image_size: int = _setting(224, "side of the square network input, pixels")
    scale: tuple[float, float] = _setting((0.08, 1.0), "random crop: least and most share of the image area")
    ratio: tuple[float, float] = _setting((3 / 4, 4 / 3), "random crop: least and most width / height")
    crop_padding: int = _setting(
        0,
        "above 0: resize each image so that its shorter side is image_size (as it is, if it is), pad it by this many black pixels on"
        " every side and cut a square of image_size at a random place, instead of the random resized crop, its --scale and --ratio:"
        " CIFAR's usual augmentation (4)",
    )
    hflip: float = _setting(0.5, "probability of a horizontal flip in training")
    mixup: float = _setting(0.0, "alpha of the blending of images in pairs, 0.1 to 1; 0: off. Both nets see the blend")
    cutmix: float = _setting(
        0.0,
        "alpha of the cutting of a box from one image into another, 0.1 to 1; 0: off. With mixup: either, at even odds",
    )
    repeats: int = _setting(1, "views of each image in an epoch (repeated augmentation), of so many times fewer images")
    sizes: tuple[str, ...] = _setting(
        (), "progressive resizing, PIXELS@EPOCH of each change, e.g. 128@0,192@30; default: image_size throughout"
    )
    eval_resize: int | None = _setting(
        None,
        "evaluation: shorter side before the centre crop, pixels; default: image_size * 256 / 224, with crop_padding image_size",
    )
    mean: tuple[float, float, float] = _setting(
        (0.485, 0.456, 0.406), "RGB mean that is subtracted, in units of [0, 1]"
    )
    std: tuple[float, float, float] = _setting((0.229, 0.224, 0.225), "RGB deviation to divide by, in units of [0, 1]")
    train_per_class: int | None = _setting(None, "train on this many images per class only; default: all")
    label_noise: float = _setting(0.0, "share of the training labels to replace by another class, in [0, 1]")
    data_backend: Literal["dali", "pillow", "synthetic"] = _setting("dali", "what decodes the images")
    index_verify: Literal["full", "fast"] = _setting(
        "full", "first scan of the data: decode every file, or headers only"
    )
    check_files: bool = _setting(
        False,
        "ask for the length and time of every image at the start, as ijckd-fast index does; default: of every folder, which does"
        " not show a file rewritten in place",
    )
    unreadable_limit: int | None = _setting(
        None,
        "files that may turn out unreadable during the run before it stops; until then another image of the class stands in for"
        " each; default: a thousandth of them, at least 8",
    )
    max_drift: float = _setting(
        MAX_DRIFT,
        "how far DALI's pixels may be from Pillow's before the run is refused, mean absolute difference in grey levels of 0..255",
    )
    workers: int = _setting(
        0,
        "decoding threads; 0: with a GPU one for each core this process may use but one, without 2, since the nets compute there",
    )
    decode: Literal["cpu", "hybrid", "gpu"] = _setting(
        "cpu",
        "DALI on a GPU: all on the decoding threads (cpu), decode there and resize on the GPU (hybrid), or decode on the GPU too;"
        " pixels are Pillow's but for rounding unless the GPU decodes",
    )
    hw_decoder_load: float = _setting(
        0.65, "decode gpu: share of the images for the GPU's JPEG engine, in [0, 1]; more threads want less of it"
    )
    prefetch: int = _setting(2, "batches decoded ahead")

    epochs: int = _setting(100, "length of the run and of its schedule, passes over the training images")
    batch_size: int = _setting(
        256,
        "images per step and per process, which has one GPU; the global batch, to which --lr belongs, is this times the processes, or what"
        " --global-batch says",
    )
    global_batch: int | None = _setting(
        None,
        "images per step over all processes, in the place of --batch-size: must be a multiple of the processes times --accumulate;"
        " default: --batch-size times the processes",
    )
    accumulate: int = _setting(
        1,
        "equal parts of a process's batch that go through the nets one after the other, for less memory; batch size and number of"
        " updates stay, and the update is the same but for BatchNorm, whose statistics are then those of a part",
    )
    optimizer: Literal["sgd", "adamw", "lamb"] = _setting(
        "sgd", "sgd and adamw are PyTorch's fused ones, lamb timm's; the defaults of --lr and --weight-decay are sgd's"
    )
    lr: float = _setting(0.1, "peak learning rate for the global batch; never rescaled behind your back")
    momentum: float = _setting(0.9, "momentum of SGD")
    nesterov: bool = _setting(False, "Nesterov momentum, of SGD")
    betas: tuple[float, float] = _setting(
        (0.9, 0.999), "AdamW and LAMB: decay per step of the averages of the gradient and of its square, each in [0, 1)"
    )
    weight_decay: float = _setting(
        1e-4,
        "weight decay of student and connector; AdamW's and LAMB's is not part of the gradient: 0.01 to 0.1 are usual",
    )
    decay_norms: bool = _setting(
        True, "weight decay also for BatchNorm's parameters and for biases, as in the published recipes"
    )
    clip_grad: float | None = _setting(
        None,
        "largest L2 norm of the whole gradient, of the mean loss over the global batch; a longer one is scaled down to it, 1 to 5 are"
        " usual; default: no clipping",
    )
    schedule: Literal["step", "cosine"] = _setting(
        "step", "course of the learning rate after the warm-up, set every step"
    )
    milestones: tuple[int, ...] = _setting((30, 60, 90), "schedule step: epochs at which lr is multiplied by gamma")
    gamma: float = _setting(0.1, "schedule step: factor at each milestone")
    warmup_epochs: float = _setting(0.0, "linear warm-up from 0, epochs")
    ema_decay: float = _setting(0.0, "decay of the moving average of the weights, which is then evaluated; 0: off")
    max_steps: int | None = _setting(None, "stop after this many steps; the schedule still spans --epochs")
    seed: int = _setting(0, "seed of the student's first weights, of order, crops and subset")

    device: Literal["auto", "cpu", "cuda"] = _setting("auto", "auto: the GPU if there is one")
    amp_dtype: Literal["float32", "bfloat16", "float16"] | None = _setting(
        None,
        "precision of convolutions and matrix products; weights and losses stay in float32; float16 (GPUs only) with a loss scale that"
        " adapts itself; default: bfloat16 on a GPU, float32 on a CPU",
    )
    fold_teacher: bool = _setting(
        True,
        "fold the teacher's BatchNorm into the layers before it, in memory only: the same answers but for rounding, fewer passes over"
        " its maps",
    )
    compile: bool = _setting(
        False,
        "compile teacher, student and connector by torch.compile: takes minutes at the start and at the first step of each image size",
    )
    cuda_graph: bool = _setting(
        False,
        "record a step as a CUDA graph and replay it, so that no kernel is launched from Python: pays where batches are small; one"
        " process with a GPU, sgd or adamw only",
    )
    sync_bn: bool = _setting(
        False,
        "statistics of every BatchNorm that is trained, the connector's too, over the images of all processes, for few images per"
        " process; default: of its own process's; no effect with one process",
    )
    dist_backend: Literal["nccl", "gloo"] | None = _setting(
        None, "torch.distributed's backend for gradients, with several processes; default: nccl with GPUs, gloo without"
    )
    channels_last: bool = _setting(True, "memory layout NHWC")
    head: Literal["fused", "reference"] = _setting("fused", "the C++/CUDA ops, or plain PyTorch to compare with")
    deterministic: bool = _setting(False, "only deterministic GPU algorithms (slower); CPU runs always are")

    log_interval: int = _setting(
        50, "steps between two lines of the log (the only moments the host waits for the device)"
    )
    eval_every: int = _setting(1, "epochs between two evaluations on val; the last epoch is always evaluated")
    log_bound: bool = _setting(
        False,
        "at every evaluation also log the terms of the bound on the student's error (docs/bound.md); for objectives with a connector, and"
        " not from a cache: the teacher then runs on val each time",
    )
    checkpoint_minutes: float = _setting(10.0, "minutes between two writings of last.pt")
    checkpoint_steps: int | None = _setting(None, "write last.pt every so many steps too; default: by minutes only")
    keep_checkpoints: int = _setting(
        1,
        "above 1: each last.pt is kept as checkpoint-STEP.pt too, the newest so many of them; --resume FOLDER/checkpoint-STEP.pt goes on"
        " from one",
    )
    nonfinite_limit: int = _setting(
        20, "steps skipped for a NaN or infinite loss or gradient before the run is stopped"
    )
    tensorboard: bool = _setting(True, "write TensorBoard events")
    wandb: str | None = _setting(
        None, "name of a Weights & Biases project to send the log to as well (pip install wandb); default: none"
    )

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
        if self.nesterov and not self.momentum:
            raise UserError("--nesterov needs a --momentum above 0, got 0: set one, or leave --nesterov out")
        if self.optimizer != "sgd" and self.nesterov:
            raise UserError(f"--nesterov is SGD's, got --optimizer {self.optimizer}: leave it out")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"--betas must be two numbers in [0, 1), got {self.betas}")
        if self.clip_grad is not None and self.clip_grad <= 0:
            raise UserError(
                f"--clip-grad must be above 0, got {self.clip_grad}: 1 to 5 are usual; leave it out for no clipping"
            )
        if self.lr <= 0:
            raise UserError(f"--lr must be above 0, got {self.lr}")
        if self.decode != "cpu" and self.data_backend != "dali":
            raise UserError(
                f"--decode {self.decode} is DALI's, got --data-backend {self.data_backend}: take dali, or --decode cpu"
            )
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"--ema-decay must lie in [0, 1), got {self.ema_decay}: 0 turns it off, 0.999 is usual")


_LEAST = {
    "epochs": 1, "batch_size": 1, "momentum": 0, "weight_decay": 0, "warmup_epochs": 0, "max_steps": 1, "workers": 0,
    "prefetch": 1, "log_interval": 1, "eval_every": 1, "checkpoint_minutes": 0, "checkpoint_steps": 1, "nonfinite_limit": 0,
    "seed": 0, "train_per_class": 1, "unreadable_limit": 0, "max_drift": 0, "global_batch": 1, "accumulate": 1,
    "keep_checkpoints": 1, "crop_padding": 0,
}  # fmt: skip

# Headings of the help, by the first setting below each.
GROUPS = {
    "data_dir": "data and models",
    "objective": "objective (unset weights are the objective's own)",
    "image_size": "images",
    "epochs": "optimisation",
    "device": "computation",
    "log_interval": "what is written when",
}

# A run may be continued with these changed: where things lie and what is written when, nothing the weights depend on. batch_size is
# among them because global_batch is not: a run continues with any number of processes that divides its global batch.
FREE_ON_RESUME = frozenset(
    {
        "data_dir", "class_list", "val_labels", "output_dir", "teacher_checkpoint", "teacher_cache", "student_checkpoint",
        "allow_weak_teacher", "index_verify", "check_files", "workers", "prefetch", "log_interval", "checkpoint_minutes",
        "checkpoint_steps", "nonfinite_limit", "tensorboard", "unreadable_limit", "max_drift", "batch_size", "dist_backend",
        "keep_checkpoints", "wandb", "log_bound",
    }
)  # fmt: skip

# Settings that replace a field of the objective.
OBJECTIVE_FIELDS = (
    "ce", "sr", "fm", "kl", "ce_head", "kl_head", "dkd_alpha", "dkd_beta", "dkd_warmup", "at", "hint", "hint_stage", "match",
    "temperature", "connector", "infer_head",
)  # fmt: skip

# What a teacher cache is made of and by; the rest belongs to the student.
CACHE_FIELDS = (
    "data_dir", "class_list", "val_labels", "teacher", "teacher_checkpoint", "teacher_pretrained", "allow_weak_teacher", "image_size",
    "scale", "ratio", "crop_padding", "hflip", "eval_resize", "mean", "std", "train_per_class", "label_noise", "data_backend",
    "index_verify", "check_files", "unreadable_limit", "max_drift", "workers", "decode", "hw_decoder_load", "prefetch", "batch_size",
    "seed", "device", "amp_dtype", "channels_last",
)  # fmt: skip
UNCACHED_FIELDS = ("mixup", "cutmix", "repeats", "sizes")  # must be off in a training from a cache

FIELDS: dict[str, dataclasses.Field] = {f.name: f for f in dataclasses.fields(TrainConfig)}
TYPES: dict[str, Any] = typing.get_type_hints(TrainConfig)


def help_of(name: str) -> str:
    """The description of one setting, with its unit."""
    return FIELDS[name].metadata["help"]


def default_eval_resize(image_size: int, crop_padding: int) -> int:
    """--eval-resize where it is not given, pixels: no margin around the crop where training has none either."""
    return image_size if crop_padding else round(image_size * 256 / 224)


def make_config(values: Mapping[str, Any]) -> TrainConfig:
    """TrainConfig from a mapping such as a YAML file's; UserError for a name that is no setting."""
    check_names(values, "the settings")
    settings: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }
    return TrainConfig(**settings)


def check_names(names: Iterable[str], where: str) -> None:
    """UserError, with the nearest names, for the first of `names` that is no setting."""
    for name in names:
        if name not in FIELDS:
            raise UserError(f"unknown setting '{name}' in {where}{did_you_mean(name, FIELDS)}")


def typed(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`values`, settings as a YAML file has them, with the types of TrainConfig; `where` names them in errors.

    raises   UserError for a name that is no setting, and for a value of another type
    """
    check_names(values, where)
    try:
        return _types().parse_object(dict(values), defaults=False).as_dict()
    except ArgumentError as error:
        name = re.match(r'Parser key "(\w+)"', error.message)
        if name is None:
            raise UserError(f"{where}: {' '.join(error.message.split())}") from error
        wanted = re.findall(r"Expected an? ([^\n]+?)(?:\.|$)", error.message, re.MULTILINE)
        kinds = [re.sub(r"<class '(\w+)'>", r"\1", kind.replace("typing.", "")) for kind in wanted]
        raise UserError(
            f"{name[1]} in {where}: wanted {' or '.join(kinds) or TYPES[name[1]]}, got {values[name[1]]!r}: {help_of(name[1])}"
        ) from error


@functools.cache
def _types() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    for name in FIELDS:
        parser.add_argument(f"--{name}", type=TYPES[name])
    return parser


def preset_names(folder: Path = PRESET_FOLDER) -> list[str]:
    """Names of the packaged presets, as --config takes them."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def preset_path(name_or_path: str, folder: Path = PRESET_FOLDER) -> Path:
    """The YAML file that --config names: a path, or one in `folder` by name, 'imagenet_' or 'cifar100_' in front left out or not."""
    path, names = Path(name_or_path), preset_names(folder)
    if path.suffix in (".yaml", ".yml") or path.exists():
        if not path.is_file():
            raise UserError(f"no configuration file {path}: give a YAML file, or one of {', '.join(names)}")
        return path
    for prefix in ("", *_PREFIXES):
        if prefix + name_or_path in names:
            return folder / f"{prefix}{name_or_path}.yaml"
    short = (name.removeprefix(prefix) for name in names for prefix in _PREFIXES)
    raise UserError(
        f"no preset '{name_or_path}': give a YAML file, or one of {', '.join(names)}{did_you_mean(name_or_path, {*names, *short})}"
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """What a YAML file of 'name: value' lines holds; UserError for anything else."""
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold 'setting: value' lines, found {type(values).__name__}")
    return values


def load_preset(name_or_path: str) -> dict[str, Any]:
    """The settings in a YAML file or packaged preset."""
    path = preset_path(name_or_path)
    values = read_yaml(path)
    check_names(values, str(path))
    return values
