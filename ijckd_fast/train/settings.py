"""The settings of a training run, each with its default and all that belongs to it, by their headings in the help.

To add one: its declaration here, and where it acts. Those of images are in image_settings.py.
"""

# Annotations are read at run time (jsonargparse), so they are not postponed.
import dataclasses
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_type_hints

from ijckd_fast.distill import PRESETS, Objective
from ijckd_fast.errors import one_of
from ijckd_fast.setting import Trait, setting, settings_of

_data = functools.partial(setting, group="data and models")
_goal = functools.partial(setting, group="objective (unset weights are the objective's own)")
_optimisation = functools.partial(setting, group="optimisation")
_computation = functools.partial(setting, group="computation")
_writing = functools.partial(setting, group="what is written when")


@dataclass(frozen=True)
class DataAndModels:
    """Where images, nets and their weights come from, and where the run goes."""

    data_dir: str = _data(
        "",
        "folder with train/<class>/* and val/<class>/* image files, webdataset shards, or another layout of "
        "docs/index.md; needed",
        Trait.FREE | Trait.CACHED | Trait.INDEXES | Trait.PATH,
        of_comparison="data_dir beside methods",
    )
    class_list: str | None = _data(
        None,
        "file with one class folder name in a line, in the order of the labels; default: sorted by name",
        Trait.FREE | Trait.PLAN | Trait.CACHED | Trait.INDEXES | Trait.PATH,
    )
    val_labels: str | None = _data(
        None,
        "for a val/ without class folders: file that names each image's class, e.g. Kaggle's LOC_val_solution.csv",
        Trait.FREE | Trait.PLAN | Trait.CACHED | Trait.INDEXES | Trait.OF_FOLDER | Trait.PATH,
    )
    val_dir: str | None = _data(
        None,
        "where the validation images are, if not in --data-dir: another data folder with a validation split, or a "
        "folder of nothing but them",
        Trait.FREE | Trait.PLAN | Trait.CACHED | Trait.INDEXES | Trait.OF_FOLDER | Trait.PATH,
    )
    val_fraction: float | None = _data(
        None,
        "for data without a validation split: hold out about this part of the training images, e.g. 0.02. Which ones "
        "is a function of their paths and --val-seed alone",
        Trait.PLAN | Trait.CACHED | Trait.INDEXES | Trait.OF_FOLDER,
        above=0,
        below=1,
    )
    val_seed: int | None = _data(
        None,
        "seed that --val-fraction draws by; default: --seed. Give it to runs that are compared by other seeds, and to "
        "a teacher of your own, so that none is trained on what another is evaluated on",
        Trait.PLAN | Trait.CACHED | Trait.INDEXES | Trait.OF_FOLDER,
    )
    label_key: str | None = _data(
        None,
        "for webdataset shards: where an image's label is, cls (KEY.cls) or json:FIELD (a field of KEY.json, A.B for "
        "B in the object A); default: KEY.cls, else json:label, else its folder",
        Trait.FREE | Trait.PLAN | Trait.CACHED | Trait.INDEXES | Trait.OF_FOLDER,
    )
    image_column: str | None = _data(
        None,
        "for Parquet files: column with the images' bytes, A.B for the field B of a struct A; default: the only one",
        Trait.FREE | Trait.PLAN | Trait.CACHED | Trait.INDEXES | Trait.OF_FOLDER,
    )
    label_column: str | None = _data(
        None,
        "for Parquet files: column with the labels, A.B for the field B of a struct A; default: the only one",
        Trait.FREE | Trait.PLAN | Trait.CACHED | Trait.INDEXES | Trait.OF_FOLDER,
    )
    output_dir: str | None = _data(
        None,
        "folder of this run; default: runs/<objective>-<student>-seed<seed>",
        Trait.FREE | Trait.PER_PROCESS,
        of_comparison="--output",
    )
    student: str = _data(
        "resnet18",
        "student: name of ours for small images (resnet8x4, wrn_40_2, cifar/NAME), torchvision/NAME or "
        "timm/NAME, or an earlier run",
    )
    student_checkpoint: str | None = _data(
        None,
        "file with weights the student starts from; default: random",
        Trait.FREE_ON_RESUME | Trait.TRAINING | Trait.PATH,
    )
    student_weights: str = _data(
        "auto",
        "which weights of --student-checkpoint, where the file has several sets: ema (averaged), raw (in training), or "
        "the name a set stands under; auto: ema where the file's tool evaluates those, else raw",
        Trait.FREE_ON_RESUME | Trait.TRAINING,
    )
    student_pretrained: bool = _data(False, "start the student from the library's published weights", Trait.TRAINING)
    teacher: str | None = _data(
        None,
        "teacher, named like the student (a run's folder or its best.pt brings its weights), or cache:FOLDER, "
        "its features written by ijckd-fast cache; none only for --objective ce",
        Trait.CACHED | Trait.TEACHER,
    )
    teacher_checkpoint: str | None = _data(
        None,
        "file with the teacher's weights, e.g. best.pt of an earlier run",
        Trait.FREE | Trait.CACHED | Trait.TEACHER | Trait.WEIGHTS | Trait.PATH,
    )
    teacher_weights: str = _data(
        "auto",
        "which weights of --teacher-checkpoint, likewise: auto, ema, raw or a name",
        Trait.FREE | Trait.CACHED | Trait.TEACHER,
    )
    rename_by_order: bool = _data(
        False,
        "where the names in a weights file are not the net's, and all shapes are equal one after the other: take its "
        "tensors in that order. Right only if the layers have the same order; the teacher's top-1 tells",
        Trait.FREE_ON_RESUME | Trait.CACHED | Trait.TEACHER,
    )
    teacher_pretrained: bool = _data(
        False, "take the teacher's published weights from the library", Trait.CACHED | Trait.TEACHER | Trait.WEIGHTS
    )
    teacher_cache: str | None = _data(
        None,
        "folder that ijckd-fast cache wrote: the teacher's features come from there and its backbone is not "
        "built; an image is seen in the cache's V views, which begin again after V epochs; --teacher "
        "cache:FOLDER sets this and the teacher's name",
        Trait.FREE | Trait.TEACHER | Trait.WEIGHTS | Trait.PATH,
    )
    student_stages: tuple[str, ...] = _data(
        (),
        "names of the student's layers whose outputs are its stages, from the largest map to the smallest, e.g. "
        "layer1,layer2,layer3, for objectives that compare stages (fitnet, at, --hint, --at); default: found by the "
        "sizes of the maps",
    )
    teacher_stages: tuple[str, ...] = _data((), "names of the teacher's layers whose outputs are its stages, likewise")
    allow_weak_teacher: bool = _data(
        False, "train even if the teacher's own top-1 is near chance", Trait.FREE | Trait.CACHED
    )


@dataclass(frozen=True)
class _Name:
    objective: str = _goal("ijckd", one_of(PRESETS))


if TYPE_CHECKING:

    @dataclass(frozen=True)
    class _OfObjective:  # for mypy: those that are read by name; below are all of them
        connector: str | None = None
        infer_head: Literal["teacher", "student"] | None = None

else:
    # Every setting of the objective, unset: Objective declares them, most of them through its loss terms.
    _OfObjective = dataclasses.make_dataclass(
        "_OfObjective",
        [
            (name, get_type_hints(Objective)[name] | None, _goal(None, f"{about.help}; default: the objective's"))
            for name, about in settings_of(Objective).items()
        ],
        frozen=True,
    )


@dataclass(frozen=True)
class Goal(_OfObjective, _Name):
    """What is learned: an objective, and what is changed of it."""

    label_smoothing: float = _goal(0.0, "label smoothing of the cross-entropy, share of the probability mass in [0, 1)")


@dataclass(frozen=True)
class Optimisation:
    """How the weights move."""

    epochs: int = _optimisation(
        100, "length of the run and of its schedule, passes over the training images", Trait.PLAN, least=1
    )
    batch_size: int = _optimisation(
        256,
        "images per step and per process, which has one GPU; the global batch, to which --lr belongs, is this "
        "times the processes, or what --global-batch says",
        Trait.FREE | Trait.PLAN | Trait.CACHED,
        least=1,
    )
    global_batch: int | None = _optimisation(
        None,
        "images per step over all processes, instead of --batch-size: must be a multiple of the processes "
        "times --accumulate; default: --batch-size times the processes",
        Trait.PLAN | Trait.TRAINING,
        least=1,
    )
    accumulate: int = _optimisation(
        1,
        "equal parts of a process's batch that go through the nets one after the other, for less memory; batch "
        "size and number of updates stay, and the update is the same but for BatchNorm, whose statistics are "
        "then those of a part; refused for terms over a whole batch (DIST's over images, SRD)",
        Trait.TRAINING,
        least=1,
    )
    optimizer: Literal["sgd", "adamw", "lamb"] = _optimisation(
        "sgd", "sgd and adamw are PyTorch's fused ones, lamb timm's; the defaults of --lr and --weight-decay are sgd's"
    )
    lr: float = _optimisation(0.1, "peak learning rate for the global batch; never rescaled behind your back", above=0)
    momentum: float = _optimisation(0.9, "momentum of SGD", least=0)
    nesterov: bool = _optimisation(False, "Nesterov momentum, of SGD")
    betas: tuple[float, float] = _optimisation(
        (0.9, 0.999),
        "AdamW and LAMB: decay per step of the averages of the gradient and of its square, each in [0, 1)",
        least=0,
        below=1,
    )
    weight_decay: float = _optimisation(
        1e-4,
        "weight decay of student and connector; AdamW's and LAMB's is not part of the gradient: 0.01 to 0.1 are usual",
        least=0,
    )
    decay_norms: bool = _optimisation(
        True,
        "weight decay also for the norms' parameters, for biases and for what the net itself keeps from it (timm's "
        "ViTs their class token and positions), as in the recipes published for CNNs",
    )
    clip_grad: float | None = _optimisation(
        None,
        "largest L2 norm of the whole gradient, of the mean loss over the global batch; a longer one is scaled "
        "down to it, 1 to 5 are usual; default: no clipping",
        above=0,
        remedy="1 to 5 are usual; leave it out for no clipping",
    )
    schedule: Literal["step", "cosine"] = _optimisation(
        "step", "course of the learning rate after the warm-up, set every step"
    )
    milestones: tuple[int, ...] = _optimisation(
        (30, 60, 90), "schedule step: epochs at which lr is multiplied by gamma"
    )
    gamma: float = _optimisation(0.1, "schedule step: factor at each milestone")
    warmup_epochs: float = _optimisation(0.0, "linear warm-up from 0, epochs", least=0)
    drop_path: float | None = _optimisation(
        None,
        "stochastic depth: probability with which the student's last residual branch is left out for an image in "
        "training, rising to that from 0 at the first; 0.1 is usual for small nets; default: as the library builds "
        "the student (timm's nets: 0)",
        Trait.TRAINING,
        least=0,
        below=1,
    )
    ema_decay: float = _optimisation(
        0.0,
        "decay of the moving average of the weights, which is then evaluated; 0: off",
        least=0,
        below=1,
        remedy="0 turns it off, 0.999 is usual",
    )
    max_steps: int | None = _optimisation(
        None, "stop after this many steps; the schedule still spans --epochs", Trait.PLAN, least=1
    )
    seed: int = _optimisation(
        0,
        "seed of the student's first weights, of order, crops and subset",
        Trait.CACHED | Trait.INDEXES,
        least=0,
        of_comparison="seeds beside methods",
    )


@dataclass(frozen=True)
class Computation:
    """On what, and in which form, the same is computed."""

    device: Literal["auto", "cpu", "cuda"] = _computation("auto", "auto: the GPU if there is one", Trait.CACHED)
    amp_dtype: Literal["float32", "bfloat16", "float16"] | None = _computation(
        None,
        "precision of convolutions and matrix products; weights and losses stay in float32; float16 (GPUs only) "
        "with a loss scale that adapts itself; default: bfloat16 on a GPU, float32 on a CPU",
        Trait.CACHED,
    )
    fold_teacher: bool = _computation(
        True,
        "fold the teacher's BatchNorm into the layers before it, in memory only: the same answers but for "
        "rounding, fewer passes over its maps",
    )
    compile: bool = _computation(
        False,
        "compile teacher, student and connector by torch.compile: takes minutes at the start and at the first "
        "step of each image size",
        Trait.TRAINING,
    )
    cuda_graph: bool = _computation(
        False,
        "record a step as a CUDA graph and replay it, so that no kernel is launched from Python: pays where "
        "batches are small; one process with a GPU, sgd or adamw only",
        Trait.TRAINING,
    )
    sync_bn: bool = _computation(
        False,
        "statistics of every BatchNorm that is trained, the connector's too, over the images of all processes, "
        "for few images per process; default: of its own process's; no effect with one process",
    )
    dist_backend: Literal["nccl", "gloo"] | None = _computation(
        None,
        "torch.distributed's backend for gradients, with several processes; default: nccl with GPUs, gloo without",
        Trait.FREE,
    )
    dist_timeout: float = _computation(
        10.0,
        "minutes without a sign of life from one of several processes (it was stopped, its machine is gone, its disk "
        "hangs) after which the others end with a sentence; one that is at work gives signs",
        Trait.FREE,
        above=0,
    )
    channels_last: bool = _computation(True, "memory layout NHWC, of images and nets", Trait.CACHED)
    head: Literal["fused", "reference"] = _computation("fused", "the C++/CUDA ops, or plain PyTorch to compare with")
    deterministic: bool = _computation(False, "only deterministic GPU algorithms (slower); CPU runs always are")


@dataclass(frozen=True)
class Writing:
    """What is written, and when."""

    log_interval: int = _writing(
        50, "steps between two lines of the log (the only moments the host waits for the device)", Trait.FREE, least=1
    )
    eval_every: int = _writing(1, "epochs between two evaluations on val; the last epoch is always evaluated", least=1)
    log_bound: bool = _writing(
        False,
        "at every evaluation also log the terms of the bound on the student's error (docs/bound.md); for "
        "objectives with a connector, and not from a cache: the teacher then runs on val each time",
        Trait.FREE | Trait.TRAINING,
    )
    checkpoint_minutes: float = _writing(10.0, "minutes between two writings of last.pt", Trait.FREE, least=0)
    checkpoint_steps: int | None = _writing(
        None, "write last.pt every so many steps too; default: by minutes only", Trait.FREE, least=1
    )
    keep_checkpoints: int = _writing(
        1,
        "above 1: each last.pt is kept as checkpoint-STEP.pt too, the newest so many of them; --resume "
        "FOLDER/checkpoint-STEP.pt continues from one",
        Trait.FREE,
        least=1,
    )
    nonfinite_limit: int = _writing(
        20, "steps skipped for a NaN or infinite loss or gradient before the run is stopped", Trait.FREE, least=0
    )
    tensorboard: bool = _writing(True, "write TensorBoard events", Trait.FREE)
    wandb: str | None = _writing(
        None,
        "name of a Weights & Biases project to send the log to as well (needs the extra [wandb]); default: none",
        Trait.FREE | Trait.TRAINING,
    )
