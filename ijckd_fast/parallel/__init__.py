"""The processes of one run.

`started` says who this process is and lets it meet the others; `Processes` is what they then do together.
`synchronise_batch_norm` makes a net take its statistics over all of them. One process alone needs none of it and pays
nothing.
"""

from ijckd_fast.parallel.agreement import refuse_differences
from ijckd_fast.parallel.processes import Processes, all_processes, local_world_size, lost_contact, started, world_size
from ijckd_fast.parallel.sync_bn import SyncBatchNorm, batch_norm, sum_over, synchronise_batch_norm

__all__ = [
    "Processes",
    "SyncBatchNorm",
    "all_processes",
    "batch_norm",
    "local_world_size",
    "lost_contact",
    "refuse_differences",
    "started",
    "sum_over",
    "synchronise_batch_norm",
    "world_size",
]
