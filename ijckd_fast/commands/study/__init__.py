"""`ijckd-fast study`: the theory of distillation, measured beside its closed forms; a file for each study."""

SUMMARY = "The theory of distillation, measured beside its closed forms."
DESCRIPTION = (
    "linear: a linear teacher distilled into linear and deep-linear students (arXiv 2105.13093). finite: what hard "
    "labels, the teacher's probability of one label, and all of its probabilities are worth on finite domains (arXiv "
    "2310.07838). Each writes a report, plots and a CSV file."
)
