from ijckd_fast.nets.cost import (
    Backbone as Backbone,
    count_macs as count_macs,
    count_parameters as count_parameters,
    macs as macs,
)
from ijckd_fast.nets.equality import same as same
from ijckd_fast.nets.folding import fold_batch_norm as fold_batch_norm
from ijckd_fast.nets.intact import fault_in as fault_in, seal as seal
from ijckd_fast.nets.listed import no_weights as no_weights, refuse_unknown as refuse_unknown
from ijckd_fast.nets.names import (
    create_model as create_model,
    is_model_name as is_model_name,
    library_of as library_of,
    published_normalisation as published_normalisation,
)
from ijckd_fast.nets.stages import Stage as Stage
from ijckd_fast.nets.tapped import CachedTeacher as CachedTeacher, Tapped as Tapped
from ijckd_fast.nets.weights import fingerprint as fingerprint, require_fit as require_fit
