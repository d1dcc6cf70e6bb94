"""The training step as a module: student, connector, the losses of an `Objective`, the frozen teacher beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from ijckd_fast.distill.comparable import equal_sizes, full, pool_to, smaller
from ijckd_fast.distill.compared import Compared, compare
from ijckd_fast.distill.connector_spec import takes_map
from ijckd_fast.distill.connectors import Connector, build_connector
from ijckd_fast.distill.cost import deployed_cost
from ijckd_fast.distill.heads import HEADS
from ijckd_fast.distill.nets_fit import require_maps
from ijckd_fast.distill.objectives import Objective
from ijckd_fast.distill.terms import Needs, Seen
from ijckd_fast.distill.terms.term import TEACHER_FEATURES, Nets
from ijckd_fast.errors import UserError, did_you_mean
from ijckd_fast.nets import CachedTeacher, Stage, Tapped
from ijckd_fast.parallel import all_processes, synchronise_batch_norm


class StepOutput(NamedTuple):
    """What one step hands to the loop; all on the device, nothing of it has been waited for.

    loss     []  the weighted sum; differentiable
    parts    the unweighted terms that are on, by name (terms.PARTS, e.g. 'ce' and 'fm'), each [], detached
    correct  []  int64: how many images of the batch the inference head puts in class `labels`
    logits   [B, K] of the inference head, float32 (float64), detached; None unless they were asked for
    """

    loss: Tensor
    parts: dict[str, Tensor]
    correct: Tensor
    logits: Tensor | None = None


class TeacherSide(NamedTuple):
    """What the teacher makes of a batch; None or () where it was not asked for. Nothing of it takes a gradient.

    map     [B, Ct, Ht, Wt]
    pooled  [B, Ct]
    logits  [B, K] float32 (float64)
    stages  [B, Ci, Hi, Wi] of each stage that the objective compares
    """

    map: Tensor | None = None
    pooled: Tensor | None = None
    logits: Tensor | None = None
    stages: tuple[Tensor, ...] = ()


class StudentSide(NamedTuple):
    """What the student makes of a batch. None where the objective has no use for it; everything takes a gradient.

    z            [B, Ct] connected and pooled features, float32 (float64)
    unprojected  [B, Cin], what the connector's projection takes, in z's place where the loss has the projection
    fm           [] distance to the teacher's features; 0 where there is nothing to match
    logits       [B, K] of the student's own classifier, float32 (float64)
    stages       [B, Ci, Hi, Wi] of each stage that the objective compares
    pooled       [B, Cs] what the student's own classifier sees
    map          [B, Cs, Hs, Ws] the student's own map
    map_z        Z [B, Ct, H, W], the connected map whose mean is z, where a loss in plain PyTorch takes it; no fm then
    """

    z: Tensor | None
    unprojected: Tensor | None
    fm: Tensor | None
    logits: Tensor | None
    stages: tuple[Tensor, ...]
    pooled: Tensor | None = None
    map: Tensor | None = None
    map_z: Tensor | None = None


class Distiller(nn.Module):
    """The training step for any loop: called with images and labels, it returns the loss.

    It is an ordinary module whose parameters and state_dict are what is learned: the student, its own classifier iff
    the objective trains it, the connector iff there is one, and what single terms train (the hint's 'regressor'). Every
    parameter gets a gradient in every step. DistributedDataParallel, torch.compile, accelerate or Lightning may wrap it
    as they do a model; the optimizer is made of `parameters()`. Where torch.distributed connects several processes, an
    objective with statistics over a batch (`Needs.WHOLE_BATCH`) takes them over the batches of all: each must then make
    the step.

    The teacher is no submodule: not among parameters, buffers or state_dict, though `to`, `cuda`, `half` and the like
    move it along. In every step it is frozen and in eval mode, whatever called `train()` or `requires_grad_()` on it.

    student          Tapped; its classifier is dropped in place if the objective does not train it
    teacher          Tapped or CachedTeacher, frozen in place; None only for an objective without one ('ce')
    label_smoothing  of the hard-label cross-entropy, in [0, 1)
    head             'fused': the C++ ops; 'reference': plain PyTorch
    raises           UserError: class counts differ; a map, a stage or the teacher is missing; a value is out of range

    connector         Connector or None
    stage_pairs       the stages of student and teacher that the objective compares, the largest maps first; counted
                      from the last where the nets have unequal numbers of them
    projects_in_loss  whether a step leaves the connector's projection to the loss, which has one op for both: where the
                      connector works on vectors, what it makes goes through the teacher's classifier, and no term needs
                      z
    """

    teacher: Tapped | CachedTeacher | None
    connector: Connector | None

    def __init__(
        self,
        student: Tapped,
        teacher: Tapped | CachedTeacher | None,
        objective: Objective,
        *,
        label_smoothing: float = 0.0,
        head: str = "fused",
    ) -> None:
        super().__init__()
        _refuse(student, teacher, objective, label_smoothing, head)
        self.objective, self.label_smoothing, self.head = objective, label_smoothing, head
        if teacher is not None:
            teacher.eval().requires_grad_(False)
        object.__setattr__(self, "teacher", teacher)  # nn.Module's own would make it a submodule
        self._teacher_parts: list[nn.Module] = []
        self._look_at_teacher()
        student.keep_map_to_match()
        if isinstance(teacher, Tapped):
            teacher.keep_map_to_match()
        self._pairs = _matched_stages(objective, student, teacher)
        if Needs.OWN_LOGITS not in objective.needs:
            student.drop_classifier()
        self.student = student
        like = next(student.parameters())  # what is built here takes its device and dtype
        self.connector = None
        if objective.connector is not None:
            assert teacher is not None
            channels = _connected_channels(objective, student, teacher)
            self.connector = build_connector(objective.connector, *channels, objective.connector_init).to(like)
        for term in objective.terms:
            for name, module in term.build(Nets(student, teacher, self._pairs)).items():
                self.add_module(name, module.to(like))
        on_vectors = self.connector is not None and not self.connector.takes_map
        no_z = all(term.takes_unprojected for term in objective.terms if Needs.CONNECTED in term.needs)
        self.projects_in_loss = head == "fused" and on_vectors and no_z and Needs.CLASSIFIER in objective.needs
        self._map_sizes_t: dict[torch.Size, tuple[int, int]] = {}  # image size -> teacher's map size
        self._frozen = _frozen_classifier()

    # --- the step

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        labels_b: Tensor | None = None,
        mix: Tensor | None = None,
        pooled_t: Tensor | None = None,
        progress: float | Tensor | None = None,
        with_logits: bool = False,
    ) -> StepOutput:
        """Loss of one batch. Gradients go to this module's parameters only; nothing waits for the device.

        images       [B, 3, S, S]
        labels       [B] int64 in [0, K)
        labels_b     [B] int64, mix [B] in [0, 1]: images mixed of two; `labels` weighs mix, and labels_b 1 - mix
        pooled_t     [B, Ct]: the teacher's pooled features of these images, from a cache; its backbone is then not run
        progress     epochs done so far, fractions included, a number or a tensor []; only for an objective with a
                     warm-up (dkd, sdd-dkd)
        with_logits  also return the logits that the trained student would answer with. The fused op never has them
                     whole, so they cost one more matrix product
        returns      StepOutput; loss and parts are float32 also under autocast (float64 for a float64 net)
        raises       UserError where the objective needs progress and none is given
        """
        if progress is None and Needs.PROGRESS in self.objective.needs:
            raise UserError(
                f"objective {self.objective.name!r} has a warm-up and needs progress, the epochs done so far, got none:"
                " call the distiller with progress=step / steps_per_epoch, or set"
                f" {' and '.join(self.objective.warm_ups)} to 0"
            )
        of_teacher = self.teacher_side(images, pooled_t)
        of_student = self.student_side(
            images,
            map_t=of_teacher.map if Needs.MAP_T in self.objective.needs else None,
            pooled_t=of_teacher.pooled if Needs.MATCH_POOLED in self.objective.needs else None,
            project=not self.projects_in_loss,
            with_map=Needs.MAP_Z in self.objective.needs,
        )
        logits_z = None
        if Needs.LOGITS_Z in self.objective.needs:
            assert of_student.z is not None
            logits_z = full(self.classifier_t(of_student.z))
        by_number = zip(self._pairs, of_student.stages, of_teacher.stages, strict=True)
        seen = Seen(
            labels=labels,
            labels_b=labels_b,
            mix=mix,
            label_smoothing=self.label_smoothing,
            progress=progress,
            head=self.head,
            logits=of_student.logits,
            logits_z=logits_z,
            z=of_student.z,
            unprojected=of_student.unprojected,
            fm=of_student.fm,
            map_z=of_student.map_z,
            map_t=of_teacher.map,
            map_s=of_student.map,
            pooled_s=of_student.pooled,
            pooled_t=of_teacher.pooled,
            logits_t=of_teacher.logits,
            stages={number: equal_sizes(map_s, map_t) for number, map_s, map_t in by_number},
            connector=self.connector,
            classifier=None if self.teacher is None else self.teacher.classifier,
            classifier_s=self.student.classifier,
            frozen=self._frozen,
            modules=self._modules,
            group=all_processes() if self.training and torch.is_grad_enabled() else None,
        )
        loss: Tensor | None = None
        parts: dict[str, Tensor] = {}
        correct: Tensor | None = None
        for term in self.objective.terms:
            value = term.value(seen)
            if value is not None:
                loss = value.loss if loss is None else loss + value.loss
                parts |= value.parts
                correct = value.correct if correct is None else correct
        if self.objective.infer_head == "student":
            assert seen.logits is not None
            correct = (seen.logits.detach().argmax(1) == labels).sum()
        assert loss is not None
        assert correct is not None
        return StepOutput(loss, parts, correct, self._answer(of_student) if with_logits else None)

    def step(self, images: Tensor, labels: Tensor, **more: Any) -> StepOutput:
        """The call with its logits, for a loop of your own that looks at answers; the other arguments are the call's.

        What wraps the distiller (DistributedDataParallel, torch.compile, accelerate) wraps the call, not this.
        """
        return self(images, labels, with_logits=True, **more)

    @torch.no_grad()
    def teacher_side(self, images: Tensor, pooled_t: Tensor | None = None) -> TeacherSide:
        """What the objective needs of the teacher for images [B, 3, S, S]; pooled_t [B, Ct] of a cache, if any."""
        needs, map_ = self.objective.needs, None
        stages: tuple[Tensor, ...] = ()
        if self.teacher is None:
            return TeacherSide()
        teacher = self.frozen_teacher()
        if not needs & TEACHER_FEATURES:
            return TeacherSide(pooled=pooled_t)
        need_map = bool(needs & (Needs.MAP_T | Needs.FULL_MAP_T))
        if Needs.STAGES in needs:
            assert isinstance(teacher, Tapped)
            map_, pooled_t, stages = teacher.staged_features(images, need_map)
        elif pooled_t is None or need_map:
            map_, pooled_t = teacher.features(images, need_map)
        if map_ is not None:
            self._map_sizes_t[images.shape[2:]] = (map_.shape[2], map_.shape[3])
        logits = full(self.classifier_t(pooled_t)) if Needs.LOGITS_T in needs else None
        return TeacherSide(map_, pooled_t, logits, stages)

    def student_side(
        self,
        images: Tensor,
        *,
        map_t: Tensor | None = None,
        pooled_t: Tensor | None = None,
        map_size_t: tuple[int, int] | None = None,
        project: bool = True,
        with_map: bool = False,
    ) -> StudentSide:
        """What student and connector make of images [B, 3, S, S].

        map_t       [B, Ct, Ht, Wt] or pooled_t [B, Ct]: what the connector's output is matched against
        map_size_t  (Ht, Wt) where there is no map_t but the net was trained against maps (inference)
        project     False, of a connector on vectors: `unprojected` instead of z, and no fm
        with_map    of a connector on maps: also `map_z`, in plain PyTorch, and no fm

        Maps of unequal size: the larger one is average-pooled to the smaller, the student's before the connector, as in
        SimKD.
        """
        connector, needs = self.connector, self.objective.needs
        z, unprojected, fm, map_z = None, None, None, None
        connects_map = connector is not None and connector.takes_map
        need_map = connects_map or Needs.MAP_S in needs
        map_s, pooled_s, stages = self.student.staged_features(images, need_map)  # [B, Cs, Hs, Ws], [B, Cs]
        if connector is not None:
            x = pooled_s
            if connects_map:
                assert map_s is not None
                x = map_s
                if map_t is not None:
                    map_size_t = (map_t.shape[2], map_t.shape[3])
                if map_size_t is not None:
                    size = smaller(map_s.shape[2:], map_size_t)
                    x = pool_to(map_s, size)
                    map_t = None if map_t is None else pool_to(map_t, size)
            if with_map:
                map_z = connector.connected_map(x)
                z = map_z.mean((2, 3))
            elif project:
                z, fm = connector(x, map_t=map_t, pooled_t=pooled_t, head=self.head)
            else:
                unprojected = connector.trunk(x)
        logits = None if self.student.classifier is None else full(self.student.classifier(pooled_s))
        pooled = pooled_s if Needs.POOLED_S in needs else None
        own_map = map_s if Needs.MAP_S in needs else None
        return StudentSide(z, unprojected, fm, logits, stages if self._pairs else (), pooled, own_map, map_z)

    @torch.no_grad()
    def _answer(self, of_student: StudentSide) -> Tensor:
        """[B, K] of the inference head."""
        if self.objective.infer_head == "student":
            assert of_student.logits is not None
            return of_student.logits.detach()
        z = of_student.z
        if z is None:
            assert of_student.unprojected is not None
            assert self.connector is not None
            z = F.linear(of_student.unprojected, self.connector.weight, self.connector.bias)
        return full(self.classifier_t(z.detach()))

    # --- after training

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] -> logits [B, K] of the objective's inference head; call `eval()` first."""
        if self.training:
            raise RuntimeError("Distiller.predict: the distiller is in training mode, call eval() first")
        if self.objective.infer_head == "student":
            return full(self.student(images))
        return self._answer(self.student_side(images, map_size_t=self.map_size_t(images)))

    @torch.no_grad()
    def teacher_logits(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] -> the teacher's own logits [B, K]"""
        if self.teacher is None:
            raise UserError("there is no teacher to ask for logits: give one")
        return full(self.frozen_teacher()(images))

    def compare(self, images: Tensor) -> Compared:
        """images [B, 3, S, S] -> the answers of `predict`, and features to compare with the teacher's; call `eval()`
        first.

        raises  UserError without a connector, or where the teacher is a cache, which has no features of these images
        """
        return compare(self, images)

    def deployed_cost(self, image_size: int) -> tuple[int, int]:
        """(parameters, multiply-accumulates per image) of what answers after training.

        Backbone and own classifier, or backbone, connector and the teacher's classifier, as `infer_head` says.
        """
        return deployed_cost(self, image_size)

    @torch.no_grad()
    def map_size_t(self, images: Tensor) -> tuple[int, int] | None:
        """(Ht, Wt) for images of this size if the connector learns from maps; runs the teacher once per size."""
        if Needs.MAP_T not in self.objective.needs:
            return None
        size = images.shape[2:]
        if size not in self._map_sizes_t:
            map_t, _ = self.frozen_teacher().features(images[:1], need_map=True)
            assert map_t is not None
            self._map_sizes_t[size] = (map_t.shape[2], map_t.shape[3])
        return self._map_sizes_t[size]

    # --- the teacher, and the parts as a whole

    @property
    def stage_pairs(self) -> tuple[tuple[Stage, Stage], ...]:
        return tuple(self._pairs.values())

    @property
    def classifier_t(self) -> nn.Linear:
        assert self.teacher is not None
        assert self.teacher.classifier is not None
        return self.teacher.classifier

    def synchronise(self, group: dist.ProcessGroup) -> None:
        """From here on every BatchNorm, the connector's too, takes its statistics over all processes of `group`."""
        synchronise_batch_norm(self, group)
        for module in self.modules():
            if isinstance(module, Connector):
                module.process_group = group

    def train(self, mode: bool = True) -> Self:
        """Training or eval mode of what is learned; the teacher stays in eval mode."""
        super().train(mode)
        self._look_at_teacher()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        # what to(), cuda(), half() and the like are made of
        super()._apply(fn, *args, **kwargs)
        if self.teacher is not None:
            self.teacher._apply(fn, *args, **kwargs)
        return self

    def _look_at_teacher(self) -> None:
        """Puts the teacher into eval mode, and keeps a list of its parts: it is gone through in every step."""
        if self.teacher is not None:
            self.teacher.eval()
            self._teacher_parts = list(self.teacher.modules())

    def frozen_teacher(self) -> Tapped | CachedTeacher:
        """The teacher, frozen and in eval mode, whatever a module that holds it too, or parts of it, has done since."""
        assert self.teacher is not None
        if any(part.training for part in self._teacher_parts):
            self.teacher.eval()
        if self.classifier_t.weight.requires_grad:  # the backbone is run without gradients in any case
            self.teacher.requires_grad_(False)
        return self.teacher


def _refuse(
    student: Tapped,
    teacher: Tapped | CachedTeacher | None,
    objective: Objective,
    label_smoothing: float,
    head: str,
) -> None:
    if head not in HEADS:
        raise UserError(f"unknown head {head!r}: wanted fused or reference{did_you_mean(head, HEADS)}")
    if not 0 <= label_smoothing < 1:
        raise UserError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
    if teacher is None:
        if objective.needs_teacher:
            raise UserError(f"objective {objective.name!r} needs a teacher, got none: give one, or objective 'ce'")
        return
    if teacher.num_classes != student.num_classes:
        raise UserError(
            f"teacher {teacher.name!r} classifies {teacher.num_classes} classes and student {student.name!r}"
            f" {student.num_classes}, wanted equal counts: build both for the data's classes"
        )
    require_maps(objective, student, teacher)


def _connected_channels(objective: Objective, student: Tapped, teacher: Tapped | CachedTeacher) -> tuple[int, int]:
    """(Cs, Ct) from which and to which the connector leads: of maps, or of the vectors that the classifiers see."""
    assert objective.connector is not None
    channels_s, channels_t = student.channels, teacher.channels
    if takes_map(objective.connector):
        channels_s = student.match_channels or channels_s
    if Needs.MAP_T in objective.needs and isinstance(teacher, Tapped):
        channels_t = teacher.match_channels or channels_t
    return channels_s, channels_t


def _frozen_classifier() -> Any:
    from ijckd_fast.head import FrozenClassifier

    return FrozenClassifier()


def _matched_stages(
    objective: Objective, student: Tapped, teacher: Tapped | CachedTeacher | None
) -> Mapping[int, tuple[Stage, Stage]]:
    """The pairs of stages that the objective compares, by number, 1 that of the largest maps. Both nets keep their
    maps.

    Of nets with unequal numbers of stages the last ones are pairs.
    """
    if Needs.STAGES not in objective.needs:
        return {}
    assert teacher is not None
    student.require_stages(role="student")
    teacher.require_stages(role="teacher")
    assert isinstance(teacher, Tapped)
    common = min(len(student.stages), len(teacher.stages))
    nets = f"student {_with_stages(student)} and teacher {_with_stages(teacher)}"
    with objective.named():
        numbers = sorted({number for term in objective.terms for number in term.stages(common, nets)})
    places = [number - 1 - common for number in numbers]  # from the end
    student.keep_stages(places)
    teacher.keep_stages(places)
    return {number: (student.stages[i], teacher.stages[i]) for number, i in zip(numbers, places, strict=True)}


def _with_stages(net: Tapped) -> str:
    return f"{net.name!r} ({', '.join(stage.path for stage in net.stages)})"
