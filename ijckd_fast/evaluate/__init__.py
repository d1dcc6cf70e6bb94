"""What a trained net is worth: its accuracy, how often it agrees with the teacher, and the bound on its error.

`evaluate` makes one pass over a split. A `BoundMeter` measures the bound in the same pass (docs/bound.md);
`write_bound` puts its figures into a page with advice. `by_group` has the accuracy on groups of the images.
`against_chance` tests whether answers are better than chance.
"""

from ijckd_fast.evaluate.accuracy import Evaluation, evaluate, known_evaluation, load_evaluation, save_evaluation
from ijckd_fast.evaluate.bound import BoundMeter, Geometry, chain_line, overall, per_class
from ijckd_fast.evaluate.bound_advice import advise
from ijckd_fast.evaluate.bound_report import bound_stem, bound_table, write_bound
from ijckd_fast.evaluate.chance import LEVEL, AgainstChance, against_chance
from ijckd_fast.evaluate.groups import by_group, groups_of

__all__ = [
    "LEVEL",
    "AgainstChance",
    "BoundMeter",
    "Evaluation",
    "Geometry",
    "advise",
    "against_chance",
    "bound_stem",
    "bound_table",
    "by_group",
    "chain_line",
    "evaluate",
    "groups_of",
    "known_evaluation",
    "load_evaluation",
    "overall",
    "per_class",
    "save_evaluation",
    "write_bound",
]
