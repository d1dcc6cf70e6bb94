"""The kernels on the CPU under AddressSanitizer and UndefinedBehaviorSanitizer: what happens within a thread, locals,
arithmetic.
"""

import os
import pathlib
import subprocess
import sys

import pytest
from emulator import block_cases, build, cases, class_map_cases, tile_cases

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # compiles every kernel anew, on cores that others may use, too
    pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not())),
]

ROOT = pathlib.Path(__file__).parents[2]

SANITIZED_CASES = """
import ctypes, re, sys
library, fault = sys.argv[1:]
assert ctypes.CDLL(library).broken_locals(int(fault)) == 0
from emulator import block_cases, build, cases, class_map_cases, tile_cases
kernels = build.load(build.pathlib.Path(library))
everything = cases.CASES | class_map_cases.CASES | tile_cases.CASES | block_cases.CASES
# not large ones, nor those of tiles that differ from others in the half type only
tiles = [name for name in tile_cases.CASES if " f16 " in name and name.replace(" f16 ", " bf16 ") in everything]
chosen = {name for name in everything if max(map(int, re.findall(r" (\\d+)", name)), default=0) <= 1000} - set(tiles)
for name in chosen:
    everything[name](kernels)
print(len(chosen), "cases")
"""


def test_kernels_under_address_and_undefined_behaviour_sanitizers():
    library = build.built("sanitized") / "emulated_kernels.so"
    environment = os.environ | build.sanitizer_environment() | {"PYTHONPATH": str(ROOT / "tests")}

    def run(fault):
        command = [sys.executable, "-c", SANITIZED_CASES, str(library), str(fault)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    faults = ("out of bounds", "stack-buffer-overflow", "signed integer overflow", "shift exponent 32 is too large")
    for fault, text in enumerate(faults, 1):
        done = run(fault)
        assert done.returncode != 0, text
        assert text in done.stderr
    done = run(0)
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout.split()[0]) > 0.8 * len(
        cases.CASES | class_map_cases.CASES | tile_cases.CASES | block_cases.CASES
    )
