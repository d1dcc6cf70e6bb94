from ijckd_fast.distill.compared import Compared as Compared
from ijckd_fast.distill.connector_spec import parse_spec as parse_spec, takes_map as takes_map
from ijckd_fast.distill.connectors import Connector as Connector, build_connector as build_connector
from ijckd_fast.distill.distiller import (
    Distiller as Distiller,
    StepOutput as StepOutput,
    StudentSide as StudentSide,
    TeacherSide as TeacherSide,
)
from ijckd_fast.distill.heads import HEADS as HEADS
from ijckd_fast.distill.objectives import (
    FROM_CACHE as FROM_CACHE,
    PRESETS as PRESETS,
    Objective as Objective,
    get_objective as get_objective,
)
from ijckd_fast.distill.terms import (
    PARTS as PARTS,
    TERMS as TERMS,
    Needs as Needs,
    Seen as Seen,
    Term as Term,
    Value as Value,
)
