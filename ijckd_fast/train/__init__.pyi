from ijckd_fast.signals import Stopped as Stopped
from ijckd_fast.train.begun import finished_summary as finished_summary, settings_of as settings_of
from ijckd_fast.train.build import (
    build_distiller as build_distiller,
    build_indexes as build_indexes,
    build_teacher as build_teacher,
    build_val_loader as build_val_loader,
    build_view_loader as build_view_loader,
    open_cache as open_cache,
    optimizer_of as optimizer_of,
    refuse_other_images as refuse_other_images,
    trained_on as trained_on,
)
from ijckd_fast.train.config import TrainConfig as TrainConfig, make_config as make_config
from ijckd_fast.train.ema import Ema as Ema
from ijckd_fast.train.guard import FiniteGuard as FiniteGuard
from ijckd_fast.train.loaded_run import LoadedRun as LoadedRun, load_run as load_run
from ijckd_fast.train.loop import train as train
from ijckd_fast.train.meters import Meter as Meter, Stopwatch as Stopwatch
from ijckd_fast.train.optimizer import build_optimizer as build_optimizer, learning_rate as learning_rate
from ijckd_fast.train.overlap import warnings_of_seen_images as warnings_of_seen_images
from ijckd_fast.train.parity import FolderParity as FolderParity, folder_parity as folder_parity
from ijckd_fast.train.resolving import (
    amp_dtype_of as amp_dtype_of,
    augment_of as augment_of,
    data_folder_of as data_folder_of,
    device_of as device_of,
    normalisations_of as normalisations_of,
    objective_of as objective_of,
    resolve as resolve,
    teacher_view_of as teacher_view_of,
)
from ijckd_fast.train.state import RunState as RunState, Saved as Saved
from ijckd_fast.train.step import TrainStep as TrainStep
from ijckd_fast.train.teacher_checks import (
    check_parity as check_parity,
    digests as digests,
    refuse_restless_teacher as refuse_restless_teacher,
    refuse_weak_teacher as refuse_weak_teacher,
    teacher_fingerprint as teacher_fingerprint,
)
