"""config.json of an export: all that is needed to use its files; and the same in sentences."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ijckd_fast.data import class_names
from ijckd_fast.export.deployed import Deployed, random_images
from ijckd_fast.export.folder import CONFIG, FILES, FORMAT, STUDENT
from ijckd_fast.nets import fingerprint
from ijckd_fast.train import run_folder

if TYPE_CHECKING:
    from ijckd_fast.train import LoadedRun


def describe(module: Deployed, run: LoadedRun) -> dict[str, Any]:
    """The keys of config.json that are known before anything was compared or measured."""
    distiller, config, saved = run.distiller, run.config, run.saved
    through_teacher = distiller.objective.infer_head == "teacher"
    connector = distiller.connector if through_teacher else None
    map_size_t = None
    if connector is not None:
        map_size_t = distiller.map_size_t(random_images(config.image_size))
    packages = ("ijckd-fast", "torch", "torchvision", "timm", "onnx", "onnxruntime")
    return {
        "format": FORMAT,
        "student": config.student,
        "teacher": saved.config["teacher"],
        "objective": saved.config["objective"],
        "logits": "backbone, connector, teacher's classifier" if through_teacher else "backbone, own classifier",
        "connector": None if connector is None else connector.spec,
        "connector_joined_with_classifier": module.joined,
        "student_has_classifier": distiller.student.classifier is not None,
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
        "classes": saved.classes,
        "class_names": class_names(saved.classes),
        "step": saved.step,
        "evaluated": saved.evaluated,
        "fingerprints": {
            "learner": fingerprint(distiller),
            "teacher": saved.inputs["teacher"],
            "code": saved.code,
        },
        "versions": {name: run_folder.version_of(name) for name in packages},
        "sha256": {},
        "compared": {},
    }


def summary_lines(row: dict[str, Any], folder: Path) -> list[str]:
    """What config.json says, in sentences: how the answers compare, timm, where the files are."""
    cost = row["cost"]["parts"]
    total, alone = cost["total"], cost["student alone"]
    lines = []
    if row["connector_joined_with_classifier"]:
        lines.append("the connector's last layer and the classifier are one layer, which is cheaper")
    if row["connector"] is not None:
        extra = total["params"] - alone["params"]
        lines.append(
            f"{abs(extra):,} parameters {'more' if extra >= 0 else 'fewer'} than the student with a classifier of its "
            f"own, {100 * total['macs'] / alone['macs'] - 100:+.1f} % MACs"
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
