"""The training step: frozen teacher, student, connector, and the losses of an `Objective`.

`Learner` is everything that is trained and nothing else, so it is what the optimizer owns, what DistributedDataParallel
wraps and what a checkpoint holds. `Distiller` keeps the teacher beside it, frozen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ijckd_fast.distill.connectors import Connector, build_connector
from ijckd_fast.distill.objectives import Objective
from ijckd_fast.errors import UserError, did_you_mean
from ijckd_fast.head import ops, reference
from ijckd_fast.nets import CachedTeacher, Stage, Tapped, count_macs, count_parameters, macs
from ijckd_fast.parallel import synchronise_batch_norm

HEADS = ("fused", "reference")


class StepOutput(NamedTuple):
    """What one step hands to the loop; all on the device, nothing of it has been waited for.

    loss     []  the weighted sum; differentiable
    parts    the unweighted terms of non-zero weight by name ('ce', 'sr', 'fm', 'kl', 'dkd', 'at', 'hint'), each [], detached. dkd is
             alpha TCKD + beta NCKD without its warm-up factor.
    correct  []  int64: how many images of the batch the inference head puts in class `labels`
    """

    loss: Tensor
    parts: dict[str, Tensor]
    correct: Tensor


class Compared(NamedTuple):
    """What student and teacher make of the same images.

    logits      [B, K] of the objective's inference head, bit for bit what `Distiller.predict` returns
    own_logits  [B, K] of the student's own classifier; None where the objective does not train it
    z           [B, Ct] the student's connected and pooled features
    pooled_t    [B, Ct] the teacher's
    map_mse     [B] mean square difference of the maps behind them; None where connector or teacher has no map
    """

    logits: Tensor
    own_logits: Tensor | None
    z: Tensor
    pooled_t: Tensor
    map_mse: Tensor | None


class Learner(nn.Module):
    """Student backbone, its own classifier iff the objective trains it, the connector iff there is one, and the hint's regressor likewise.

    Every parameter gets a gradient in every step. `student`'s classifier is dropped in place if it is not needed.

    stages            the pairs of stages of student and teacher that the objective compares, the smallest maps last; () for none
    regressor         of the hint: one of the connectors, but between stages and thrown away after training
    projects_in_loss  whether a training step leaves the connector's projection to the loss, which has one op for both: where the
                      connector works on vectors and what it makes goes through the teacher's classifier
    """

    def __init__(
        self,
        student: Tapped,
        objective: Objective,
        teacher_channels: int | None,
        head: str,
        stages: Sequence[tuple[Stage, Stage]] = (),
    ) -> None:
        super().__init__()
        self.head = head
        self.needs_map = objective.needs_student_map
        if self.needs_map:
            student.require_map()
        if not objective.uses_student_head:
            student.drop_classifier()
        self.student = student
        self.connector: Connector | None = None
        if objective.connector is not None:
            assert teacher_channels is not None
            connector = build_connector(objective.connector, student.channels, teacher_channels)
            self.connector = connector.to(next(student.parameters()))  # the student's device and dtype
        self.transfers_attention = objective.at > 0
        self.hint_place = objective.hint_stage - 1 if objective.at > 0 else 0  # among the pairs that are compared
        self.regressor: Connector | None = None
        if objective.hint > 0:
            stage_s, stage_t = stages[self.hint_place]
            regressor = build_connector("conv1x1", stage_s.channels, stage_t.channels)
            self.regressor = regressor.to(next(student.parameters()))
        on_vectors = self.connector is not None and not self.connector.takes_map
        self.projects_in_loss = head == "fused" and on_vectors and objective.uses_teacher_head

    def forward(
        self,
        images: Tensor,
        map_t: Tensor | None = None,
        pooled_t: Tensor | None = None,
        map_size_t: tuple[int, int] | None = None,
        project: bool = True,
        stages_t: Sequence[Tensor] = (),
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, dict[str, Tensor]]:
        """images [B, 3, S, S] -> (z [B, Ct] | None, fm [] | None, student logits [B, K] | None, terms of the stages by name, each [])

        map_t       [B, Ct, Ht, Wt] or pooled_t [B, Ct]: what the connector's output is matched against
        map_size_t  (Ht, Wt) where there is no map_t but the net was trained against maps (inference)
        project     False, of a connector on vectors: in z's place the vectors [B, Cin] that its projection takes, and no fm
        stages_t    the teacher's maps [B, Ct, Ht, Wt] of the stages that are compared; none: 'at' and 'hint' are not computed

        SimKD's rule for maps of unequal size: the larger one is average-pooled to the smaller, the student's before the
        connector or regressor.
        """
        # [B, Cs, Hs, Ws], [B, Cs], stages as stages_t
        map_s, pooled_s, stages_s = self.student.staged_features(images, self.needs_map)
        z = fm = logits_s = None
        if self.connector is not None:
            x = pooled_s if map_s is None else map_s
            if map_t is not None:
                map_size_t = (map_t.shape[2], map_t.shape[3])
            if map_s is not None and map_size_t is not None:
                size = _smaller(map_s.shape[2:], map_size_t)
                x = _pool_to(map_s, size)
                map_t = None if map_t is None else _pool_to(map_t, size)
            if project:
                z, fm = self.connector(x, map_t=map_t, pooled_t=pooled_t, head=self.head)
            else:
                z = self.connector.trunk(x)
        if self.student.classifier is not None:
            logits_s = self.student.classifier(pooled_s)
        of_stages: dict[str, Tensor] = {}
        if stages_t:
            pairs = [_equal_sizes(s, t) for s, t in zip(stages_s, stages_t, strict=True)]
            if self.transfers_attention:
                of_stages["at"] = torch.stack([attention_distance(s, t) for s, t in pairs]).sum()
            if self.regressor is not None:
                s, t = pairs[self.hint_place]
                _, of_stages["hint"] = self.regressor(s, map_t=t, head=self.head)
        return z, fm, logits_s, of_stages

    def synchronise(self, group: dist.ProcessGroup) -> None:
        """From here on every BatchNorm, the connector's too, takes its statistics over all processes of `group` (SyncBN)."""
        synchronise_batch_norm(self.student, group)
        if self.connector is not None:
            synchronise_batch_norm(self.connector.trunk, group)
            self.connector.process_group = group
        if self.regressor is not None:  # which has no other BatchNorm than its op's
            self.regressor.process_group = group


def _smaller(size: Sequence[int], other: Sequence[int]) -> tuple[int, int]:
    return min(size[0], other[0]), min(size[1], other[1])


def _pool_to(map_: Tensor, size: tuple[int, int]) -> Tensor:
    return map_ if tuple(map_.shape[2:]) == size else F.adaptive_avg_pool2d(map_, size)


def _equal_sizes(map_: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    size = _smaller(map_.shape[2:], other.shape[2:])
    return _pool_to(map_, size), _pool_to(other, size)


class Distiller:
    """A learner, its frozen teacher and the objective that ties them.

    learner    what is trained; its parameters are the optimizer's, its state_dict the checkpoint's
    trained    the callable that `step` runs, at first the learner itself; a training loop may set it to
               `DistributedDataParallel(distiller.learner)` or `torch.compile(distiller.learner)`
    teacher    Tapped, CachedTeacher or None; always in eval mode, its parameters never require a gradient
    objective, label_smoothing, head: as given
    stage_pairs  the stages of student and teacher that the objective compares; of nets with unequal numbers of stages the last ones

    student          its classifier is dropped in place if the objective does not train it
    teacher          frozen in place; None only for an objective without one ('ce')
    label_smoothing  of the hard-label cross-entropy, in [0, 1)
    head             'fused': the C++ ops; 'reference': plain PyTorch
    raises           UserError: class counts differ, a map or a stage is needed and missing, no teacher, value out of range
    """

    def __init__(
        self,
        student: Tapped,
        teacher: Tapped | CachedTeacher | None,
        objective: Objective,
        *,
        label_smoothing: float = 0.0,
        head: str = "fused",
    ) -> None:
        if head not in HEADS:
            raise UserError(f"unknown head {head!r}: wanted fused or reference{did_you_mean(head, HEADS)}")
        if not 0 <= label_smoothing < 1:
            raise UserError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        if teacher is None and objective.needs_teacher:
            raise UserError(f"objective {objective.name!r} needs a teacher, got none: give one, or objective 'ce'")
        if teacher is not None:
            if teacher.num_classes != student.num_classes:
                raise UserError(
                    f"teacher {teacher.name!r} classifies {teacher.num_classes} classes and student {student.name!r}"
                    f" {student.num_classes}, wanted equal counts: build both for the data's classes"
                )
            if objective.needs_teacher_map:
                teacher.require_map()
            teacher.eval().requires_grad_(False)
        self.objective = objective
        self.label_smoothing = label_smoothing
        self.head = head
        self.teacher = teacher
        self.stage_pairs: tuple[tuple[Stage, Stage], ...] = ()
        if objective.needs_stages:
            assert teacher is not None
            self.stage_pairs = _matched_stages(objective, student, teacher)
        self.learner = Learner(student, objective, teacher.channels if teacher else None, head, self.stage_pairs)
        self.trained: nn.Module = self.learner
        self._map_sizes_t: dict[torch.Size, tuple[int, int]] = {}  # image size -> teacher's map size
        self._frozen = ops.FrozenClassifier()

    def train(self) -> Distiller:
        """Learner to training mode; the teacher stays in eval mode."""
        self.trained.train()
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def eval(self) -> Distiller:
        """Learner (and, as ever, teacher) to eval mode."""
        self.trained.eval()
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def to(self, *args: Any, **kwargs: Any) -> Distiller:
        """`nn.Module.to` on learner and teacher alike."""
        self.learner.to(*args, **kwargs)
        if self.teacher is not None:
            self.teacher.to(*args, **kwargs)
        return self

    def step(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        labels_b: Tensor | None = None,
        mix: Tensor | None = None,
        pooled_t: Tensor | None = None,
        progress: float | Tensor,
    ) -> StepOutput:
        """Loss of one batch. Gradients go to the learner's parameters only; nothing waits for the device.

        images    [B, 3, S, S]
        labels    [B] int64 in [0, K)
        labels_b  [B] int64, mix [B] in [0, 1]: images mixed of two, of which `labels` weighs mix and labels_b 1 - mix
        pooled_t  [B, Ct]: the teacher's pooled features of these images, from a cache; its backbone is then not run
        progress  epochs done so far, fractions included (DKD's warm-up depends on it); a number or a tensor []
        returns   StepOutput; loss and parts are float32 also under autocast (float64 for a float64 net)
        """
        o = self.objective
        map_t = logits_t = None
        stages_t: tuple[Tensor, ...] = ()
        if o.needs_teacher_features:
            assert self.teacher is not None
            with torch.no_grad():
                if o.needs_stages:
                    assert isinstance(self.teacher, Tapped)
                    map_t, pooled_t, stages_t = self.teacher.staged_features(images, o.needs_teacher_map)
                elif pooled_t is None or o.needs_teacher_map:
                    map_t, pooled_t = self.teacher.features(images, o.needs_teacher_map)  # [B, Ct, Ht, Wt], [B, Ct]
                if (o.kl_head == "student" and o.kl > 0) or o.dkd_alpha > 0 or o.dkd_beta > 0:
                    logits_t = _full(self._classifier(pooled_t))  # [B, K]
        if map_t is not None:
            self._map_sizes_t[images.shape[2:]] = (map_t.shape[2], map_t.shape[3])

        match_pooled = pooled_t if o.fm > 0 and o.match == "pooled" else None
        if self.learner.projects_in_loss:
            z, fm, logits_s, of_stages = self.trained(images, project=False, stages_t=stages_t)
        else:
            z, fm, logits_s, of_stages = self.trained(images, map_t, match_pooled, stages_t=stages_t)

        loss: Tensor | None = None
        correct: Tensor | None = None
        parts: dict[str, Tensor] = {}
        if z is not None and (o.uses_teacher_head or o.infer_head == "teacher"):
            loss, parts, correct = self._through_teacher_head(z, pooled_t, labels, labels_b, mix)
        if fm is not None and o.fm > 0:
            loss = o.fm * fm if loss is None else loss + o.fm * fm
            parts["fm"] = fm.detach()
        if logits_s is not None:
            logits_s = _full(logits_s)
            for name, weight, term in self._student_head_terms(logits_s, logits_t, labels, labels_b, mix, progress):
                loss = weight * term if loss is None else loss + weight * term
                parts[name] = term.detach()
            if o.infer_head == "student":
                correct = (logits_s.detach().argmax(1) == labels).sum()
        for name, term in of_stages.items():
            weighted = getattr(o, name) * term
            loss = weighted if loss is None else loss + weighted
            parts[name] = term.detach()
        assert loss is not None
        assert correct is not None
        return StepOutput(loss, parts, correct)

    def _through_teacher_head(
        self, z: Tensor, pooled_t: Tensor | None, labels: Tensor, labels_b: Tensor | None, mix: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Terms through the teacher's classifier: their weighted sum, the terms, the top-1 count.

        z  [B, Ct], or [B, Cin] where the loss projects; then the pooled match is one of the terms
        """
        o = self.objective
        ce = o.ce if o.ce_head == "teacher" else 0.0
        kl = o.kl if o.kl_head == "teacher" else 0.0
        classifier = self._classifier
        weight, gram = classifier.weight, None
        if self.head == "fused" and weight.is_cuda:  # the CPU's op rounds the classifier and keeps its gram itself
            weight, gram = self._frozen.prepared(weight, match=o.sr > 0 and kl == 0)
        fm = 0.0
        if self.learner.projects_in_loss:
            connector, fm = self.learner.connector, o.fm
            assert connector is not None
            op = functools.partial(ops.projected_classifier_loss, z, connector.weight, connector.bias)
        else:
            classifier_loss = ops.classifier_loss if self.head == "fused" else reference.classifier_loss
            # without a loss term only the count is wanted
            op = functools.partial(classifier_loss, z if o.uses_teacher_head else z.detach())
        loss, terms, correct = op(
            weight,
            classifier.bias,
            labels,
            labels_b=labels_b,
            mix=mix,
            label_smoothing=self.label_smoothing,
            pooled_t=pooled_t if o.sr > 0 or kl > 0 or fm > 0 else None,
            temperature=o.temperature,
            ce=ce,
            sr=o.sr,
            fm=fm,
            kl=kl,
            gram=gram,
        )
        named = (("ce", ce, 0), ("sr", o.sr, 1), ("fm", fm, 2), ("kl", kl, 3))
        return loss, {name: terms[column] for name, weight, column in named if weight > 0}, correct

    def _student_head_terms(
        self,
        logits: Tensor,
        logits_t: Tensor | None,
        labels: Tensor,
        labels_b: Tensor | None,
        mix: Tensor | None,
        progress: float | Tensor,
    ) -> list[tuple[str, float | Tensor, Tensor]]:
        """Terms through the student's own classifier (logits [B, K]): name, weight, value []."""
        o = self.objective

        def mixed(per_image: Callable[[Tensor], Tensor]) -> Tensor:
            rows = per_image(labels)  # [B]
            if labels_b is not None and mix is not None:
                rows = mix * rows + (1 - mix) * per_image(labels_b)
            return rows.mean()

        terms: list[tuple[str, float | Tensor, Tensor]] = []
        if o.ce > 0 and o.ce_head == "student":
            smoothing = self.label_smoothing
            ce = mixed(lambda y: F.cross_entropy(logits, y, reduction="none", label_smoothing=smoothing))
            terms.append(("ce", o.ce, ce))
        if o.kl > 0 and o.kl_head == "student":
            assert logits_t is not None
            terms.append(("kl", o.kl, o.temperature**2 * _kl(logits, logits_t, o.temperature).mean()))
        if o.dkd_alpha > 0 or o.dkd_beta > 0:
            assert logits_t is not None
            teacher = logits_t
            dkd = mixed(lambda y: dkd_rows(logits, teacher, y, o.dkd_alpha, o.dkd_beta, o.temperature))
            terms.append(("dkd", o.dkd_factor(progress), dkd))
        return terms

    @property
    def _classifier(self) -> nn.Linear:
        assert self.teacher is not None
        assert self.teacher.classifier is not None
        return self.teacher.classifier

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] -> logits [B, K] of the objective's inference head; call `eval()` first."""
        if self.learner.training:
            raise RuntimeError("Distiller.predict: the learner is in training mode, call eval() first")
        if self.objective.infer_head == "student":
            return _full(self.learner.student(images))
        z, _, _, _ = self.learner(images, map_size_t=self._map_size_t(images))
        return _full(self._classifier(z))

    @torch.no_grad()
    def compare(self, images: Tensor) -> Compared:
        """images [B, 3, S, S] -> the answers of `predict`, and what they are compared by with the teacher; call `eval()` first.

        Maps of unequal size are compared by SimKD's rule, the larger one average-pooled to the smaller: where the objective matches maps
        the student's before the connector, as in training, else what the connector makes of it.
        raises  UserError without a connector, or where the teacher is a cache, which has no features of these images
        """
        connector, student, teacher = self.learner.connector, self.learner.student, self.teacher
        if connector is None or not isinstance(teacher, Tapped):
            lacks = "connector" if connector is None else "teacher's backbone, only a cache of its features"
            raise UserError(
                f"objective {self.objective.name!r} has no {lacks}: wanted both, to compare features with the teacher's"
            )
        if self.learner.training:
            raise RuntimeError("Distiller.compare: the learner is in training mode, call eval() first")
        map_t, pooled_t = teacher.features(images, connector.takes_map and teacher.has_map)  # [B, Ct, Ht, Wt], [B, Ct]
        map_s, pooled_s = student.features(images, self.learner.needs_map)  # [B, Cs, Hs, Ws], [B, Cs]
        x = pooled_s if map_s is None else map_s
        if map_s is not None and map_t is not None and self.objective.needs_teacher_map:
            x = _pool_to(map_s, _smaller(map_s.shape[2:], map_t.shape[2:]))
        z, _ = connector(x, head=self.head)  # [B, Ct]
        map_mse = None
        if map_t is not None:
            connected = connector.connected_map(x)  # [B, Ct, H, W]
            size = _smaller(connected.shape[2:], map_t.shape[2:])
            map_mse = (_pool_to(connected, size) - _pool_to(map_t, size)).square().mean((1, 2, 3))
        own_logits = None if student.classifier is None else _full(student.classifier(pooled_s))
        if self.objective.infer_head == "student":
            assert own_logits is not None
            return Compared(own_logits, own_logits, z, pooled_t, map_mse)
        return Compared(_full(self._classifier(z)), own_logits, z, pooled_t, map_mse)

    def _map_size_t(self, images: Tensor) -> tuple[int, int] | None:
        """(Ht, Wt) for images of this size if the connector learns from maps; runs the teacher once per size."""
        if not self.objective.needs_teacher_map:
            return None
        size = images.shape[2:]
        if size not in self._map_sizes_t:
            assert self.teacher is not None
            map_t, _ = self.teacher.features(images[:1], need_map=True)
            assert map_t is not None
            self._map_sizes_t[size] = (map_t.shape[2], map_t.shape[3])
        return self._map_sizes_t[size]

    @torch.no_grad()
    def teacher_logits(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] -> the teacher's own logits [B, K]"""
        if self.teacher is None:
            raise UserError("there is no teacher to ask for logits: give one")
        return _full(self.teacher(images))

    @torch.no_grad()
    def deployed_cost(self, image_size: int) -> tuple[int, int]:
        """(parameters, multiply-accumulates per image) of what answers after training.

        Backbone and own classifier, or backbone, connector and the teacher's classifier, as `infer_head` says.
        """
        student = self.learner.student
        if self.objective.infer_head == "student":
            return count_parameters(student), macs(student, image_size)
        connector = self.learner.connector
        assert connector is not None
        parameters = count_parameters(student.net) + count_parameters(connector) + count_parameters(self._classifier)
        total = macs(student.net, image_size) + self._classifier.weight.numel()
        image = next(student.parameters()).new_zeros(1, 3, image_size, image_size)
        if not connector.takes_map:
            x = image.new_zeros(1, student.channels)
        else:
            mode = student.training
            map_s, _ = student.eval().features(image, need_map=True)
            student.train(mode)
            assert map_s is not None
            size_t = self._map_size_t(image) or (map_s.shape[2], map_s.shape[3])
            x = map_s[:, :, : size_t[0], : size_t[1]]  # only its size matters from here on
        positions = x[0, 0].numel()
        return parameters, total + count_macs(connector.trunk, x) + connector.projection_macs(positions)


def _full(x: Tensor) -> Tensor:
    """At least float32: losses are not formed in half precision."""
    return x if x.dtype == torch.float64 else x.float()


def _matched_stages(
    objective: Objective, student: Tapped, teacher: Tapped | CachedTeacher
) -> tuple[tuple[Stage, Stage], ...]:
    """The pairs of stages that the objective compares, which both nets are told to keep. The last stages are a pair, then those before."""
    student.require_stages()
    teacher.require_stages()
    assert isinstance(teacher, Tapped)
    common = min(len(student.stages), len(teacher.stages))
    if objective.hint > 0 and objective.hint_stage > common:
        student_has, teacher_has = (
            f"{net.name!r} ({', '.join(stage.path for stage in net.stages)})" for net in (student, teacher)
        )
        raise UserError(
            f"objective {objective.name!r}: hint_stage {objective.hint_stage} wanted, but student {student_has} and teacher {teacher_has}"
            f" have only {common} stages in common, counted from the last: set hint_stage to 1 (the largest maps) to {common}"
        )
    first = -common
    places = range(first, 0) if objective.at > 0 else [first + objective.hint_stage - 1]
    student.keep_stages(places)
    teacher.keep_stages(places)
    return tuple((student.stages[place], teacher.stages[place]) for place in places)


def attention_distance(map_s: Tensor, map_t: Tensor) -> Tensor:
    """Attention transfer of one stage, as CRD's and SimKD's toolboxes compute it: mean_{B,HW}(a_s - a_t)^2, Zagoruyko & Komodakis 2017.

    map_s    [B, Cs, H, W]
    map_t    [B, Ct, H, W]; gets no gradient where it requires none
    returns  [], float32 or, for float64 input, float64. a = v / ||v||_2 for each image, v [B, HW] the mean over the channels of the
             squares; of a map that is 0 everywhere a is 0.
    """

    def attention(map_: Tensor) -> Tensor:
        return F.normalize(_full(map_).square().mean(1).flatten(1))  # [B, HW]

    return (attention(map_s) - attention(map_t)).square().mean()


def _kl(logits: Tensor, logits_t: Tensor, temperature: float) -> Tensor:
    """KL(softmax(logits_t / T) || softmax(logits / T)) of every row: [B, K], [B, K] -> [B], nats, no factor T^2."""
    log_p = F.log_softmax(logits / temperature, 1)
    log_p_t = F.log_softmax(logits_t / temperature, 1)
    return F.kl_div(log_p, log_p_t, reduction="none", log_target=True).sum(1)


def dkd_rows(logits: Tensor, logits_t: Tensor, labels: Tensor, alpha: float, beta: float, temperature: float) -> Tensor:
    """Decoupled knowledge distillation of every row: T^2 (alpha TCKD + beta NCKD), Zhao et al. 2022.

    logits, logits_t  [B, K]; only logits gets a gradient
    labels            [B] int64
    returns           [B] nats. TCKD is the KL between (p_y, 1 - p_y) of teacher and student, NCKD the KL between their
                      distributions over the K - 1 other classes, all at temperature T.
    """
    column = labels[:, None]

    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        log_p = F.log_softmax(x / temperature, 1)  # [B, K]
        # The lowest number, not -inf: the class then has weight exactly 0 and no 0 * inf arises.
        others = (x / temperature).scatter(1, column, torch.finfo(x.dtype).min)  # [B, K]
        # log(1 - p_y) as a sum over the other classes: 1 - p_y itself is lost to rounding for a confident row.
        log_rest = others.logsumexp(1, keepdim=True) - (x / temperature).logsumexp(1, keepdim=True)
        return torch.cat([log_p.gather(1, column), log_rest], 1), F.log_softmax(others, 1)  # [B, 2], [B, K]

    target_s, others_s = split(logits)
    target_t, others_t = split(logits_t)
    tckd = F.kl_div(target_s, target_t, reduction="none", log_target=True).sum(1)
    nckd = F.kl_div(others_s, others_t, reduction="none", log_target=True).sum(1)
    return temperature**2 * (alpha * tckd + beta * nckd)
