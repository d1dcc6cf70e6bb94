"""A LightningModule (pip install lightning), with random nets and pixels: python examples/lightning_module.py"""

from __future__ import annotations

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ijckd_fast.distill import Distiller, get_objective
from ijckd_fast.nets import Tapped, create_model


class Distillation(lightning.LightningModule):
    """Student and connector are its parameters and its checkpoint; the teacher is moved along and is in neither."""

    def __init__(self, student: Tapped, teacher: Tapped, objective: str = "ijckd", lr: float = 0.05) -> None:
        super().__init__()
        self.distiller = Distiller(student, teacher, get_objective(objective))
        self.lr = lr
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        out = self.distiller(*batch, progress=self.trainer.global_step / self.trainer.num_training_batches)
        self.log_dict({"loss": out.loss.detach(), **out.parts})
        self.losses.append(out.loss.item())
        return out.loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        images, labels = batch
        self.log("top1", (self.distiller.predict(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.distiller.parameters(), self.lr, momentum=0.9)


def main(steps: int = 10, accelerator: str = "cpu") -> list[float]:
    """Distills for `steps` steps on random images; returns the losses."""
    torch.manual_seed(0)
    student, teacher = (create_model(name, 10, image_size=32) for name in ("resnet8", "resnet20"))
    module = Distillation(student, teacher)
    data = DataLoader(TensorDataset(torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,))), batch_size=16)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    lightning.Trainer(accelerator=accelerator, devices=1, max_steps=steps, **quiet).fit(module, data, data)
    return module.losses


if __name__ == "__main__":
    print(main())
