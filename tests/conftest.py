"""Set before torch is imported: two spinning OpenMP threads on shared cores make small tests ten times slower."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
