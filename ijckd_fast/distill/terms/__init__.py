"""Loss terms, a file each. To add one: its file and its row in TERMS.

The order of the rows is that in which their values are added to the loss and stand in the log, and their settings in
config.yaml and in the help.
"""

from ijckd_fast.distill.terms.attention import Attention
from ijckd_fast.distill.terms.catkd import Catkd
from ijckd_fast.distill.terms.cross_entropy import CrossEntropy
from ijckd_fast.distill.terms.dist import Dist
from ijckd_fast.distill.terms.dkd import Dkd
from ijckd_fast.distill.terms.feature_match import FeatureMatch
from ijckd_fast.distill.terms.hard import Hard
from ijckd_fast.distill.terms.hint import Hint
from ijckd_fast.distill.terms.kl import Kl
from ijckd_fast.distill.terms.nkd import Nkd
from ijckd_fast.distill.terms.review import Review
from ijckd_fast.distill.terms.sdd import Sdd
from ijckd_fast.distill.terms.srd import Srd
from ijckd_fast.distill.terms.term import Needs, Seen, Term, Value
from ijckd_fast.distill.terms.through_teacher import ThroughTeacher
from ijckd_fast.distill.terms.ttm import Ttm

TERMS: tuple[type[Term], ...] = (
    ThroughTeacher, FeatureMatch, CrossEntropy, Kl, Dkd, Hard, Ttm, Nkd, Dist, Sdd, Catkd, Srd, Attention, Hint, Review,
)  # fmt: skip
PARTS = tuple(
    dict.fromkeys(part for term in TERMS for part in term.parts)
)  # the log's names of their unweighted values

__all__ = ["PARTS", "TERMS", "Needs", "Seen", "Term", "Value"]
