"""A trained run as files to deploy: one module in safetensors and ONNX, and the student's own weights in its library's names.

`Deployed` is what answers: backbone, connector and classifier with every BatchNorm folded, in plain PyTorch. `write_export` gives
files their names only after they have answered as the trained net does.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import io
import json
import logging
import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from ijckd_fast import files
from ijckd_fast.data import Batch
from ijckd_fast.distill.connectors import Connector, build_connector
from ijckd_fast.distill.distiller import Distiller
from ijckd_fast.errors import UserError
from ijckd_fast.nets import Tapped, count_macs, count_parameters, create_model, fingerprint, fold_batch_norm
from ijckd_fast.train import run_folder

if TYPE_CHECKING:
    from ijckd_fast.train import TrainConfig

FORMAT = "ijckd-fast export 1"
CONFIG, MODEL, ONNX, STUDENT = "config.json", "model.safetensors", "model.onnx", "student.safetensors"
FILES = (CONFIG, MODEL, ONNX, STUDENT)

# Largest differences of logits that are allowed, in units of the largest logit: folding reorders sums, onnxruntime fewer of them.
FOLDING_TOLERANCE = 1e-3
ONNX_TOLERANCE = 1e-4


# ----------------------------------------------------------------------------------------------------------------------
# The module


class Deployed(nn.Module):
    """images [B, 3, S, S] normalised RGB -> logits [B, K], float32; plain PyTorch only, so that it can be traced.

    backbone    a `Tapped` without its classifier
    connector   layers from the student's map [B, Cs, Hs, Ws] or pooled vector [B, Cs] to z, or Identity
    classifier  Linear to the K logits; where a connector on vectors ends in a layer without ReLU, it may be that layer and the
                teacher's classifier in one
    takes_map   whether the connector works on the map; its output's mean over the positions is z
    joined      whether the classifier is also the connector's last layer
    map_size    (H, W) to which the map is average-pooled before the connector, where the teacher's was smaller; None: as it is
    """

    def __init__(
        self,
        backbone: Tapped,
        connector: nn.Module,
        classifier: nn.Linear,
        *,
        takes_map: bool,
        joined: bool,
        map_size: tuple[int, int] | None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.connector = connector
        self.classifier = classifier
        self.takes_map = takes_map
        self.joined = joined
        self.map_size = map_size

    def features(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] -> what the connector takes: map [B, Cs, H, W] or pooled vector [B, Cs]"""
        map_, pooled = self.backbone.features(images, need_map=self.takes_map)
        if map_ is None:
            return pooled
        return map_ if self.map_size is None else F.adaptive_avg_pool2d(map_, self.map_size)

    def connect(self, x: Tensor) -> Tensor:
        """What `features` returns -> z [B, C], which the classifier takes"""
        x = self.connector(x)
        return x.mean((2, 3)) if self.takes_map else x

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.connect(self.features(images)))


def deployed_module(distiller: Distiller, image_size: int) -> Deployed:
    """What answers after training, as one module on the CPU in eval mode; the distiller stays as it is.

    Backbone and own classifier, or backbone, connector and the teacher's classifier, as the objective's `infer_head` says.
    """
    student = copy.deepcopy(distiller.learner.student)
    if distiller.objective.infer_head == "student":
        assert student.classifier is not None
        return _assemble(student, None, copy.deepcopy(student.classifier), None, image_size)
    assert distiller.teacher is not None
    assert distiller.teacher.classifier is not None
    image = next(student.parameters()).new_zeros(1, 3, image_size, image_size)
    map_size_t = distiller._map_size_t(image)
    connector = copy.deepcopy(distiller.learner.connector)
    return _assemble(student, connector, copy.deepcopy(distiller.teacher.classifier), map_size_t, image_size)


@torch.no_grad()
def _assemble(
    student: Tapped,
    connector: Connector | None,
    classifier: nn.Linear,
    map_size_t: tuple[int, int] | None,
    image_size: int,
) -> Deployed:
    """Folds and joins the parts, which it takes over. The structure follows from architecture and shapes, not from the weights."""
    student.drop_classifier()
    parts = nn.ModuleList([student, *([connector] if connector is not None else []), classifier])
    parts.float().cpu().to(memory_format=torch.contiguous_format).eval().requires_grad_(False)
    images = _random_images(image_size)
    fold_batch_norm(student.net, images)
    map_, pooled = student.features(images, need_map=connector is not None and connector.takes_map)
    x = pooled if map_ is None else map_  # [2, Cs, Hs, Ws] or [2, Cs]
    map_size = None
    if map_ is not None and map_size_t is not None:
        smaller = (min(map_.shape[2], map_size_t[0]), min(map_.shape[3], map_size_t[1]))
        map_size = smaller if smaller != tuple(map_.shape[2:]) else None
        x = F.adaptive_avg_pool2d(map_, smaller)
    joined = False
    layers: nn.Module = nn.Identity()
    if connector is not None and connector.takes_map:
        layers = _map_layers(connector, x)
    elif connector is not None:
        layers, classifier, joined = _vector_layers(connector, classifier, x)
    deployed = Deployed(student, layers, classifier, takes_map=map_ is not None, joined=joined, map_size=map_size)
    return deployed.eval().requires_grad_(False)


def _map_layers(connector: Connector, x: Tensor) -> nn.Module:
    """Trunk, projection as a 1x1 convolution, its BatchNorm folded into it, ReLU: [B, Cs, H, W] -> [B, Ct, H, W]."""
    channels, channels_in = connector.weight.shape
    projection = nn.Conv2d(channels_in, channels, 1, bias=False)
    projection.weight.copy_(connector.weight[:, :, None, None])
    norm = nn.BatchNorm2d(channels, eps=connector.eps)
    norm.load_state_dict(
        {
            "weight": connector.bn_weight,
            "bias": connector.bn_bias,
            "running_mean": connector.running_mean,
            "running_var": connector.running_var,
            "num_batches_tracked": connector.num_batches_tracked,
        }
    )
    trunk = list(connector.trunk) if isinstance(connector.trunk, nn.Sequential) else []
    layers = nn.Sequential(*trunk, projection, norm, nn.ReLU()).eval()
    fold_batch_norm(layers, x)
    return _without_identities(layers)


def _vector_layers(connector: Connector, classifier: nn.Linear, x: Tensor) -> tuple[nn.Module, nn.Linear, bool]:
    """Trunk and projection, the classifier, and whether the projection is part of the latter, as it is where that is cheaper."""
    assert connector.bias is not None
    channels, channels_in = connector.weight.shape
    projection = nn.Linear(channels_in, channels)
    projection.weight.copy_(connector.weight)
    projection.bias.copy_(connector.bias)
    trunk = list(connector.trunk) if isinstance(connector.trunk, nn.Sequential) else []
    classes = classifier.out_features
    joined = classes * channels_in < channels * channels_in + classes * channels
    if joined:
        # W (V x + c) + b = (W V) x + (W c + b)
        weight = classifier.weight.double()  # [K, Ct]
        both = nn.Linear(channels_in, classes)
        both.weight.copy_(weight @ projection.weight.double())
        bias = weight @ projection.bias.double()
        both.bias.copy_(bias if classifier.bias is None else bias + classifier.bias.double())
        classifier = both
    layers = nn.Sequential(*trunk, *([] if joined else [projection])).eval()
    fold_batch_norm(layers, x)
    return _without_identities(layers), classifier, joined


def _without_identities(layers: nn.Sequential) -> nn.Module:
    kept = [layer for layer in layers if not isinstance(layer, nn.Identity)]
    return nn.Sequential(*kept) if kept else nn.Identity()


def _random_images(image_size: int) -> Tensor:
    return torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))


def load_exported(folder: str | Path) -> Deployed:
    """Rebuilds the module that `ijckd-fast export` wrote: images [B, 3, S, S] -> logits [B, K], on the CPU, in eval mode.

    folder  holds config.json (image size, normalisation and classes are told there) and model.safetensors
    raises  UserError: no export there, a file damaged or changed since, another architecture under the student's name
    """
    folder = Path(folder)
    config = _read_config(folder)
    path = folder / MODEL
    if not path.is_file():
        raise UserError(f"{folder} holds no {MODEL}, wanted beside its {CONFIG}: export the run again with --overwrite")
    data = path.read_bytes()
    digests = config.get("sha256")
    if not isinstance(digests, dict) or hashlib.sha256(data).hexdigest() != digests.get(MODEL):
        raise UserError(
            f"{path} ({len(data)} bytes) is not the file that {CONFIG} describes (another SHA-256): it is damaged or was changed; "
            "export the run again with --overwrite"
        )
    weights = safetensors.torch.load(data)
    try:
        student = create_model(config["student"], len(config["classes"]), image_size=config["image_size"])
        connector = None
        channels = student.channels
        if config["connector"] is not None:
            channels = config["teacher_channels"]
            connector = build_connector(config["connector"], student.channels, channels)
        map_size_t = None if config["teacher_map_size"] is None else tuple(config["teacher_map_size"])
        classifier = nn.Linear(channels, len(config["classes"]), bias="classifier.bias" in weights)
        module = _assemble(student, connector, classifier, map_size_t, config["image_size"])
    except (KeyError, TypeError, ValueError) as error:  # ValueError: UserErrors as well
        raise UserError(
            f"the net that {folder / CONFIG} describes cannot be built ({type(error).__name__}: {error}): the file was changed, or timm or "
            "torchvision is another version than it names; export the run again with --overwrite"
        ) from error
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"{path} does not fit the net that {CONFIG} describes: either {CONFIG} was changed, or timm or torchvision is another version "
            f"than it names ({' '.join(str(error).split())[:200]}); export the run again with --overwrite"
        ) from error
    return module


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"no export in {folder} (it has no {CONFIG}): give the folder that ijckd-fast export wrote")
    try:
        config = json.loads(path.read_text())
    except ValueError:
        config = None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise UserError(
            f"{path} is not of an export, or damaged (wanted a JSON object with format {FORMAT!r}): export the run again"
        )
    return config


# ----------------------------------------------------------------------------------------------------------------------
# Checks on real images


class Comparison(NamedTuple):
    """Logits of two programs on the same images.

    images         how many
    difference     largest absolute difference of two logits
    scale          largest absolute logit
    disagreements  images whose highest logit is another
    """

    images: int
    difference: float
    scale: float
    disagreements: int

    def within(self, tolerance: float) -> bool:
        """Whether the difference is at most `tolerance` times the largest logit; False for NaN."""
        return self.difference <= tolerance * self.scale


def _compare(logits: Tensor, wanted: Tensor) -> Comparison:
    difference, scale = float((logits - wanted).abs().max()), float(wanted.abs().max())
    return Comparison(len(wanted), difference, scale, int((logits.argmax(1) != wanted.argmax(1)).sum()))


def _logits(programs: list[Callable[[Tensor], Tensor]], batches: Iterable[Batch]) -> list[Tensor]:
    """Each program's logits [N, K] of the same images, of which only one batch is held at a time."""
    rows = [[program(batch.images.contiguous()) for program in programs] for batch in batches]
    if not rows:
        raise UserError("there is no image to compare the export on: the validation split is empty")
    return [torch.cat(column) for column in zip(*rows, strict=True)]


# ----------------------------------------------------------------------------------------------------------------------
# ONNX


def require_onnx() -> None:
    """UserError that says what to install unless onnx, onnxruntime and onnxscript (which torch.onnx needs) are there."""
    for name in ("onnx", "onnxruntime", "onnxscript"):
        try:
            __import__(name)
        except ImportError as error:
            raise UserError(
                f"model.onnx needs {name}, which could not be loaded ({error}): pip install onnx onnxruntime onnxscript, or leave "
                "ONNX out with --no-onnx"
            ) from error


def _onnx_bytes(module: Deployed, image_size: int, metadata: dict[str, str]) -> bytes:
    """The module as an ONNX file: input 'images' [batch, 3, S, S], output 'logits' [batch, K], any batch size."""
    with _quiet():
        program = torch.onnx.export(
            module,
            (_random_images(image_size),),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        for node in program.model.graph.all_nodes():  # else every node holds the paths of the files it was traced in
            node.metadata_props.clear()
        program.model.metadata_props.update(metadata)
        return program.model_proto.SerializeToString()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's prints, warnings and log lines."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _onnx_answer(path: Path) -> Callable[[Tensor], Tensor]:
    """onnxruntime on the CPU with torch's number of threads: images [B, 3, S, S] -> logits [B, K]."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.contiguous().numpy()})[0])


# ----------------------------------------------------------------------------------------------------------------------
# The student in its library's names


def _timm_options(path: Path, student: Tapped, image_size: int) -> dict[str, Any] | None:
    """What to give timm.create_model beside checkpoint_path=path so that it answers as the student does; None: timm cannot."""
    import timm

    images = _random_images(image_size)
    name = student.name.rpartition("/")[2]
    if not timm.is_model(name):
        return None
    options: dict[str, Any] = {
        "model_name": name,
        "num_classes": 0 if student.classifier is None else student.num_classes,
    }
    published = timm.get_pretrained_cfg(name)
    if published is not None and published.fixed_input_size:
        options["img_size"] = image_size
    try:
        answer = timm.create_model(**options, checkpoint_path=str(path)).eval()(images)
    except (RuntimeError, TypeError, ValueError):
        return None  # torchvision's net of this name has other layers, or other names for them
    wanted = student.features(images)[1] if student.classifier is None else student(images)
    same = answer.shape == wanted.shape and _compare(answer, wanted).within(FOLDING_TOLERANCE)
    return options if same else None


# ----------------------------------------------------------------------------------------------------------------------
# Cost


def _median_ms(calls: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """Median wall time of each call in ms, all taking turns, after a fifth as many rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs + runs // 5):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(times[runs // 5 :]) for name, times in seconds.items()}


@torch.no_grad()
def measure_cost(
    module: Deployed, image_size: int, runs: int, onnx_answer: Callable[[Tensor], Tensor] | None
) -> dict[str, dict[str, Any]]:
    """Cost of one image [1, 3, S, S] on the CPU, by part.

    runs     timed calls of each, of which the median is taken
    returns  {'backbone' | 'connector' | 'classifier' | 'total' | 'student alone': {"params", "macs", "torch_ms", "onnxruntime_ms"}};
             'student alone' is the backbone with a classifier of its own for as many classes. None where not measured. The
             connector's time has pooling in it: to the teacher's map size, and to z.
    """
    image = _random_images(image_size)[:1]
    x = module.features(image)  # [1, Cs, H, W] or [1, Cs]
    z = module.connect(x)  # [1, C]
    pooled = module.backbone.features(image)[1]  # [1, Cs]
    own = nn.Linear(module.backbone.channels, module.classifier.out_features)
    calls: dict[str, Callable[[], Any]] = {
        "backbone": lambda: module.features(image),
        "connector": lambda: module.connect(x),
        "classifier": lambda: module.classifier(z),
        "total": lambda: module(image),
        "student alone": lambda: own(module.backbone.features(image)[1]),
    }
    if onnx_answer is not None:
        calls["onnxruntime"] = lambda: onnx_answer(image)
    ms = _median_ms(calls, runs)

    def row(name: str, *parts: tuple[nn.Module, Tensor]) -> dict[str, Any]:
        return {
            "params": sum(count_parameters(part) for part, _ in parts),
            "macs": sum(count_macs(part, inputs) for part, inputs in parts),
            "torch_ms": ms[name] if any(count_parameters(part) for part, _ in parts) else 0.0,
            "onnxruntime_ms": ms.get("onnxruntime") if name == "total" else None,
        }

    backbone, connector, classifier = (module.backbone.net, image), (module.connector, x), (module.classifier, z)
    return {
        "backbone": row("backbone", backbone),
        "connector": row("connector", connector),
        "classifier": row("classifier", classifier),
        "total": row("total", backbone, connector, classifier),
        "student alone": row("student alone", backbone, (own, pooled)),
    }


def cost_table(row: dict[str, Any]) -> Table:
    """The costs of `write_export`'s row as a table to print."""
    cost = row["cost"]
    table = Table(
        "part",
        "parameters",
        "MACs per image",
        "torch, ms",
        "onnxruntime, ms",
        title=f"one image on the CPU, {cost['threads']} thread{'' if cost['threads'] == 1 else 's'}, median of {cost['runs']}",
    )
    for name, part in cost["parts"].items():
        if name == "student alone":
            table.add_section()
        times = ("-" if part[key] is None else f"{part[key]:.3f}" for key in ("torch_ms", "onnxruntime_ms"))
        table.add_row(name, f"{part['params']:,}", f"{part['macs']:,}", *times)
    return table


def summary(row: dict[str, Any], folder: Path) -> list[str]:
    """What `write_export`'s row says in sentences: the comparison, timm, where the files are."""
    cost = row["cost"]["parts"]
    total, alone = cost["total"], cost["student alone"]
    lines = []
    if row["connector_joined_with_classifier"]:
        lines.append("the connector's last layer and the classifier are one layer, which is cheaper")
    if row["connector"] is not None:
        extra = total["params"] - alone["params"]
        lines.append(
            f"{abs(extra):,} parameters {'more' if extra >= 0 else 'fewer'} than the student with a classifier of its own, "
            f"{100 * total['macs'] / alone['macs'] - 100:+.1f} % MACs"
        )
    for what, found in row["compared"].items():
        lines.append(
            f"{what}: largest difference {found['difference']:.2e} of logits up to {found['scale']:.3g}, "
            f"{found['disagreements']} other answers on {found['images']} images"
        )
    if row["timm"] is not None:
        arguments = ", ".join(f"{key}={value!r}" for key, value in row["timm"].items() if key != "model_name")
        path = str(folder / STUDENT)
        lines.append(
            f"in timm: timm.create_model({row['timm']['model_name']!r}, {arguments}, checkpoint_path={path!r})"
        )
    else:
        lines.append(f"timm builds no net of the student's name, {row['student']!r}, with these layers")
    if not row["student_has_classifier"]:
        lines.append(f"{STUDENT} is the backbone alone: the student answers through its teacher's classifier")
    lines.append(f"written: {', '.join(name for name in FILES if name == CONFIG or name in row['sha256'])} in {folder}")
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# Files


def refuse_occupied(folder: Path, overwrite: bool) -> None:
    """UserError when `folder` holds anything that no export wrote, or, without `overwrite`, an earlier export."""
    if not folder.exists():
        return
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise UserError(
            f"--out must be a folder, but {folder} cannot be listed ({error.strerror}): choose another"
        ) from error
    foreign = sorted(names - set(FILES))
    if foreign:
        raise UserError(
            f"{folder} holds files that no export wrote ({', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}): choose another "
            "--out, a new or empty folder"
        )
    if names and not overwrite:
        raise UserError(f"{folder} holds an earlier export: give --overwrite to replace it, or choose another --out")


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` in one step when the block ends; whatever goes wrong, it is not there."""
    made = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    old = made.with_suffix(".old")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made.mkdir()
        yield made
        if folder.exists() and any(folder.iterdir()):
            folder.rename(old)
        try:
            made.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left to write the export {folder}: free some space, or choose another --out"
            ) from error
        raise UserError(f"cannot write the export {folder} ({error.strerror}): choose another --out") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _write(path: Path, data: bytes) -> str:
    """Writes and flushes to the disk; returns the SHA-256."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def _safetensors(weights: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in weights.items()}, {"format": "pt"})


def write_export(
    folder: Path,
    distiller: Distiller,
    config: TrainConfig,
    state: dict[str, Any],
    batches: Iterable[Batch],
    *,
    onnx: bool = True,
    overwrite: bool = False,
    runs: int = 25,
) -> dict[str, Any]:
    """Writes model.safetensors, config.json, student.safetensors and model.onnx, once they answer as the trained net does.

    distiller, config, state  of one checkpoint, on the CPU; the distiller in eval mode
    batches    real images to compare on, at least one
    onnx       write model.onnx as well
    overwrite  replace an earlier export in `folder`
    runs       timed calls of each part
    returns    what config.json says
    raises     UserError: `folder` is occupied or cannot be written, there are no images, ONNX is wanted and not installed;
               AnswersDiffer: beyond FOLDING_TOLERANCE or ONNX_TOLERANCE. `folder` is then as it was.
    """
    refuse_occupied(folder, overwrite)
    if onnx:
        require_onnx()
    student = distiller.learner.student
    with _new_folder(folder) as made, torch.no_grad():
        module = deployed_module(distiller, config.image_size)
        row = _describe(module, distiller, config, state)
        row["sha256"][MODEL] = _write(made / MODEL, _safetensors(module.state_dict()))
        row["sha256"][STUDENT] = _write(made / STUDENT, _safetensors(student.native_state_dict()))
        row["timm"] = _timm_options(made / STUDENT, student, config.image_size)
        files.write_text(made / CONFIG, json.dumps(row))  # for load_exported; whole below

        programs: list[Callable[[Tensor], Tensor]] = [distiller.predict, load_exported(made)]
        answer = None
        if onnx:
            described = ("format", "student", "image_size", "preprocessing", "classes")
            metadata = {key: row[key] if isinstance(row[key], str) else json.dumps(row[key]) for key in described}
            metadata["num_classes"] = str(len(row["classes"]))
            row["sha256"][ONNX] = _write(made / ONNX, _onnx_bytes(module, config.image_size, metadata))
            answer = _onnx_answer(made / ONNX)
            programs.append(answer)
        wanted, deployed, *by_onnx = _logits(programs, batches)
        compared = _compare(deployed, wanted)
        row["compared"]["deployed with trained"] = compared._asdict()
        _refuse_beyond(compared, FOLDING_TOLERANCE, "the deployed module's logits differ from the trained net's")
        for logits in by_onnx:
            compared = _compare(logits, deployed)
            row["compared"]["onnxruntime with deployed"] = compared._asdict()
            _refuse_beyond(compared, ONNX_TOLERANCE, "onnxruntime's logits differ from PyTorch's")
        row["cost"] = {
            "threads": torch.get_num_threads(),
            "runs": runs,
            "parts": measure_cost(module, config.image_size, runs, answer),
        }
        files.write_text(made / CONFIG, json.dumps(row, indent=2) + "\n")
    return row


class AnswersDiffer(UserError):
    """An exported file does not compute what the trained net does."""


def _refuse_beyond(compared: Comparison, tolerance: float, what: str) -> None:
    if not compared.within(tolerance):
        raise AnswersDiffer(
            f"{what} by up to {compared.difference:.3g} on {compared.images} images, wanted at most {tolerance:g} of the largest logit, "
            f"{compared.scale:.3g} ({compared.disagreements} answers differ); nothing was written"
        )


def _describe(module: Deployed, distiller: Distiller, config: TrainConfig, state: dict[str, Any]) -> dict[str, Any]:
    """All that is known before anything was compared or measured."""
    through_teacher = distiller.objective.infer_head == "teacher"
    connector = distiller.learner.connector if through_teacher else None
    map_size_t = None
    if connector is not None:
        map_size_t = distiller._map_size_t(_random_images(config.image_size))
    packages = ("ijckd-fast", "torch", "torchvision", "timm", "onnx", "onnxruntime")
    return {
        "format": FORMAT,
        "student": config.student,
        "teacher": state["config"]["teacher"],
        "objective": state["config"]["objective"],
        "logits": "backbone, connector, teacher's classifier" if through_teacher else "backbone, own classifier",
        "connector": None if connector is None else connector.spec,
        "connector_joined_with_classifier": module.joined,
        "student_has_classifier": distiller.learner.student.classifier is not None,
        "teacher_channels": None if connector is None else len(connector.weight),
        "teacher_map_size": map_size_t,
        "image_size": config.image_size,
        "preprocessing": {
            "resize_shorter_side": config.eval_resize,
            "filter": "bilinear, antialiased",
            "center_crop": config.image_size,
            "mean": config.mean,
            "std": config.std,
            "layout": "RGB in [0, 1], minus mean, divided by std, [B, 3, S, S] float32",
        },
        "classes": state["classes"],
        "step": state["step"],
        "evaluated": state["evaluated"],
        "fingerprints": {
            "learner": fingerprint(distiller.learner),
            "teacher": state["inputs"]["teacher"],
            "code": state["code"],
        },
        "versions": {name: run_folder.version_of(name) for name in packages},
        "sha256": {},
        "compared": {},
    }
