"""Which nets scripts/zoo looks at: one of every family of torchvision and timm, and two samples of them."""

from __future__ import annotations

from typing import NamedTuple

# The net with the fewest parameters of each family: of timm 1.0.31's modules (without its test nets), and of
# torchvision 0.29.1's functions that share a builder. A family of another version that is not here: `smallest`.
TIMM = {
    "beit": "beit_base_patch16_224", "byoanet": "halonet_h1", "byobnet": "mobileone_s1", "cait": "cait_xxs24_224",
    "coat": "coat_tiny", "convit": "convit_tiny", "convmixer": "convmixer_768_32",
    "convnext": "convnext_zepto_rms", "cpubone": "cpubone_nano", "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2", "cspnet": "cs3darknet_focus_s", "cspnext": "cspnext_tiny", "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m", "deit": "deit_tiny_patch16_224", "densenet": "densenet121",
    "dla": "dla46x_c", "dpn": "dpn48b", "edgenext": "edgenext_xx_small", "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0", "efficientnet": "mnasnet_small",
    "efficientvim": "efficientvim_m1", "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0", "eva": "vit_tiny_patch16_dinov3_qkvb", "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8", "focalnet": "focalnet_tiny_srf", "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m", "ghostnet": "ghostnet_050", "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0", "hiera": "hiera_tiny_224", "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small", "iformer": "iformer_t", "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2", "inception_v3": "inception_v3", "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small", "levit": "levit_128s", "lowformer": "lowformer_b0", "mambaout": "mambaout_femto",
    "maxxvit": "maxvit_pico_rw_256", "metaformer": "poolformer_s12", "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "mobilenetv3_small_050", "mobilenetv5": "mobilenetv5_base", "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny", "naflexvit": "naflexvit_base_patch16_parfac_gap", "nasnet": "nasnetalarge",
    "nest": "nest_tiny", "nextvit": "nextvit_small", "nfnet": "nf_ecaresnet26", "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large", "pvt_v2": "pvt_v2_b0", "qwen3_vit": "qwen3_vit_88m", "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002", "repghost": "repghostnet_050", "repvit": "repvit_m1", "res2net": "res2next50",
    "resnest": "resnest14d", "resnet": "resnet10t", "resnetv2": "resnetv2_18", "rexnet": "rexnet_100",
    "selecsls": "selecsls42", "senet": "legacy_seresnet18", "sequencer": "sequencer2d_s", "shvit": "shvit_s1",
    "sknet": "skresnet18", "starnet": "starnet_s050", "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224", "swin_transformer_v2": "swinv2_tiny_window16_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224", "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224", "tresnet": "tresnet_m", "twins": "twins_svt_small", "vgg": "vgg11",
    "visformer": "visformer_tiny", "vision_transformer": "vit_tiny_patch16_224",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "vit_srelpos_small_patch16_224",
    "vision_transformer_sam": "samvit_base_patch16_224", "vitamin": "vitamin_small_224", "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw", "xception": "legacy_xception", "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}  # fmt: skip
TORCHVISION = {
    "alexnet": "alexnet", "convnext": "convnext_tiny", "densenet": "densenet121",
    "efficientnet": "efficientnet_b0", "efficientnet_v2": "efficientnet_v2_s", "googlenet": "googlenet",
    "inception": "inception_v3", "maxvit": "maxvit_t", "mnasnet": "mnasnet0_5", "mobilenet_v2": "mobilenet_v2",
    "mobilenet_v3": "mobilenet_v3_small", "regnet": "regnet_y_400mf", "resnet": "resnet18",
    "resnext": "resnext50_32x4d", "shufflenetv2": "shufflenet_v2_x0_5", "squeezenet": "squeezenet1_1",
    "swin": "swin_t", "swin_v2": "swin_v2_t", "vgg": "vgg11", "vgg_bn": "vgg11_bn", "vit": "vit_b_16",
    "wide_resnet": "wide_resnet50_2",
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


def every() -> list[Net]:
    """One of each family, the tables' or, of a family that is not in them, the smallest one."""
    import timm

    nets = [Net("torchvision", family, name) for family, name in TORCHVISION.items()]
    for family in timm.list_modules():
        known = TIMM.get(family)
        name = known if known is not None and timm.is_model(known) else smallest(family)
        if name is not None:
            nets.append(Net("timm", family, name))
    return nets


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

    with torch.device("meta"):
        if net.library == "timm":
            built = timm.create_model(net.name)
        else:
            quiet = {"init_weights": False} if net.name in ("googlenet", "inception_v3") else {}
            built = torchvision.models.get_model(net.name, weights=None, **quiet)
    return sum(parameter.numel() for parameter in built.parameters())


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
