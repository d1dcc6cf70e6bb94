"""What a loss term is: its settings, what it needs, its value."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from ijckd_fast.setting import setting

if TYPE_CHECKING:
    from torch import Tensor, distributed as dist, nn
    from typing_extensions import Self

    from ijckd_fast.distill.connectors import Connector
    from ijckd_fast.head import FrozenClassifier
    from ijckd_fast.nets import CachedTeacher, Stage, Tapped


class Needs(enum.Flag):
    """What a term reads, so what a training step must make for it; which parts are built and trained follows.

    OWN_LOGITS    logits of the student's own classifier [B, K]; trains it
    CONNECTED     z [B, Ct], the student's connected and pooled features; trains the connector
    CLASSIFIER    z through the teacher's frozen classifier, for a loss that the fused op has
    LOGITS_Z      the logits [B, K] of z through the teacher's frozen classifier, for losses in plain PyTorch
    ANSWER        z through the teacher's frozen classifier, without a loss
    MAP_T         the teacher's map [B, Ct, H, W], for the connector's op to match
    MAP_Z         Z [B, Ct, H, W], the student's connected map whose mean is z, in plain PyTorch
    FULL_MAP_T    the teacher's map [B, Ct, Ht, Wt] at its own size, whose mean its classifier sees
    MAP_S         the student's own map [B, Cs, Hs, Ws], whose mean its classifier sees
    CLASS_MAPS_S  what its classifier makes of that without a bias, so that another term must train the bias
    POOLED_S      the student's own pooled features [B, Cs], what its classifier sees
    POOLED_T      the teacher's pooled features [B, Ct]
    MATCH_POOLED  the same, for the connector's op to match
    LOGITS_T      the teacher's own logits [B, K]
    STAGES        maps of stages of both nets
    PROGRESS      how many epochs are done
    WHOLE_BATCH   all images of a batch at once: its loss is no mean over images, so that a batch's parts, one after the
                  other, do not add up to it
    """

    OWN_LOGITS = enum.auto()
    CONNECTED = enum.auto()
    CLASSIFIER = enum.auto()
    LOGITS_Z = enum.auto()
    ANSWER = enum.auto()
    MAP_T = enum.auto()
    MAP_Z = enum.auto()
    FULL_MAP_T = enum.auto()
    MAP_S = enum.auto()
    CLASS_MAPS_S = enum.auto()
    POOLED_S = enum.auto()
    POOLED_T = enum.auto()
    MATCH_POOLED = enum.auto()
    LOGITS_T = enum.auto()
    STAGES = enum.auto()
    PROGRESS = enum.auto()
    WHOLE_BATCH = enum.auto()


NOTHING = Needs(0)
TEACHER_FEATURES = (
    Needs.MAP_T | Needs.FULL_MAP_T | Needs.POOLED_T | Needs.LOGITS_T | Needs.STAGES
)  # for these the teacher's backbone is run


class Nets(NamedTuple):
    """What a term's own modules are built for. pairs: stages (student's, teacher's) that terms compare, by number."""

    student: Tapped
    teacher: Tapped | CachedTeacher | None
    pairs: Mapping[int, tuple[Stage, Stage]]


@dataclass(frozen=True)
class Seen:
    """What a training step has made of a batch when the terms are computed. None: no term of the objective needs it.

    labels           [B] int64 in [0, K)
    labels_b, mix    [B] int64, [B] in [0, 1]: images mixed of two, of which `labels` weighs mix and labels_b 1 - mix
    label_smoothing  of the hard-label cross-entropy, in [0, 1)
    progress         epochs done so far, fractions included; a number or a tensor []
    head             'fused': the C++/CUDA ops; 'reference': plain PyTorch
    logits           [B, K] of the student's own classifier, float32 (float64); takes a gradient
    logits_z         [B, K] of z through the teacher's frozen classifier, float32 (float64); takes a gradient
    z                [B, Ct] connected and pooled features, float32 (float64); takes a gradient
    unprojected      [B, Cin] in z's place where the loss has the connector's projection in its own op; takes a gradient
    fm               [] distance of the connected features to the teacher's, by the connector's op; takes a gradient
    map_z            Z [B, Ct, H, W], float32 (float64); takes a gradient
    map_t            [B, Ct, Ht, Wt] the teacher's, at its own size, whichever need it was made for
    map_s            [B, Cs, Hs, Ws] the student's own; takes a gradient
    pooled_s         [B, Cs]; takes a gradient
    pooled_t         [B, Ct]
    logits_t         [B, K] float32 (float64)
    stages           (map_s [B, Cs, H, W], map_t [B, Ct, H, W]) of equal size by the stage's number, 1 that of the
                     largest maps
    connector        the student's; classifier: the teacher's; frozen: what is kept of that from step to step;
                     classifier_s: the student's own
    modules          what the terms built, by name, among the distiller's other parts
    group            the processes among which a batch is shared out, for what is taken over all of it; None: this one
                     has all
    """

    labels: Tensor
    labels_b: Tensor | None
    mix: Tensor | None
    label_smoothing: float
    progress: float | Tensor | None
    head: str
    logits: Tensor | None
    logits_z: Tensor | None
    z: Tensor | None
    unprojected: Tensor | None
    fm: Tensor | None
    map_z: Tensor | None
    map_t: Tensor | None
    map_s: Tensor | None
    pooled_s: Tensor | None
    pooled_t: Tensor | None
    logits_t: Tensor | None
    stages: Mapping[int, tuple[Tensor, Tensor]]
    connector: Connector | None
    classifier: nn.Linear | None
    classifier_s: nn.Linear | None
    frozen: FrozenClassifier
    modules: Mapping[str, nn.Module | None]
    group: dist.ProcessGroup | None

    def pair(self, classifier: Classifier) -> tuple[Tensor, Tensor]:
        """(the student's logits of that classifier, the teacher's), [B, K] each: what `logits_of` asks for."""
        logits = self.logits if classifier == "student" else self.logits_z
        assert logits is not None
        assert self.logits_t is not None
        return logits, self.logits_t

    def prepared_classifier(self, *, match: bool) -> tuple[Tensor, Tensor | None]:
        """(the teacher's weight [K, Ct], its gram or None) as `classifier_loss` takes them. match: of a logit match."""
        assert self.classifier is not None
        weight = self.classifier.weight
        if self.head == "fused" and weight.is_cuda:  # on a CPU the op rounds it and keeps its gram itself
            return self.frozen.prepared(weight, match=match)
        return weight, None

    def mixed(self, per_image: Callable[[Tensor], Tensor]) -> Tensor:
        """Mean over the batch of a loss that takes labels [B] and gives [B]; of mixed images it is mixed likewise."""
        rows = per_image(self.labels)  # [B]
        if self.labels_b is not None and self.mix is not None:
            rows = self.mix * rows + (1 - self.mix) * per_image(self.labels_b)
        return rows.mean()


class Value(NamedTuple):
    """What a term gives.

    loss     [] weighted, with its gradient
    parts    unweighted values by the log's names, each [], detached
    correct  [] int64: how many images the teacher's classifier puts in class `labels`; None where it was not asked
    """

    loss: Tensor
    parts: dict[str, Tensor]
    correct: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Term:
    """A loss term. Its dataclass fields are its settings, declared by `ijckd_fast.setting.setting`.

    torch is imported inside the methods that compute: the settings are read for the help, which does not wait for it.

    A subclass is a row of TERMS in `terms/__init__.py`. The options of the command line, the keys of config.yaml, the
    fields of `Objective`, the checks and the names in the log follow from it. A setting that several terms have stands
    in one class that they inherit. Every weight multiplies a mean, so that its meaning does not depend on the sizes of
    batch and maps (SRD's multiplies a logarithm).

    parts  names of its unweighted values in the log, in their order
    """

    parts: ClassVar[tuple[str, ...]]

    @property
    def takes_unprojected(self) -> bool:
        """Whether its value can do with `seen.unprojected` instead of z."""
        return False

    @classmethod
    def of(cls, settings: Any) -> Self:
        """The term with its settings, taken from an object that has them (and others) as attributes."""
        return cls(**{f.name: getattr(settings, f.name) for f in dataclasses.fields(cls)})

    @property
    def needs(self) -> Needs:
        """What its value is computed from; NOTHING: the term is off."""
        raise NotImplementedError

    def fault(self) -> str | None:
        """What is wrong with its settings together, and what to do, also of a term that is off.

        Bounds and choices are checked already.
        """
        return None

    def stages(self, common: int, nets: str) -> Iterable[int]:
        """Numbers of the stages it compares, of the `common` ones that both nets have, 1 that of the largest maps.

        raises  UserError where there is no such stage; nets: both nets with their stages, in words
        """
        return ()

    def build(self, nets: Nets) -> Mapping[str, nn.Module]:
        """Modules it trains, by their names among the distiller's parts."""
        return {}

    def value(self, seen: Seen) -> Value | None:
        """Its part of the loss of a batch; None where another term's op has it. Nothing waits for the device."""
        raise NotImplementedError


Classifier = Literal["teacher", "student"]


def logits_of(classifier: Classifier) -> Needs:
    """What a term that compares logits in plain PyTorch needs: the student's of that classifier, and the teacher's."""
    student = Needs.OWN_LOGITS if classifier == "student" else Needs.CONNECTED | Needs.LOGITS_Z
    return student | Needs.LOGITS_T


@dataclass(frozen=True, kw_only=True)
class Temperature:
    """The temperature, shared by the terms that soften logits."""

    temperature: float = setting(4.0, "temperature T of the KL, DKD, NKD, DIST and SDD terms", above=0, finite=True)


@dataclass(frozen=True, kw_only=True)
class StandardizedLogits:
    """Whether terms see logits or their z-scores, Sun et al. 2024. A temperature then divides the z-scores."""

    standardize_logits: bool = setting(
        False,
        "give the KL, DKD, NKD, TTM and WTTM terms the z-scores of both nets' logits, row by row, before the"
        " temperature: only the order and the relative distances of the classes are then matched, not their scale",
    )

    @property
    def takes_standardized(self) -> bool:
        """Whether it compares logits, where it is on."""
        return True

    def scaled(self, logits: Tensor, logits_t: Tensor) -> tuple[Tensor, Tensor]:
        """Both [B, K] as these terms take them."""
        return (z_scores(logits), z_scores(logits_t)) if self.standardize_logits else (logits, logits_t)


@dataclass(frozen=True, kw_only=True)
class InferenceHead:
    """Which classifier answers after training."""

    infer_head: Classifier = setting("student", "classifier the trained student answers through")


def weight(help: str, **about: Any) -> Any:
    """A setting that multiplies a term: a finite number >= 0, off by default."""
    return setting(0.0, f"weight of {help}", least=0, finite=True, **about)


def z_scores(logits: Tensor) -> Tensor:
    """(l - mean) / (std + 1e-7) of every row [K], the unbiased standard deviation, as the authors have it: [B, K]."""
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)


def kl_rows(logits: Tensor, logits_t: Tensor, temperature: float) -> Tensor:
    """KL(softmax(logits_t / T) || softmax(logits / T)) of every row: [B, K], [B, K] -> [B], nats, no factor T^2."""
    import torch.nn.functional as F

    log_p = F.log_softmax(logits / temperature, 1)
    log_p_t = F.log_softmax(logits_t / temperature, 1)
    return F.kl_div(log_p, log_p_t, reduction="none", log_target=True).sum(1)


def without_class(logits: Tensor, labels: Tensor) -> Tensor:
    """logits [B, K] in which the class of each label [B] has weight exactly 0 in a softmax."""
    import torch

    # The lowest number, not -inf: no 0 * inf arises.
    return logits.scatter(1, labels[:, None], torch.finfo(logits.dtype).min)
