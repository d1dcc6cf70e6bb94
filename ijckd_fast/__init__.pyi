from ijckd_fast.data import DatasetLoader as DatasetLoader, index_dataset as index_dataset
from ijckd_fast.distill import Distiller as Distiller, get_objective as get_objective
from ijckd_fast.head import (
    HAS_CUDA_LIBRARY as HAS_CUDA_LIBRARY,
    FrozenClassifier as FrozenClassifier,
    class_map_loss as class_map_loss,
    classifier_gram as classifier_gram,
    classifier_loss as classifier_loss,
    classifier_loss_and_grad as classifier_loss_and_grad,
    connector_loss_and_grads as connector_loss_and_grads,
    connector_match as connector_match,
    pooled_positions as pooled_positions,
    projected_classifier_loss as projected_classifier_loss,
    projected_classifier_loss_and_grads as projected_classifier_loss_and_grads,
    take_bad_rows as take_bad_rows,
)
from ijckd_fast.nets import create_model as create_model
from ijckd_fast.train import TrainConfig as TrainConfig, TrainStep as TrainStep, load_run as load_run

__version__: str
