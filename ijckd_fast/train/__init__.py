"""One run: its settings (config, resolving), what it is made of (build, teacher_checks), its state (state, checkpoint),
the loop (loop, training, step), why it ends (stops), what it leaves behind (run_folder, log, report), and finished runs
(loaded_run).

The names below are imported when they are asked for: the command line reads settings without waiting for torch.
"""

from __future__ import annotations

from ijckd_fast.lazy import exports

__all__, __getattr__ = exports(__name__, __file__)
