"""Nets to distil from and into: by name, with their taps, their weights and what they cost.

`create_model` builds one of ours, torchvision's or timm's nets and returns it as a `Tapped`: its map, its pooled
features and its classifier, however the net is written. timm and torchvision are imported only when a name is looked up
in them.
"""

from ijckd_fast.nets.cost import Backbone, count_macs, count_parameters, macs
from ijckd_fast.nets.folding import fold_batch_norm
from ijckd_fast.nets.intact import fault_in, seal
from ijckd_fast.nets.names import create_model, is_model_name, library_of, published_normalisation
from ijckd_fast.nets.same import same
from ijckd_fast.nets.stages import Stage
from ijckd_fast.nets.tapped import CachedTeacher, Tapped
from ijckd_fast.nets.weights import fingerprint, require_fit

__all__ = [
    "Backbone",
    "CachedTeacher",
    "Stage",
    "Tapped",
    "count_macs",
    "count_parameters",
    "create_model",
    "fault_in",
    "fingerprint",
    "fold_batch_norm",
    "is_model_name",
    "library_of",
    "macs",
    "published_normalisation",
    "require_fit",
    "same",
    "seal",
]
