"""What a student learns and how: loss terms, objectives made of them, connectors, and the distiller, the training step.

A term (`terms/`, a file each) says what it needs of student and teacher, its settings and its value; an objective
(`objectives.py`) is a row of settings; `Distiller` is a module that makes what the terms need, and its call is the
step.
"""

from ijckd_fast.distill.compared import Compared
from ijckd_fast.distill.connectors import Connector, build_connector, parse_spec, takes_map
from ijckd_fast.distill.distiller import Distiller, StepOutput, StudentSide, TeacherSide
from ijckd_fast.distill.heads import HEADS
from ijckd_fast.distill.objectives import FROM_CACHE, PRESETS, Objective, get_objective
from ijckd_fast.distill.terms import PARTS, TERMS, Needs, Seen, Term, Value

__all__ = [
    "FROM_CACHE",
    "HEADS",
    "PARTS",
    "PRESETS",
    "TERMS",
    "Compared",
    "Connector",
    "Distiller",
    "Needs",
    "Objective",
    "Seen",
    "StepOutput",
    "StudentSide",
    "TeacherSide",
    "Term",
    "Value",
    "build_connector",
    "get_objective",
    "parse_spec",
    "takes_map",
]
