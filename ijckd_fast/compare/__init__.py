"""Several methods in several regimes on one dataset, several seeds each, with intervals; the demo is one of them.

A comparison is a YAML file (`load_comparison`). `train_all` trains what is not there yet, `write_comparison_report`
puts the runs into tables and plots.
"""

from ijckd_fast.compare.comparison import DIGITS, Comparison, load_comparison
from ijckd_fast.compare.demo import METHODS, run_demo
from ijckd_fast.compare.figures import Summaries, comparison_rows, method_row, paired_interval
from ijckd_fast.compare.plots import ACCURACY, DIFFERENCES, plot_accuracy, plot_differences
from ijckd_fast.compare.report import write_comparison_report
from ijckd_fast.compare.results import RESULTS
from ijckd_fast.compare.runs import Run, folder_of, plan
from ijckd_fast.compare.tables import cells, comparison_table, difference, markdown_table
from ijckd_fast.compare.training import Outcome, train_all

__all__ = [
    "ACCURACY",
    "DIFFERENCES",
    "DIGITS",
    "METHODS",
    "RESULTS",
    "Comparison",
    "Outcome",
    "Run",
    "Summaries",
    "cells",
    "comparison_rows",
    "comparison_table",
    "difference",
    "folder_of",
    "load_comparison",
    "markdown_table",
    "method_row",
    "paired_interval",
    "plan",
    "plot_accuracy",
    "plot_differences",
    "run_demo",
    "train_all",
    "write_comparison_report",
]
