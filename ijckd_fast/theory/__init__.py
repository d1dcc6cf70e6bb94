"""The theory of distillation, measured beside its closed forms; no training, no torch.

`linear` (arXiv 2105.13093): a linear teacher distilled into linear and deep-linear students. `finite` (arXiv
2310.07838): what hard labels, the teacher's probability of one label, and all of its probabilities are worth. A study
draws data, measures what these predict, and writes a report.
"""

from ijckd_fast.theory.figures import COLUMNS
from ijckd_fast.theory.finite_study import study_finite
from ijckd_fast.theory.linear_study import LAWS, study_linear

__all__ = ["COLUMNS", "LAWS", "study_finite", "study_linear"]
