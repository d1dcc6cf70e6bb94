"""The same script with one thread and with two: what it prints, lists of hexadecimal floats, is the same.

Where torch's own products already have other last bits with two threads (MKL's and oneDNN's on some Intel processors
share the terms of long sums), ours, which are taken by them, may differ by roundings.
"""

from __future__ import annotations

import ast
import functools
import math
import os
import subprocess
import sys

_PRODUCTS = """
import torch
g = torch.Generator().manual_seed(0)
sizes = (96, 21841, 24), (96, 24, 21841), (71, 65537, 24), (33, 1000, 520), (33, 101, 24), (784, 24, 72)
for n, depth, width in sizes:
    a, b = torch.randn(n, depth, generator=g), torch.randn(depth, width, generator=g)
    x, w = a.T.reshape(1, depth, n, 1).requires_grad_(), b.T.reshape(width, depth, 1, 1).contiguous().requires_grad_()
    y = torch.nn.functional.conv2d(x, w)
    grads = torch.autograd.grad(y, (x, w), torch.randn(y.shape, generator=g))
    products = (a @ b, a.bfloat16() @ b.bfloat16(), torch.nn.functional.linear(a, b.T.contiguous()), y, *grads)
    print([product.double().sum().item().hex() for product in products])
"""


def _printed(script: str) -> list[list[str]]:
    """Its lines with one thread and with two."""
    lines = []
    for threads in ("1", "2"):
        env = dict(os.environ, OMP_NUM_THREADS=threads, PYTHONPATH=os.pathsep.join(sys.path))
        counted = f"import torch\nassert torch.get_num_threads() == {threads}\n{script}"
        done = subprocess.run([sys.executable, "-c", counted], env=env, capture_output=True, text=True, check=True)
        lines.append(done.stdout.splitlines())
    return lines


@functools.cache
def libraries_share_sums() -> bool:
    """Whether torch's own products have other bits with two threads than with one."""
    one, two = _printed(_PRODUCTS)
    return one != two


def assert_same_for_any_thread_count(script: str) -> tuple[list[str], list[str]]:
    """Returns the lines that it prints with one thread and with two."""
    one, two = _printed(script)
    if not libraries_share_sums():
        assert one == two
    assert len(one) == len(two)
    for a, b in zip(map(ast.literal_eval, one), map(ast.literal_eval, two), strict=True):
        for x, y in zip(map(float.fromhex, a), map(float.fromhex, b), strict=True):
            assert math.isclose(x, y, rel_tol=1e-3, abs_tol=1e-5), f"{x} with one thread, {y} with two"
    return one, two
