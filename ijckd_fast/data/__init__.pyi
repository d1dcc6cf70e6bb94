from ijckd_fast.data.imagenet_names import class_names as class_names
from ijckd_fast.data.index import DataFolder as DataFolder, Index as Index, Paths as Paths, build_index as build_index
from ijckd_fast.data.load import (
    AUTO as AUTO,
    BACKENDS as BACKENDS,
    Batch as Batch,
    DatasetLoader as DatasetLoader,
    Loader as Loader,
    PillowLoader as PillowLoader,
    SyntheticLoader as SyntheticLoader,
    backend_of as backend_of,
    deliver as deliver,
    index_dataset as index_dataset,
    make_loader as make_loader,
    parity as parity,
    refuse_backend as refuse_backend,
)
from ijckd_fast.data.plan import (
    AFFINE_OFF as AFFINE_OFF,
    Augment as Augment,
    BatchPlan as BatchPlan,
    EvalPlan as EvalPlan,
    Mixing as Mixing,
    Plan as Plan,
    StandIns as StandIns,
    TooManyUnreadable as TooManyUnreadable,
    TrainPlan as TrainPlan,
    ViewPlan as ViewPlan,
    check_views as check_views,
)
from ijckd_fast.data.prepare import write_digits as write_digits
from ijckd_fast.data.sources import IMAGE_EXTENSIONS as IMAGE_EXTENSIONS, Fields as Fields, holds_blocks as holds_blocks
