"""A trained run as files to deploy: one module in safetensors and ONNX, and the student in its library's own names.

`Deployed` is what answers: backbone, connector and classifier with every BatchNorm folded, in plain PyTorch.
`write_export` gives files their names only after they have answered as the trained net does. `load_exported` reads
them.
"""

from ijckd_fast.export.answers import AnswersDiffer, LogitsCompared, compare_logits
from ijckd_fast.export.cost import cost_table, measure_cost
from ijckd_fast.export.deployed import Deployed, deployed_module
from ijckd_fast.export.description import summary_lines
from ijckd_fast.export.folder import FILES, refuse_occupied
from ijckd_fast.export.load import load_exported
from ijckd_fast.export.onnx_file import require_onnx
from ijckd_fast.export.timm_call import timm_options
from ijckd_fast.export.write import write_export

__all__ = [
    "FILES",
    "AnswersDiffer",
    "Deployed",
    "LogitsCompared",
    "compare_logits",
    "cost_table",
    "deployed_module",
    "load_exported",
    "measure_cost",
    "refuse_occupied",
    "require_onnx",
    "summary_lines",
    "timm_options",
    "write_export",
]
