"""What the room of nets offers, and what it does without."""

import subprocess
import sys

import ijckd_fast.nets


def test_libraries_of_nets_are_imported_when_a_name_is_looked_up():
    """Our own nets need neither timm nor torchvision."""
    code = (
        "import sys, ijckd_fast.nets as nets; nets.create_model('resnet8x0.5', 3, image_size=16);"
        "print([name for name in ('timm', 'torchvision') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_name_that_is_offered_is_there():
    assert sorted(ijckd_fast.nets.__all__) == sorted(set(ijckd_fast.nets.__all__))
    for name in ijckd_fast.nets.__all__:
        assert getattr(ijckd_fast.nets, name).__module__.startswith("ijckd_fast.nets.")
