from ijckd_fast.head.class_map import (
    class_map_loss as class_map_loss,
    pooled_positions as pooled_positions,
)
from ijckd_fast.head.classifier import (
    BadRows as BadRows,
    classifier_loss as classifier_loss,
    projected_classifier_loss as projected_classifier_loss,
    take_bad_rows as take_bad_rows,
)
from ijckd_fast.head.connector import connector_match as connector_match
from ijckd_fast.head.dispatch import HAS_CUDA_LIBRARY as HAS_CUDA_LIBRARY
from ijckd_fast.head.frozen import (
    FrozenClassifier as FrozenClassifier,
    classifier_gram as classifier_gram,
)
from ijckd_fast.head.gradients import (
    classifier_loss_and_grad as classifier_loss_and_grad,
    connector_loss_and_grads as connector_loss_and_grads,
    projected_classifier_loss_and_grads as projected_classifier_loss_and_grads,
)
from ijckd_fast.head.libraries import (
    REBUILD as REBUILD,
    kernels_for as kernels_for,
    load_libraries as load_libraries,
    refused_launches as refused_launches,
)
