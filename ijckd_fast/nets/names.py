"""Nets by name: ours, torchvision's and timm's."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ijckd_fast.errors import UserError, did_you_mean, one_of, out_of_memory, reason_of
from ijckd_fast.nets import cifar_names, listed
from ijckd_fast.nets.intact import refuse_damaged_download
from ijckd_fast.nets.mobilenet import MobileNetV1
from ijckd_fast.nets.probe import unfit_size
from ijckd_fast.nets.tapped import Tapped
from ijckd_fast.nets.weight_choice import find_weights, is_run_checkpoint
from ijckd_fast.nets.weight_files import read_file
from ijckd_fast.nets.weights import misfit
from ijckd_fast.normalisation import Normalisation

_SIDES = (224, 256, 288, 320, 336, 384, 448, 512)  # of images that nets are made for
# torchvision's nets that convert ImageNet's images themselves (transform_input), if the library loads their weights.
_CONVERTED = dict.fromkeys(("googlenet", "inception_v3"), Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
_DROP_PATH = {"timm": "drop_path_rate", "torchvision": "stochastic_depth_prob"}  # the libraries' names for it
_SIDE_CLASSIFIERS = ("aux1", "aux2", "AuxLogits")  # GoogLeNet's and Inception's


def create_model(
    name: str,
    num_classes: int,
    *,
    checkpoint: str | Path | None = None,
    weights: str = "auto",
    rename_by_order: bool = False,
    pretrained: bool = False,
    image_size: int = 224,
    stages: Sequence[str] = (),
    drop_path: float | None = None,
) -> Tapped:
    """Builds a classification net by name and finds its taps. On the CPU, float32, in training mode.

    name         one for small images as `cifar_names.builder` takes it (resnet8x4, wrn_40_2, shufflenetv1, ...), unless
                 it is in `SHARED_NAMES` there; mobilenet_v1; any torchvision classifier; any timm model. In that order;
                 'cifar/NAME', 'torchvision/NAME' and 'timm/NAME' force the library.
    num_classes  K, as in the data
    checkpoint   weights: a file of torch.save or safetensors that has the net's names, behind any prefix and in dicts
                 at any depth, or a run checkpoint of ours. Nothing in it is run. How it was read: `Tapped.notes`
    weights      which of several sets in the file: 'ema', 'raw' or the name it stands under; 'auto': see `find_weights`
    rename_by_order  where names differ and all shapes are equal in their order, take the tensors in that order
    pretrained   the library's published weights (torchvision: IMAGENET1K_V1, which the published pairs use)
    image_size   side in pixels of the images to come; nets of fixed input size are built for it
    stages       names of its layers whose outputs are to be its stages, see `Tapped`; (): find them
    drop_path    stochastic depth: share of the images that the last residual branch is left out for in training, the
                 others' shares rise to it; None: the library's own
    raises       UserError: unknown name (nearest ones given), unfit or unreadable weights, a class count other than K,
                 no final linear layer, drop_path for a net without stochastic depth
    """
    if checkpoint is not None and pretrained:
        raise UserError(f"model {name!r}: expected a checkpoint or published weights, got both: leave out one")
    net = _build(name, num_classes, pretrained, image_size, drop_path)
    own = net.state_dict()  # in the net's order, which `Tapped` changes
    model = Tapped(net, name, num_classes, image_size, stages)
    if checkpoint is not None:
        content = read_file(Path(checkpoint))
        # A run's file has one linear layer where the library's has a convolution or several heads.
        as_cut = is_run_checkpoint(content) and not model.has_plain_classifier
        found = find_weights(
            content,
            model.cut_state_dict() if as_cut else own,
            model.classifier_path,
            str(checkpoint),
            choice=weights,
            by_order=rename_by_order,
            left_out=_SIDE_CLASSIFIERS if hasattr(net, "aux_logits") else (),
        )
        found_weights = model.native_of_cut(found.weights) if as_cut else found.weights
        _refuse_other_size(model, image_size, found_weights, str(checkpoint))
        model.load_native(found_weights, str(checkpoint), found.hint)
        model = Tapped(model.uncut(), name, num_classes, image_size, stages)  # as it is with these weights
        model.notes = found.notes
    return model


def _refuse_other_size(model: Tapped, image_size: int, weights: Mapping[str, Tensor], origin: str) -> None:
    """UserError where weights fit the net as it is built for images of another size, but not for this one."""
    misshapen = misfit(weights, model.native_state_dict()).misshapen
    if not misshapen:
        return
    published = _published_size(model.name)
    for side in dict.fromkeys((published, *_SIDES)):
        if side is None or side == image_size:
            continue
        try:
            with torch.device("meta"):
                other = _build(model.name, model.num_classes, False, side).state_dict()
        except UserError:  # not of this size
            continue
        if not misfit(weights, other).misshapen:
            raise UserError(
                f"{origin} holds weights of {model.name!r} for images of {side}x{side} pixels, expected"
                f" {image_size}x{image_size}: {next(iter(misshapen.values()))}. Set the image size to {side}"
                f" (--image-size {side}){_sibling(model.name, side, image_size)}"
            )


def _sibling(name: str, side: int, image_size: int) -> str:
    """What to add to an error about a net for images of another size: its name for the size asked for, if there is."""
    other = name.replace(str(side), str(image_size))
    return f", or take {other!r} with weights of its own" if other != name and is_model_name(other) else ""


def _published_size(name: str) -> int | None:
    """Side of the images that the published weights of a library's net take, if the net is built for a size."""
    library, short = library_of(name), name.rpartition("/")[2]
    if library == "torchvision" and short.startswith(("vit_", "maxvit_")):
        import torchvision

        side: int = next(iter(torchvision.models.get_model_weights(short))).transforms().crop_size[0]
        return side
    if library == "timm":
        import timm

        config = timm.get_pretrained_cfg(short)
        return config.input_size[-1] if config is not None and config.fixed_input_size else None
    return None


def is_model_name(name: str) -> bool:
    """Whether `create_model` knows a model of this name."""
    return library_of(name) is not None


def library_of(name: str) -> str | None:
    """'own', 'torchvision' or 'timm', in that order of preference; None for no model's name."""
    if listed.is_ours(name):
        return "own"
    # Imported only here: our own nets need neither library, which together take seconds to import.
    import timm
    import torchvision

    library, _, short = name.rpartition("/")
    if library in ("", "torchvision") and short in torchvision.models.list_models(module=torchvision.models):
        return "torchvision"
    return "timm" if library in ("", "timm") and timm.is_model(short) and _has_tag(short) else None


def _has_tag(name: str) -> bool:
    """Whether timm knows the weights that a name of its own names after a dot, if it does."""
    import timm

    architecture, _, tag = name.partition(".")
    return not tag or name in timm.list_pretrained(f"{architecture}.*")


def published_normalisation(name: str, in_file: bool = False) -> Normalisation | None:
    """What images `create_model`'s net of a name takes with its library's published weights, by the library's record.

    in_file  the weights come from a file, not from the library
    returns  None for a net of ours, for no model's name, and where the library does not say
    """
    library, short = library_of(name), name.rpartition("/")[2]
    if library == "torchvision":
        import torchvision

        if in_file and short in _CONVERTED:
            return _CONVERTED[short]
        preset = next(iter(torchvision.models.get_model_weights(short))).transforms()  # of those that _build takes
        return Normalisation.of(preset.mean, preset.std)
    if library == "timm":
        import timm

        config = timm.get_pretrained_cfg(short)
        if config is not None and config.mean and config.std:
            return Normalisation.of(config.mean, config.std)
    return None


def _build(name: str, num_classes: int, pretrained: bool, image_size: int, drop_path: float | None = None) -> nn.Module:
    library, short = library_of(name), name.rpartition("/")[2]
    if library is None:
        raise _unknown(name)
    if library in _DROP_PATH:
        options = {} if drop_path is None else {_DROP_PATH[library]: drop_path}
        build = _build_timm if library == "timm" else _build_torchvision
        return build(short, num_classes, pretrained, image_size, options)
    if drop_path is not None:
        raise _no_drop_path(name)
    if pretrained:
        raise UserError(f"model {name!r} is our own and has no published weights: give a checkpoint instead")
    own = _own_builder(name)
    assert own is not None
    return own(num_classes)


def _no_drop_path(name: str) -> UserError:
    return UserError(
        f"model {name!r} has no stochastic depth, which --drop-path sets: leave --drop-path out, or take a net with it,"
        " such as timm's ViTs, ConvNeXts and ResNets (timm/resnet18)"
    )


def _own_builder(name: str) -> Callable[[int], nn.Module] | None:
    if not listed.is_ours(name):
        return None
    return MobileNetV1 if name in listed.MOBILENETS else cifar_names.builder(name.rpartition("/")[2])


def _unknown(name: str) -> UserError:
    import timm
    import torchvision

    library, _, short = name.rpartition("/")
    architecture, _, tag = short.partition(".")
    if library in ("", "timm") and tag and timm.is_model(architecture):
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
        return UserError(
            f"unknown model {name!r}: timm has no weights {tag!r} of {architecture!r}, expected"
            f" {f'one of {one_of(tags)}, or ' if tags else ''}the name without a tag{did_you_mean(tag, tags)}"
        )
    return listed.unknown(name, (*torchvision.models.list_models(module=torchvision.models), *timm.list_models()))


def _build_torchvision(
    name: str, num_classes: int, pretrained: bool, image_size: int, options: dict[str, Any]
) -> nn.Module:
    import torchvision

    if name.startswith("vit_"):
        options["image_size"] = image_size
    elif name == "maxvit_t":
        options["input_size"] = (image_size, image_size)
    elif name in ("googlenet", "inception_v3") and not pretrained:
        options["init_weights"] = True  # the default, but for a warning that it may change
    if not pretrained:
        build = functools.partial(torchvision.models.get_model, name, weights=None, num_classes=num_classes, **options)
        return _without_side_classifiers(_construct(name, image_size, build))
    weights = torchvision.models.get_model_weights(name)
    # The first, IMAGENET1K_V1 where there is one: the published pairs start from it, not from the later, stronger V2.
    chosen = next(iter(weights))
    _check_published(name, len(chosen.meta["categories"]), num_classes)
    refuse_damaged_download(_from_torch_hub(chosen.url))
    build = functools.partial(torchvision.models.get_model, name, weights=chosen, **options)
    return _without_side_classifiers(_download(f"torchvision/{name}", image_size, build))


def _without_side_classifiers(net: nn.Module) -> nn.Module:
    """GoogLeNet and Inception without the classifiers they have half-way for their own training."""
    for name in _SIDE_CLASSIFIERS:
        if hasattr(net, name):
            setattr(net, name, None)
            net.aux_logits = False  # type: ignore[assignment]
    return net


def _build_timm(name: str, num_classes: int, pretrained: bool, image_size: int, options: dict[str, Any]) -> nn.Module:
    import timm

    config = timm.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size:
        options["img_size"] = image_size
    if not pretrained:
        build = functools.partial(timm.create_model, name, pretrained=False, num_classes=num_classes, **options)
        return _construct(name, image_size, build)
    if config is None or not config.has_weights:
        raise UserError(f"model {name!r} has no published weights in timm: give a checkpoint instead")
    _check_published(name, config.num_classes, num_classes)
    refuse_damaged_download(
        _from_hugging_face(config.hf_hub_id) or _from_torch_hub(config.url if isinstance(config.url, str) else None)
    )
    build = functools.partial(timm.create_model, name, pretrained=True, **options)
    return _download(f"timm/{name}", image_size, build)


def _from_torch_hub(url: str | None) -> Path | None:
    """Where torch.hub keeps what it downloads from an address."""
    return Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2]) if url else None


def _from_hugging_face(repository: str | None) -> Path | None:
    """The weights that Hugging Face's cache has of a repository, in the format that timm prefers; None for none."""
    if not repository or importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(repository, name) for name in ("model.safetensors", "pytorch_model.bin"))
    return next((Path(path) for path in found if isinstance(path, str)), None)


def _check_published(name: str, published: int, num_classes: int) -> None:
    # torchvision would refuse in its own words; timm would silently start a random classifier.
    if published != num_classes:
        raise UserError(
            f"the published weights of {name!r} classify {published} classes, expected {num_classes} as in the data:"
            " train this model on the data first (objective 'ce') and give the checkpoint"
        )


def _refuse_drop_path(name: str, error: Exception) -> None:
    """UserError if a net does not take the option of stochastic depth."""
    if isinstance(error, TypeError) and any(repr(option) in str(error) for option in _DROP_PATH.values()):
        raise _no_drop_path(name) from error


def _construct(name: str, image_size: int, build: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build()
    except Exception as error:  # each architecture refuses a size in its own way
        _refuse_drop_path(name, error)
        raise unfit_size(name, image_size, error) from error


def _download(name: str, image_size: int, build: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build()
    except Exception as error:  # each library and transport has its own family of errors
        _refuse_drop_path(name, error)
        if out_of_memory(error):
            raise unfit_size(name, image_size, error) from error
        side = _published_size(name)
        if side not in (None, image_size) and ("size mismatch" in str(error) or "expected value" in str(error)):
            raise UserError(
                f"the published weights of {name!r} are for images of {side}x{side} pixels, expected"
                f" {image_size}x{image_size}: set the image size to {side} (--image-size {side})"
                f"{_sibling(name, side or 0, image_size)}"
            ) from error
        raise UserError(
            f"the published weights of {name!r} could not be loaded ({reason_of(error)}): check the network, or"
            " download the file elsewhere and give it as the checkpoint"
        ) from error
