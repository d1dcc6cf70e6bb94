from ijckd_fast.theory.figures import COLUMNS as COLUMNS
from ijckd_fast.theory.finite_study import study_finite as study_finite
from ijckd_fast.theory.linear_study import LAWS as LAWS, study_linear as study_linear
