"""The launch files as they are, on two nodes that are both this machine: stand-ins take the place of ssh and SLURM."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.test_never_lost import metrics, options, to_argv, wait_for  # noqa: F401

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    # A terminal for the remote command, as -tt gives it.
    "ssh": 'shift 2; exec script --quiet --flush --return --command "$*" /dev/null',
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$SEEN"; fi',
    "srun": 'trap \'kill -TERM $a $b\' TERM; "$@" & a=$!; "$@" & b=$!; wait $a; c=$?; wait $a; wait $b; wait $b; exit $c',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
}


@pytest.fixture
def environment(tmp_path):
    for name, text in PROGRAMS.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/bash\n{text}\n")
        program.chmod(0o755)
    return os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "MASTER": "localhost",
        "PORT": str(20000 + os.getpid() % 10000),
        "SEEN": str(tmp_path / "requeued"),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "42",
    }


LAUNCH = {"ssh": ["launch/ssh.sh", "one,two"], "slurm": ["launch/slurm.sbatch"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCH)
def test_a_run_to_its_end(name, options, environment):  # noqa: F811
    result = subprocess.run([*LAUNCH[name], *to_argv(options), "--resume"], env=environment, cwd=ROOT, timeout=300)
    assert result.returncode == 0
    assert [row["step"] for row in metrics(options["out"])] == [3, 6] and (options["out"] / "backbone").exists()
    assert not Path(environment["SEEN"]).exists()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "number"), [("ssh", signal.SIGINT), ("slurm", signal.SIGUSR1)])
def test_a_signal_saves_on_all_nodes(name, number, options, environment):  # noqa: F811
    options |= {"epochs": 2000, "log_interval": 1}
    process = subprocess.Popen([*LAUNCH[name], *to_argv(options), "--resume"], env=environment, cwd=ROOT)
    wait_for(lambda: (options["out"] / "metrics.jsonl").exists() and len(metrics(options["out"])) > 3)
    process.send_signal(number)
    started = time.monotonic()
    assert process.wait(timeout=90) != 0
    assert time.monotonic() - started < 60
    assert list((options["out"] / "checkpoints").glob("step-*/trainer_state.json"))
    assert (name == "slurm") == Path(environment["SEEN"]).exists()


@pytest.mark.slow
def test_ctrl_c_under_torchrun_saves(options):  # noqa: F811
    """The terminal signals all processes, and torchrun repeats it to its own: that counts as one request."""
    options |= {"epochs": 2000, "log_interval": 1}
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "mapet", *to_argv(options)],
        stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: (options["out"] / "metrics.jsonl").exists() and len(metrics(options["out"])) > 3)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=90)
    assert error.count("stopped by SIGINT at step") == 1 and "saved. Resume with" in error
    assert list((options["out"] / "checkpoints").glob("step-*/trainer_state.json"))
