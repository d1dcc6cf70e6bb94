"""What a student learns and how: loss terms, objectives made of them, connectors, and the distiller, the training step.

A term (`terms/`, a file each) says what it needs of student and teacher, its settings and its value; an objective
(`objectives.py`) is a row of settings; `Distiller` is a module that makes what the terms need, and its call is the
step.
"""

from ijckd_fast.lazy import exports

__all__, __getattr__ = exports(__name__, __file__)
