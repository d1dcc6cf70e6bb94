from ijckd_fast.compare.comparison import (
    DIGITS as DIGITS,
    Comparison as Comparison,
    load_comparison as load_comparison,
    refuse_mistakes as refuse_mistakes,
)
from ijckd_fast.compare.demo import METHODS as METHODS, run_demo as run_demo
from ijckd_fast.compare.figures import (
    Summaries as Summaries,
    comparison_rows as comparison_rows,
    method_row as method_row,
    paired_interval as paired_interval,
)
from ijckd_fast.compare.plots import (
    ACCURACY as ACCURACY,
    DIFFERENCES as DIFFERENCES,
    plot_accuracy as plot_accuracy,
    plot_differences as plot_differences,
)
from ijckd_fast.compare.report import write_comparison_report as write_comparison_report
from ijckd_fast.compare.results import RESULTS as RESULTS
from ijckd_fast.compare.runs import Run as Run, folder_of as folder_of, plan as plan
from ijckd_fast.compare.tables import (
    cells as cells,
    comparison_table as comparison_table,
    difference as difference,
    markdown_table as markdown_table,
)
from ijckd_fast.compare.training import Outcome as Outcome, train_all as train_all
