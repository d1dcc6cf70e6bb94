"""What docs/ shows is run at tiny size: own_model.md's Python, distributed.md's SLURM script; links lead somewhere."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_run import distilled, options, settings, write_teacher, write_tree

from ijckd_fast.train import run_folder

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def _blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.DOTALL | re.MULTILINE)


def _replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"{old!r} is not once in {text!r}"
    return text.replace(old, new)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    later = {"performance.md", "docs/performance.md"}  # may come with another change
    assert [link for link in links if link not in later and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_prose_has_lines_of_at_most_120_columns(page):
    """Rows of tables cannot be broken."""
    lines = page.read_text().splitlines()
    assert [f"{n}: {line}" for n, line in enumerate(lines, 1) if len(line) > 120 and not line.startswith("|")] == []


def test_own_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = write_tree(tmp_path / "data")
    net, script, one_call, loop, after, renormalised, dataset = _blocks("own_model.md", "python")
    names: dict = {"__name__": "__main__"}
    exec(one_call, {})

    exec(net, names)
    tiny = {"image_size": 32, "eval_resize": 32, "epochs": 1, "eval_every": 1, "allow_weak_teacher": True}
    changes = {"student": "my_large_net", **tiny}
    monkeypatch.setattr(sys, "argv", ["", "train", *options(settings(data, Path("runs/teacher"), **changes))])
    with pytest.raises(SystemExit) as ended:
        exec(script, names)
    assert ended.value.code == 0
    changes = {"student": "my_small_net", "teacher": "runs/teacher", "objective": "ijckd", **tiny}
    assert names["main"](["train", *options(settings(data, Path("runs/student"), **changes))]) == 0
    assert names["main"](["evaluate", "runs/student"]) == 0
    assert "my_small_net by ijckd on 18 images" in capsys.readouterr().out

    line = next(line for line in loop.splitlines() if line.startswith("data_dir, size, "))
    exec(loop.replace(line, _settings_of_the_loop(line, data)), names)
    assert re.match(r"0 \d+\.\d+ \{'ce': .*, 'sr': .*, 'fm': .*\}\n$", capsys.readouterr().out)
    exec(after, names)
    assert re.match(r"top-1 \d+\.\d\d %, agreement", capsys.readouterr().out)
    names["distiller"].load_state_dict(torch.load("learner.pt"))
    assert not {"head.weight", "head.bias"} & torch.load("student.pt").keys()

    exec(renormalised, names)
    net, pixels = names["inception_like"].eval(), torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pooled = net.features((pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1))[1]
    torch.testing.assert_close(pooled, net.net(2 * pixels - 1), atol=1e-4, rtol=1e-4)

    exec(dataset, names)
    assert capsys.readouterr().out.count("torch.Size([4, 3, 32, 32])") == 3


def _settings_of_the_loop(line: str, data: Path) -> str:
    """The line with a tiny run's values instead of the page's."""
    names = "data_dir, size, batch_size, epochs, lr, backend, device"
    assert line == f'{names} = "DIR", 224, 128, 90, 0.05, "dali", torch.device("cuda")'
    return f'{names} = {str(data)!r}, 32, 8, 1, 0.05, "pillow", torch.device("cpu")'


_SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 "$@" &
    echo $! >>"$STUBS/pids"
done
code=0
for pid in $(jobs -p); do wait "$pid" || code=$?; done
exit $code
"""
_SCANCEL = """#!/bin/bash
[ "$*" = "--signal=TERM $SLURM_JOB_ID" ] && kill -TERM $(cat "$STUBS/pids")
"""
_SCONTROL = """#!/bin/bash
case "$1 $2" in
"show hostnames") echo 127.0.0.1; echo 127.0.0.2 ;;
"requeue $SLURM_JOB_ID") touch "$STUBS/requeued" ;;
*) exit 1 ;;
esac
"""


@pytest.mark.slow
def test_slurm_script_saves_is_queued_again_and_resumes(tmp_path):
    (script,) = _blocks("distributed.md", "bash")
    data, teacher = write_tree(tmp_path / "data"), write_teacher(tmp_path / "teacher.pt")
    run, stubs = tmp_path / "run", tmp_path / "stubs"
    changes = {**distilled(teacher), "epochs": 20, "log_interval": 1, "eval_every": 20, "global_batch": 12}
    given = options({key: value for key, value in settings(data, run, **changes).items() if key != "output_dir"})
    script = _replaced(script, "/shared/runs/r34-r18", str(run))
    script = _replaced(script, "--config imagenet_r34_r18 --data-dir /shared/imagenet", " ".join(given))
    script = _replaced(script, " --global-batch 256 --workers 10", "")
    stubs.mkdir()
    command = f'#!/bin/bash\nexec "{sys.executable}" -m ijckd_fast.cli "$@"\n'
    for name, text in {"srun": _SRUN, "scancel": _SCANCEL, "scontrol": _SCONTROL, "ijckd-fast": command}.items():
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    environment = {
        **{key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
        "PATH": f"{stubs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "STUBS": str(stubs),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[0-1]",
    }

    def started() -> subprocess.Popen:
        (stubs / "pids").unlink(missing_ok=True)
        return subprocess.Popen(["bash", "-c", script], env=environment, text=True, stdout=-1, stderr=-2)

    job = started()
    while len(run_folder.read_log(run)) < 3:
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0, output
    assert output.count("stopped by SIGTERM at step") == 2
    assert (stubs / "requeued").exists()

    (stubs / "requeued").unlink()
    again = started()
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    assert "2 processes, 12 images a step; continuing from step" in output
    assert run_folder.read_json(run / run_folder.SUMMARY)["steps"] == 60
    assert not (stubs / "requeued").exists()
