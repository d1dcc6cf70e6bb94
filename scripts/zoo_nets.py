"""Which nets scripts/zoo looks at: one of every family of torchvision and timm, and two samples of them."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

# The net with the fewest parameters of each family: of timm 1.0.31's modules (without its test nets), and of
# torchvision 0.29.1's functions that share a builder; the smallest first. A family of another version that is not here:
# `smallest`.
TIMM = {
    "starnet": "starnet_s050", "dla": "dla46x_c", "mobilevit": "mobilevit_xxs", "edgenext": "edgenext_xx_small",
    "mobilenetv3": "mobilenetv3_small_050", "vovnet": "ese_vovnet19b_slim_dw", "efficientnet": "mnasnet_small",
    "convnext": "convnext_zepto_rms", "repghost": "repghostnet_050", "efficientvit_msra": "efficientvit_m0",
    "ghostnet": "ghostnet_050", "regnet": "regnetx_002", "cspnext": "cspnext_tiny", "iformer": "iformer_t",
    "xcit": "xcit_nano_12_p8_224", "cspnet": "cs3darknet_focus_s", "efficientvit_mit": "efficientvit_b0",
    "swiftformer": "swiftformer_xs", "efficientformer_v2": "efficientformerv2_s0", "pvt_v2": "pvt_v2_b0",
    "fasternet": "fasternet_t0", "fastvit": "fastvit_t8", "lcnetv2": "lcnetv2_small",
    "inception_next": "inception_next_atto", "rexnet": "rexnet_100", "byobnet": "mobileone_s1",
    "pit": "pit_ti_224", "hardcorenas": "hardcorenas_b", "resnet": "resnet10t",
    "eva": "vit_tiny_patch16_dinov3_qkvb", "repvit": "repvit_m1", "coat": "coat_tiny", "convit": "convit_tiny",
    "deit": "deit_tiny_patch16_224", "vision_transformer": "vit_tiny_patch16_224", "mlp_mixer": "gmlp_ti16_224",
    "hgnet": "hgnetv2_b0", "shvit": "shvit_s1", "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "cpubone": "cpubone_nano", "efficientvim": "efficientvim_m1", "crossvit": "crossvit_tiny_240",
    "mambaout": "mambaout_femto", "maxxvit": "maxvit_pico_rw_256", "levit": "levit_128s",
    "densenet": "densenet121", "byoanet": "halonet_h1", "dpn": "dpn48b", "visformer": "visformer_tiny",
    "resnest": "resnest14d", "csatv2": "csatv2", "resnetv2": "resnetv2_18", "senet": "legacy_seresnet18",
    "metaformer": "poolformer_s12", "cait": "cait_xxs24_224", "sknet": "skresnet18", "gcvit": "gcvit_xxtiny",
    "tiny_vit": "tiny_vit_5m_224", "efficientformer": "efficientformer_l1", "hrnet": "hrnet_w18_small",
    "lowformer": "lowformer_b0", "nfnet": "nf_ecaresnet26", "nest": "nest_tiny", "convmixer": "convmixer_768_32",
    "vision_transformer_relpos": "vit_srelpos_small_patch16_224", "vitamin": "vitamin_small_224",
    "xception": "legacy_xception", "tnt": "tnt_s_legacy_patch16_224", "inception_v3": "inception_v3",
    "rdnet": "rdnet_tiny", "twins": "twins_svt_small", "mvitv2": "mvitv2_tiny", "res2net": "res2next50",
    "volo": "volo_d1_224", "hieradet_sam2": "sam2_hiera_tiny", "xception_aligned": "xception41p",
    "sequencer": "sequencer2d_s", "hiera": "hiera_tiny_224", "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224", "swin_transformer_v2": "swinv2_tiny_window16_256",
    "davit": "davit_tiny", "focalnet": "focalnet_tiny_srf", "selecsls": "selecsls42", "tresnet": "tresnet_m",
    "nextvit": "nextvit_small", "inception_v4": "inception_v4", "inception_resnet_v2": "inception_resnet_v2",
    "mobilenetv5": "mobilenetv5_base", "pnasnet": "pnasnet5large", "beit": "beit_base_patch16_224",
    "naflexvit": "naflexvit_base_patch16_parfac_gap", "vision_transformer_sam": "samvit_base_patch16_224",
    "qwen3_vit": "qwen3_vit_88m", "nasnet": "nasnetalarge", "vgg": "vgg11", "gemma4_vit": "gemma4_vit_167m",
    "deepseek_vit": "deepseek_vit_412m",
}  # fmt: skip
TORCHVISION = {
    "squeezenet": "squeezenet1_1", "shufflenetv2": "shufflenet_v2_x0_5", "mnasnet": "mnasnet0_5",
    "mobilenet_v3": "mobilenet_v3_small", "mobilenet_v2": "mobilenet_v2", "regnet": "regnet_y_400mf",
    "efficientnet": "efficientnet_b0", "googlenet": "googlenet", "densenet": "densenet121", "resnet": "resnet18",
    "efficientnet_v2": "efficientnet_v2_s", "resnext": "resnext50_32x4d", "inception": "inception_v3",
    "swin": "swin_t", "swin_v2": "swin_v2_t", "convnext": "convnext_tiny", "maxvit": "maxvit_t",
    "alexnet": "alexnet", "wide_resnet": "wide_resnet50_2", "vit": "vit_b_16", "vgg": "vgg11", "vgg_bn": "vgg11_bn",
}  # fmt: skip

# What comes in kinds: plain and depthwise convolutions, a classifier behind more layers, branches merged for inference,
# tokens with and without a class token, windows, channels last, layers after pooling, two heads.
SAMPLE = (
    "torchvision/resnet18", "torchvision/shufflenet_v2_x0_5", "torchvision/squeezenet1_1", "timm/mobilenetv3_small_050",
    "timm/mobileone_s1", "timm/convnext_zepto_rms", "timm/vit_tiny_patch16_224", "timm/gmlp_ti16_224",
    "timm/levit_128s", "timm/efficientvit_m0", "timm/dla46x_c", "timm/swin_tiny_patch4_window7_224",
)  # fmt: skip
EXPORTED = (
    "torchvision/resnet18", "torchvision/shufflenet_v2_x0_5", "torchvision/mobilenet_v3_small",
    "torchvision/mnasnet0_5", "torchvision/efficientnet_b0", "torchvision/swin_t", "torchvision/convnext_tiny",
    "timm/mobilenetv3_small_050", "timm/mobileone_s1", "timm/convnext_zepto_rms", "timm/vit_tiny_patch16_224",
    "timm/deit_tiny_patch16_224", "timm/gmlp_ti16_224", "timm/levit_128s", "timm/efficientvit_m0", "timm/dla46x_c",
    "timm/fastvit_t8", "timm/swin_tiny_patch4_window7_224", "timm/hiera_tiny_224", "timm/repvit_m1",
    "timm/regnetx_002", "timm/edgenext_xx_small",
)  # fmt: skip


class Net(NamedTuple):
    """A net, and the family that it stands for; '' for one that was asked for by its name."""

    library: str
    family: str
    name: str

    @property
    def full(self) -> str:
        return f"{self.library}/{self.name}"


def families() -> list[str]:
    """timm's modules with nets. A net that somebody else registered stands under his own module's name: not timm's."""
    import timm

    return [family for family in timm.list_modules() if importlib.util.find_spec(f"timm.models.{family}")]


def every() -> list[Net]:
    """One of each family, the tables' or, of a family that is not in them, the smallest one."""
    import timm

    nets = []
    there = families()
    for family in [*(f for f in TIMM if f in there), *(f for f in there if f not in TIMM)]:
        known = TIMM.get(family)
        name = known if known is not None and timm.is_model(known) else smallest(family)
        if name is not None:
            nets.append(Net("timm", family, name))
    return [*nets, *(Net("torchvision", family, name) for family, name in TORCHVISION.items())]


def smallest(family: str) -> str | None:
    """timm's net of a module with the fewest parameters; None where it has none. Builds them all, without memory."""
    import timm

    names = [name for name in timm.list_models(module=family) if not name.startswith("test_")]
    return min(names, key=lambda name: parameters_of(Net("timm", family, name)), default=None)


def parameters_of(net: Net) -> int:
    """How many it has, with the classifier of its library's own number of classes."""
    import timm
    import torch
    import torchvision

    def built() -> torch.nn.Module:
        if net.library == "timm":
            return timm.create_model(net.name)
        quiet = {"init_weights": False} if net.name in ("googlenet", "inception_v3") else {}
        return torchvision.models.get_model(net.name, weights=None, **quiet)

    try:
        with torch.device("meta"):
            made = built()
    except NotImplementedError:  # torchvision's RegNet reads values while it is built
        made = built()
    return sum(parameter.numel() for parameter in made.parameters())


def named(names: list[str]) -> list[Net]:
    """The nets of these names, as `create_model` takes them, with their families if they stand for one."""
    from ijckd_fast.errors import UserError
    from ijckd_fast.nets import create_model, library_of

    families = {net.full: net for net in [Net("torchvision", f, n) for f, n in TORCHVISION.items()]}
    families |= {f"timm/{name}": Net("timm", family, name) for family, name in TIMM.items()}
    nets = []
    for name in names:
        library = library_of(name)
        if library is None:
            create_model(name, 10)  # says what is wrong with it
            raise UserError(f"unknown model {name!r}")
        net = Net(library, "", name.rpartition("/")[2])
        nets.append(families.get(net.full, net))
    return nets
