"""What the ops need: torch, and nothing else that is installed beside it."""

import subprocess
import sys

BESIDE_TORCH = (
    "nvidia.dali timm torchvision pyarrow matplotlib rich jsonargparse yaml PIL filelock tensorboard safetensors"
)
SCRIPT = """
import sys
import ijckd_fast, ijckd_fast.head
assert "torch" not in sys.modules, "torch at import"
import torch
torch_alone = set(sys.modules)
z, weight, labels = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4), torch.tensor([0, 4, 2])
ijckd_fast.classifier_loss(z, weight, None, labels)[0].backward()
ijckd_fast.head.connector_match(z, torch.randn(6, 4))
from ijckd_fast.head import reference
reference.classifier_loss(z, weight, None, labels)
print(*sorted(set(sys.modules) - torch_alone))
"""


def test_the_ops_import_torch_alone():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    imported = done.stdout.split()
    assert "ijckd_fast.head.classifier" in imported
    assert [m for m in imported if m in BESIDE_TORCH.split()] == []
    ours = {m.split(".")[1] for m in imported if m.startswith("ijckd_fast.")}
    assert ours <= {"head", "lazy"}
