"""Several processes of one run: the updates of one, exact counts, a clean end when one dies. gloo on the CPU."""

from __future__ import annotations

import datetime
import json
import os
import signal
import socket
import time

import pytest
import recorded_run
import timm
import torch
from hub_shards import write_hub
from parquet_files import files_of
from processes import Run, free_port
from tiny_run import config, differing, distilled, options, settings
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ijckd_fast import cli
from ijckd_fast.commands.parser import parse
from ijckd_fast.data import TrainPlan, build_index, make_loader
from ijckd_fast.distill import Distiller, get_objective
from ijckd_fast.errors import UserError
from ijckd_fast.nets import create_model
from ijckd_fast.parallel import SyncBatchNorm, started, synchronise_batch_norm, world_size
from ijckd_fast.train import augment_of, checkpoint, refuse_other_images, resolve, run_folder


def _command(data, folder, teacher, **changes):
    """Two epochs of three steps of 12 images."""
    defaults = {
        **distilled(teacher),
        "epochs": 2,
        "lr": 0.01,
        "global_batch": 12,
        "eval_every": 1,
        "log_interval": 1,
        "sync_bn": True,
    }
    return ["train", *options(settings(data, folder, **{**defaults, **changes}))]


def _rows(folder, kind):
    return [row for row in run_folder.read_log(folder) if row["kind"] == kind]


# --- gradients ---


def _gradients(head: str, folder: str) -> None:
    """Of one step on 12 images shared out, to a file; one process alone computes them from all of them."""
    torch.manual_seed(0)
    student, teacher = (create_model(name, 3, image_size=16) for name in ("resnet8x0.25", "resnet8x0.5"))
    whole_batch = {"dist_inter": 1.0, "dist_intra": 2.0, "dist_head": "teacher", "srd": 0.1, "review": 0.1}
    plain = {"match_distance": "cosine"} if head == "plain" else {}
    objective = get_objective("ijckd", at=10.0, hint=1.0, **whole_batch, **plain)
    distiller = Distiller(student, teacher, objective, head="fused" if plain else head).train().to(torch.float64)
    images = torch.randn(12, 3, 16, 16, dtype=torch.float64)
    with started("cpu") as processes:
        step = distiller
        if processes.group is not None:
            distiller.synchronise(processes.group)
            step = DistributedDataParallel(distiller)
        share = slice(processes.rank * 12 // processes.world, (processes.rank + 1) * 12 // processes.world)
        out = step(images[share], (torch.arange(12) % 3)[share], progress=0.0)
        out.loss.backward()
        found = {name: out.parts[name] for name in ("dist_intra", "srd")} | {
            name: p.grad for name, p in distiller.named_parameters()
        }
        found |= {name: b for name, b in distiller.named_buffers() if b.is_floating_point()}
        torch.save(found, f"{folder}/gradients{processes.rank}of{processes.world}.pt")


@pytest.mark.parametrize("head", ["fused", "reference", "plain"])
def test_two_processes_with_sync_bn_have_the_gradients_of_one(head, tmp_path):
    """And its running statistics, to float64's rounding: the connector's BatchNorm takes part, and the regressor's; and
    the losses over a whole batch, of which each process has the same value. plain: the connector's map in PyTorch.
    """
    for world in (1, 2):
        assert Run(tmp_path / str(world), world, _gradients, head, str(tmp_path)).ends() == [0] * world
    want, *got = (torch.load(tmp_path / f"gradients{name}.pt") for name in ("0of1", "0of2", "1of2"))
    for each in got:
        for name, value in want.items():
            torch.testing.assert_close(
                each[name], value, rtol=1e-9, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}"
            )


# --- whole runs ---


class Idle(nn.Module):
    """A net with a layer that its forward calls and whose answer it does not use."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv, self.spare, self.fc = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, num_classes)

    def forward(self, images):
        x = self.conv(images)
        self.spare(x)
        return self.fc(x.mean((2, 3)))


def _train_idle(command: list[str]) -> int:
    timm.models.register_model(_idle_net)
    return cli.main(command)


def _idle_net(pretrained=False, num_classes=3, **options):
    return Idle(num_classes)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_layer_without_a_gradient_is_named(data, teacher, tmp_path, accumulate):
    command = _command(data, tmp_path / "run", teacher, student="_idle_net", accumulate=accumulate)
    run = Run(tmp_path, 2, _train_idle, command)
    assert run.ends() == [2, 2]
    for rank in range(2):
        assert "2 parameters got no gradient (student.net.spare)" in run.output(rank)
        assert "Traceback" not in run.output(rank)


@pytest.fixture(scope="module")
def worlds(data, teacher, tmp_path_factory):
    """World size -> (run folder, record of each process's batches)"""
    root, runs = tmp_path_factory.mktemp("worlds"), {}
    for world in (1, 2, 4):
        folder = root / str(world)
        records = [folder / f"batches{rank}.txt" for rank in range(world)]
        run = Run(folder, world, _record_own, str(folder), _command(data, folder / "run", teacher))
        assert run.ends() == [0] * world, run.output()
        runs[world] = folder / "run", records
    return runs


def _record_own(folder: str, command: list[str]) -> int:
    return recorded_run.recorded(f"{folder}/batches{os.environ.get('RANK', '0')}.txt", command)


def test_world_sizes_see_the_same_images_and_learn_the_same(worlds):
    (one, (record,)) = worlds[1]
    alone = {seen.step: seen.ids for seen in recorded_run.read(record)}
    losses = [row["loss"] for row in _rows(one, "train")]
    for world in (2, 4):
        folder, records = worlds[world]
        shares = [{seen.step: seen.ids for seen in recorded_run.read(each)} for each in records]
        assert {step: ",".join(share[step] for share in shares) for step in alone} == alone
        # float32, and a ReLU whose input is 0 but for rounding: the gradients themselves are compared in float64 above
        torch.testing.assert_close([row["loss"] for row in _rows(folder, "train")], losses, rtol=0.03, atol=0)
        assert _rows(folder, "train")[0]["loss"] == pytest.approx(losses[0], rel=1e-6)
        assert json.loads((folder / "summary.json").read_text())["processes"] == world


def test_validation_counts_every_image_once(worlds):
    for folder, _ in worlds.values():
        assert {row["images"] for row in _rows(folder, "eval")} == {18}
    teachers = [(folder / run_folder.TEACHER).read_bytes() for folder, _ in worlds.values()]
    assert len({len(each) for each in teachers}) == 1
    two, four = (checkpoint.load(worlds[world][0] / "last.pt")["learner"] for world in (2, 4))
    for name, value in two.items():
        torch.testing.assert_close(four[name], value, rtol=1e-3, atol=1e-4)


def _wait_for_steps(run: Run, folder, steps: int) -> None:
    run.wait_until(lambda: len(_rows(folder, "train")) >= steps)


def test_one_process_killed_ends_the_other_and_the_run_goes_on(data, teacher, worlds, tmp_path):
    folder = tmp_path / "run"
    command = _command(data, folder, teacher, checkpoint_steps=1)
    run = Run(tmp_path, 2, cli.main, command)
    _wait_for_steps(run, folder, 3)
    run.signal(signal.SIGKILL, rank=1)
    begin = time.monotonic()
    codes = run.ends(60)
    assert codes == [2, -signal.SIGKILL]
    assert time.monotonic() - begin < 60
    assert "lost contact with the others: one of them has ended" in run.output()
    assert "Traceback" not in run.output()
    step = checkpoint.load(folder / "last.pt")["step"]
    assert 2 <= step < 6

    again = Run(tmp_path, 2, cli.main, ["train", "--resume", str(folder)])
    assert again.ends() == [0, 0], again.output()
    assert f"continuing from step {step}" in again.output()
    states = [checkpoint.load(each / "last.pt") for each in (folder, worlds[2][0])]
    assert differing(*(state["learner"] for state in states)) == []
    assert differing(*(state["optimizer"] for state in states)) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 0)])
def test_a_signal_to_one_process_is_for_all(data, teacher, tmp_path, number, code):
    """SIGTERM saves and stops all of them at one step; SIGUSR1 saves and continues."""
    folder = tmp_path / "run"
    run = Run(tmp_path, 2, cli.main, _command(data, folder, teacher, epochs=8 if code == 0 else 1000, log_interval=1))
    _wait_for_steps(run, folder, 3)
    seen = len(_rows(folder, "train"))
    run.signal(number, rank=1)
    while not (folder / "last.pt").exists():
        time.sleep(0.002)
    step = checkpoint.load(folder / "last.pt")["step"]
    assert run.ends() == [code, code], run.output()
    if code:
        assert step == len(_rows(folder, "train"))
        assert all(f"at step {step} of" in run.output(rank) for rank in range(2))
    assert seen <= step <= seen + 6  # this process saw the log late; the run was saved within a step


def test_goes_on_with_another_number_of_processes(data, teacher, worlds, tmp_path):
    """Elastic: the same global batches in other shares; the loss continues where it was."""
    folder = tmp_path / "run"
    stopped = Run(tmp_path, 2, cli.main, _command(data, folder, teacher, max_steps=4, schedule="cosine"))
    assert stopped.ends() == [0, 0]
    (folder / "summary.json").unlink()  # as if it had been stopped there
    state = torch.load(folder / "last.pt", weights_only=True)
    state["config"]["max_steps"] = None
    torch.save(state, folder / "last.pt")
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("max_steps: 4", "max_steps: null"))
    record = tmp_path / "batches.txt"
    one = Run(tmp_path, 1, recorded_run.recorded, str(record), ["train", "--resume", str(folder)])
    assert one.ends() == [0], one.output()
    assert "begun with 2 processes, continuing with 1: the same images in every step" in one.output()
    alone = {seen.step: seen.ids for seen in recorded_run.read(worlds[1][1][0])}
    assert {seen.step: seen.ids for seen in recorded_run.read(record)} == {step: alone[step] for step in range(4, 6)}
    assert [row["step"] for row in _rows(folder, "train")] == list(range(1, 7))


def test_files_of_many_images_are_shared_out_and_gone_on_with(data, tmp_path):
    """Parquet files, validated on archives of another folder, by two processes that are killed and go on: the batches
    of the same images in class folders.
    """
    train, val = build_index(data, "train"), build_index(data, "val")
    files_of(tmp_path / "files", train, per_file=10)
    (tmp_path / "archives").mkdir()
    write_hub(tmp_path / "archives", [val])
    folder, val_dir = tmp_path / "run", str(tmp_path / "archives")
    asked = {"epochs": 2, "global_batch": 12, "log_interval": 1, "checkpoint_steps": 1, "eval_every": 2}
    asked = settings(tmp_path / "files", folder, val_dir=val_dir, data_backend="dali", **asked)
    killed = Run(tmp_path, 2, _record_own, str(tmp_path), ["train", *options(asked)])
    _wait_for_steps(killed, folder, 2)
    for rank in range(2):
        killed.signal(signal.SIGKILL, rank)
    assert killed.ends() == [-signal.SIGKILL] * 2
    again = Run(tmp_path, 2, _record_own, str(tmp_path), ["train", "--resume", str(folder)])
    assert again.ends() == [0, 0], again.output()
    assert "continuing from step " in again.output()
    assert [row["images"] for row in _rows(folder, "eval")] == [18]
    for rank in range(2):
        plan = TrainPlan(train, augment_of(resolve(config(data, folder))), 6, 0, rank, 2)
        with make_loader("dali", plan, stop=6) as loader:
            wanted = [recorded_run.line_of(step, batch) for step, batch in enumerate(loader)]
        seen = recorded_run.read(tmp_path / f"batches{rank}.txt")
        assert {f"{one.step} {one.ids} {one.digest}\n" for one in seen} == set(wanted)


# --- what is refused ---


def test_a_batch_that_cannot_be_shared_out_is_refused(data, teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(UserError, match="the global batch of 12 images cannot be shared out to 5 processes"):
        _run_here(_command(data, tmp_path, teacher))


def test_another_batch_size_on_resume_is_refused(data, teacher, worlds):
    with pytest.raises(
        UserError, match="takes 12 images a step, which is 12 for each of 1 processes, got --batch-size 6"
    ):
        _run_here(["train", "--resume", str(worlds[1][0]), "--batch-size", "6"])


def _run_here(words: list[str]) -> None:
    """Unlike main, which one of several processes leaves by os._exit."""
    command, args = parse(words)
    command.run(args)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_meeting_that_fails_says_where(rank, monkeypatch):
    port = free_port()
    for name, value in {
        "RANK": rank,
        "WORLD_SIZE": 2,
        "LOCAL_RANK": rank,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("ijckd_fast.parallel.processes.MEETING", datetime.timedelta(seconds=1))
    with socket.socket() as taken:
        if rank == 0:
            taken.bind(("127.0.0.1", port))
            taken.listen()
        with (
            pytest.raises(UserError, match=f"process {rank} of 2 could not meet the others at 127.0.0.1:{port}"),
            started("cpu"),
        ):
            pass


def test_a_torch_without_nccl_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(UserError, match="NCCL shares the gradients of GPUs, got --device cpu"), started("cpu", "nccl"):
        pass


def test_machines_with_different_images_are_refused(data, tmp_path):
    with pytest.raises(
        UserError, match=r"processes 0 and 2 see different images in .*/val, wanted the same files on every machine"
    ):
        refuse_other_images(config(data, tmp_path), [("a", "b"), ("a", "b"), ("a", "c")])


def test_a_preset_s_global_batch_gives_way_to_the_batch_size(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "ijckd_fast.train.loop.train", lambda config, **_: seen.append((config.global_batch, config.batch_size))
    )
    for more in ([], ["--batch-size", "64"], ["--batch-size", "64", "--global-batch", "128"]):
        assert cli.main(["train", "--config", "imagenet_r34_r18", "--data-dir", str(tmp_path), *more]) == 0
    assert seen == [(256, 256), (None, 64), (128, 64)]


def test_srun_is_understood(monkeypatch):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert world_size() == 1  # an interactive allocation: nobody said where to meet
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert world_size() == 4


# --- SyncBN ---


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet10t", "timm/efficientnet_b0"])
def test_synchronised_nets_keep_names_maps_and_activations(name, group):
    torch.manual_seed(0)
    net = create_model(name, 5, image_size=64).train()
    images = torch.randn(4, 3, 64, 64)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    names, norms = list(net.state_dict()), sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())
    state = {key: value.clone() for key, value in net.state_dict().items()}
    torch.manual_seed(1)
    want = net.features(images, need_map=True)
    statistics = {key: value.clone() for key, value in net.state_dict().items()}
    net.load_state_dict(state)
    synchronise_batch_norm(net, group)
    assert list(net.state_dict()) == names
    assert sum(isinstance(m, SyncBatchNorm) for m in net.modules()) == norms
    torch.manual_seed(1)
    for got, expected in zip(net.features(images, need_map=True), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    for key, value in net.state_dict().items():
        torch.testing.assert_close(value, statistics[key], rtol=1e-4, atol=1e-5)
