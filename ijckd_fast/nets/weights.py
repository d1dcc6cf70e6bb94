"""Weights: read from files, compared with what a module takes, and known by a digest."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ijckd_fast.errors import UserError


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name, on the CPU, with wrappers' prefixes dropped.

    raises  UserError where there is no file, or one that holds no weights
    """
    if not path.is_file():
        raise UserError(f"checkpoint {str(path)!r} does not exist: give the path of a weights file")
    if path.suffix == ".safetensors":
        import safetensors.torch

        try:
            content: Any = safetensors.torch.load_file(path)
        except Exception as error:
            raise _unreadable(path, error) from error
    else:
        try:
            # torchvision's and timm's training scripts keep their command line beside the weights.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise _unreadable(path, error) from error
    for key in ("learner", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(
            f"checkpoint {str(path)!r} holds no model weights, expected a state_dict (names to tensors), alone or under"
            " 'model' or 'state_dict': save one with torch.save(model.state_dict(), path)"
        )
    weights = {str(k): v for k, v in content.items()}
    for prefix in ("module.", "_orig_mod."):  # DistributedDataParallel's and torch.compile's
        if all(k.startswith(prefix) for k in weights):
            weights = {k.removeprefix(prefix): v for k, v in weights.items()}
    return weights


def _unreadable(path: Path, error: Exception) -> UserError:
    if "Unsupported global" in str(error) or "Unsupported class" in str(error):
        return UserError(
            f"checkpoint {str(path)!r} holds Python objects that loading would execute, expected tensors only: save its"
            " state_dict alone with torch.save(model.state_dict(), path)"
        )
    return UserError(
        f"checkpoint {str(path)!r} ({path.stat().st_size} bytes) is not a readable weights file; it is truncated or of"
        f" another format: copy or download it again ({type(error).__name__})"
    )


def native_names(weights: dict[str, Tensor], classifier_path: str, origin: str | Path) -> dict[str, Tensor]:
    """A learner's names (student.net.*, student.classifier.*, connector.*) as the original net's; others unchanged.

    classifier_path  the classifier's name in the original net
    origin           what to call the weights in an error
    raises           UserError for a learner whose student has no classifier
    """
    if not any(k.startswith("student.net.") for k in weights):
        return weights
    if not any(k.startswith("student.classifier.") for k in weights):
        raise UserError(
            f"checkpoint {str(origin)!r} is of a student without a classifier of its own (it answers through its"
            " teacher's), expected a whole model: give a checkpoint of an objective that trains the student's"
            " classifier (ce, kd, dkd, fitnet, at, srrl)"
        )
    native = {}
    for key, value in weights.items():
        if key.startswith("student.net."):
            native[key.removeprefix("student.net.")] = value
        elif key.startswith("student.classifier."):
            native[f"{classifier_path}.{key.removeprefix('student.classifier.')}"] = value
    return native


class Misfit(NamedTuple):
    """The names by which weights differ from what a module takes. As a string: a few of each, for an error."""

    missing: list[str]
    unexpected: list[str]
    misshapen: dict[str, str]  # name -> "'NAME' is [3, 2], expected [2, 2]"

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        faults = [_a_few("missing", map(repr, self.missing)), _a_few("unexpected", map(repr, self.unexpected))]
        faults.append(_a_few("of another shape", self.misshapen.values()))
        return "; ".join(fault for fault in faults if fault)


def misfit(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Misfit:
    """Compares the names and shapes of `weights` with those of a module's state, `own`."""
    misshapen = {
        name: f"{name!r} is {list(weights[name].shape)}, expected {list(own[name].shape)}"
        for name in own
        if name in weights and own[name].shape != weights[name].shape
    }
    return Misfit([name for name in own if name not in weights], [n for n in weights if n not in own], misshapen)


def require_fit(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], origin: str, fault: str, remedy: str) -> None:
    """UserError unless `weights` have the names and shapes of a module's state, `own`, and finite values.

    origin, fault, remedy  of the error: "ORIGIN FAULT: missing 'a'; unexpected 'b'. REMEDY"
    """
    differing = misfit(weights, own)
    if differing:
        raise UserError(f"{origin} {fault}: {differing}. {remedy}")
    for name, value in weights.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(
                f"{origin}: tensor {name!r} holds NaN or infinite values, expected finite weights:"
                " the run that wrote it diverged, take an earlier checkpoint"
            )


def _a_few(what: str, items: Iterable[str]) -> str:
    items = list(items)
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return f"{what} {', '.join(items[:3])}{more}" if items else ""


def fingerprint(module: nn.Module) -> str:
    """Hex digest of the names, shapes and bytes of a module's state: modules with equal digests compute the same."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in module.state_dict().items():
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name}{list(value.shape)}{value.dtype}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
