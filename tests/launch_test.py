"""What the launchers say to gcloud, Slurm and train.py: programs of these names on the PATH write
down their arguments, and do on this machine what they would do elsewhere.
"""

import contextlib
import importlib.util
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from absl import flags
from absl.testing import flagsaver

from policymix.runs import train
from tests import commands

LAUNCH = commands.ROOT / "experiments/launch"
FLAGS = ("--config=configs/pi0_state.py", "--workdir=runs/a b", "--config.train.freeze=('x',)")
GCLOUD = ["gcloud", "compute", "tpus", "tpu-vm"]
WORKER = 'cd "$HOME"; command=${!#}; bash -c "${command#--command=}"'  # what its shell does
SAVED = "stopped after step 3 of 9, which is saved"
TRAINING = f"""#!/bin/bash
trap 'echo {SAVED}; exit 0' TERM
echo "trains $JAX_LOCAL_DEVICE_IDS" "$@"
touch started
while :; do sleep 0.02; done
"""
# Slurm's own kills its tasks at SIGTERM (_srun_signal_mgr in its source).
SRUN = """
trap 'kill -KILL $task' TERM
training "$@" &
task=$!
echo $task >new
mv new task
wait $task
wait $task
"""


class Programs:
    """Stubs in `folder`/bin, which note each call as a line of words in `folder`/calls."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self._bin = folder, folder / "bin"
        self._bin.mkdir()
        self.env = os.environ | {"PATH": f"{self._bin}:{os.environ['PATH']}", "HOME": str(folder)}

    def add(self, name: str, then: str = "") -> None:
        path = self._bin / name
        note = f"printf '%q ' {name} \"$@\" >>{self.folder}/calls; echo >>{self.folder}/calls"
        path.write_text(f"#!/bin/bash\n{note}\n{then}\n")
        path.chmod(0o755)

    def calls(self) -> list[list[str]]:
        """The words of each call, as the program was given them."""
        path = self.folder / "calls"
        script = 'while read -r line; do eval "set -- $line"; printf "%s\\0" "$@" "&"; done'
        out = subprocess.run(["bash", "-c", script], stdin=path.open(), capture_output=True)
        return [call.split("\0")[:-1] for call in out.stdout.decode().split("&\0") if call]

    def run(self, *words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            words, env=self.env, cwd=self.folder, capture_output=True, text=True, timeout=60
        )


@pytest.fixture
def programs(tmp_path):
    return Programs(tmp_path)


def wait_for(path: pathlib.Path) -> None:
    for _ in range(500):
        if path.exists():
            return
        time.sleep(0.02)
    raise TimeoutError(path)


@pytest.mark.parametrize("name", ["tpu_pod.sh", "slurm.sbatch"])
def test_the_shell_can_read_it(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    assert os.access(LAUNCH / name, os.X_OK)


def pod(programs, *words: str) -> subprocess.CompletedProcess:
    return programs.run(str(LAUNCH / "tpu_pod.sh"), *words)


def test_a_pod_is_set_up_from_this_working_tree(programs):
    # As the command would do on a worker, but for the installation.
    programs.add(
        "gcloud", f'[[ $4 == scp ]] && cp "$5" "$HOME/policymix.tar.gz" || {{ {WORKER}; }}'
    )
    programs.add("make")
    programs.add("python3.11")
    # What an earlier setup put there and is no more, goes; what others put there stays.
    there = programs.folder / "policymix"
    others = [there / name for name in ("train.log", ".venv/kept", "policymix/mine.py")]
    for path in (there / "policymix/old one.py", *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (there / ".setup").write_text("policymix/old one.py\npolicymix/gone.py\n")
    done = pod(programs, "setup", "pod", "--zone=us-central2-b", "--project=p")
    assert done.returncode == 0, done.stderr
    copy, install, *on_the_worker = programs.calls()
    assert copy[:5] == [*GCLOUD, "scp"]
    assert copy[6:] == [
        "pod:policymix.tar.gz",
        "--zone=us-central2-b",
        "--project=p",
        "--worker=all",
    ]
    assert not pathlib.Path(copy[5]).exists()  # nothing is left behind
    assert install[4:7] == ["ssh", "pod", "--zone=us-central2-b"]
    assert install[8] == "--worker=all"
    assert on_the_worker[-1] == ["make", "venv", "EXTRAS=tpu", "PYTHON=python3.11"]
    mine = (commands.ROOT / "policymix/app.py").read_bytes()
    assert (there / "policymix/app.py").read_bytes() == mine
    assert not (there / "policymix/old one.py").exists()
    assert all(path.exists() for path in others)
    assert "policymix/app.py" in (there / ".setup").read_text().splitlines()


def test_a_pod_trains_is_asked_and_stops(programs):
    programs.add("gcloud", WORKER)
    python = programs.folder / "policymix/.venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(TRAINING)
    python.chmod(0o755)
    new = pod(programs, "status", "pod")
    assert "no run yet" in new.stdout
    assert not pod(programs, "stop", "pod").stdout
    assert not new.stderr
    # After a restart another program may have the number of one that was killed.
    with subprocess.Popen(["sleep", "60"]) as other:
        (programs.folder / "policymix/train.pid").write_text(str(other.pid))
        assert "no run yet" in pod(programs, "status", "pod").stdout
        other.kill()
    assert pod(programs, "run", "pod", "--zone=z", "--", *FLAGS).returncode == 0
    wait_for(programs.folder / "policymix/started")
    log = (programs.folder / "policymix/train.log").read_text()
    assert log.endswith(f"experiments/train.py --distributed=auto {' '.join(FLAGS)}\n")
    again = pod(programs, "run", "pod", "--", *FLAGS)
    assert again.returncode == 1
    assert "stop it first" in again.stderr
    assert re.search(
        r": trains; trains .*--distributed=auto", pod(programs, "status", "pod").stdout
    )
    assert pod(programs, "stop", "pod").stdout == f"{SAVED}\n"
    assert f": ended; {SAVED}" in pod(programs, "status", "pod").stdout
    workers = {
        call[5:-1] and tuple(w for w in call if w.startswith("--worker"))
        for call in programs.calls()
    }
    assert workers == {("--worker=all",)}


def test_dry_prints_the_commands_and_calls_nobody(programs):
    programs.add("gcloud")
    done = pod(programs, "run", "pod", "--zone=z", "--dry", "--", *FLAGS)
    words = shlex.split(done.stdout)
    assert words[:8] == [*GCLOUD, "ssh", "pod", "--zone=z", "--worker=all"]
    assert shlex.join(FLAGS[:1]) in words[8]
    for action in ("setup", "status", "logs", "stop"):
        assert "gcloud" in pod(programs, action, "pod", "--dry").stdout
    assert not (programs.folder / "calls").exists()


def test_help_is_the_head_of_the_script(programs):
    done = pod(programs, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Trains on all workers of a Cloud TPU pod slice")
    assert done.stdout.splitlines()[-1].endswith("--help this.")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no action"),
        (("start", "pod"), "unknown action 'start'"),
        (("run", "--zone=z"), "no NAME"),
        (("run", "pod"), "'run' needs the flags of train.py after '--'"),
        (("run", "pod", "--config=c.py"), "come after '--'"),
        (("stop", "pod", "--", "--config=c.py"), "takes no flags"),
        (("logs", "pod", "b"), "unexpected 'b'"),
        (("status", "pod", "--zone", "us-east1-d"), "as --zone=us-east1-d"),
    ],
)
def test_wrong_words_to_a_pod_are_one_line(words, message, programs):
    done = pod(programs, *words)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


@contextlib.contextmanager
def job(programs, training: str = TRAINING, state: str = "RUNNING"):
    """A job of Slurm whose tasks run. Yields its batch shell, and the process id of a task."""
    programs.add("training", training)
    programs.add("srun", SRUN)
    programs.add("scancel", "kill -TERM $(cat task)")
    programs.add("squeue", f"echo {state}")
    programs.add("scontrol")
    temporary = programs.folder / "temporary"
    temporary.mkdir()
    programs.env |= {"SLURM_JOB_ID": "42", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "8"}
    process = subprocess.Popen(
        [LAUNCH / "slurm.sbatch", *FLAGS], env=programs.env | {"TMPDIR": str(temporary)},
        cwd=programs.folder, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(programs.folder / "started")
    wait_for(programs.folder / "task")
    try:
        yield process, int((programs.folder / "task").read_text())
    finally:
        process.kill()
        process.stdout.close()
    assert not list(temporary.iterdir())


def commands_of(programs) -> list[list[str]]:
    """What the batch shell told Slurm, once its tasks ran."""
    return [call for call in programs.calls() if call[0] in ("scancel", "scontrol")]


TOLD, AGAIN = ["scancel", "--signal=TERM", "42"], ["scontrol", "requeue", "42"]


def test_a_job_of_slurm_saves_before_its_end_and_queues_again(programs):
    with job(programs) as (process, _):
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=30)
        assert process.returncode == 0
    assert out.startswith("trains 0,1,2,3 --kill-on-bad-exit=1 .venv/bin/python -u ")
    assert out.endswith(f"--distributed=auto {' '.join(FLAGS)}\n{SAVED}\n")
    assert commands_of(programs) == [TOLD, AGAIN]


def test_a_job_that_is_told_before_it_can_save_queues_again(programs):
    with job(programs, "touch started; exec sleep 30") as (process, _):
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    assert commands_of(programs) == [TOLD, AGAIN]


def test_a_job_whose_tasks_alone_are_told_queues_again(programs):
    """So it is where a preemption has a time of grace."""
    with job(programs) as (process, task):
        os.kill(task, signal.SIGTERM)
        assert process.wait(30) == 0
    assert commands_of(programs) == [AGAIN]


def test_a_job_that_is_cancelled_stays_away(programs):
    with job(programs, state="COMPLETING") as (process, _):
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert commands_of(programs) == [TOLD]


@pytest.mark.parametrize("code", [0, 3, 143])
def test_a_job_that_ends_by_itself_is_over(code, programs):
    programs.add("srun", f"exit {code}")
    programs.add("scontrol")
    assert programs.run(str(LAUNCH / "slurm.sbatch"), *FLAGS).returncode == code
    assert [call[0] for call in programs.calls()] == ["srun"]


@pytest.mark.parametrize("flag", ["--overwrite", "-overwrite", "--overwrite=true"])
def test_what_starts_again_by_itself_does_not_overwrite(flag, programs):
    programs.add("srun")
    programs.add("gcloud")
    for done in (
        programs.run(str(LAUNCH / "slurm.sbatch"), *FLAGS, flag),
        pod(programs, "run", "pod", "--", *FLAGS, flag),
    ):
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: {flag}")
        assert "remove the run first" in line
    assert not (programs.folder / "calls").exists()


def sweep(*arguments: str) -> None:
    """Runs sweep.py in this process; what goes wrong is raised."""
    argv = ["sweep.py", f"--config={commands.ROOT / 'configs/pi0_state.py'}", *arguments]
    before = sys.argv
    with flagsaver.flagsaver():  # forgets the flags that it defines
        spec = importlib.util.spec_from_file_location("sweep", LAUNCH / "sweep.py")
        module = importlib.util.module_from_spec(spec)
        try:
            sys.argv = argv
            spec.loader.exec_module(module)
            assert not flags.FLAGS(argv)[1:]
            module.main()
        finally:
            sys.argv = before


def test_a_sweep_prints_a_command_for_each_point_which_train_takes(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(commands.ROOT)
    sweep(
        f"--workdir={tmp_path / 'runs'}", "--config.train.batch_size=8",
        "--sweep=train.learning_rate=1e-4,5e-5", "--sweep=train.freeze=(),('action_in_proj/.*',)",
    )  # fmt: skip
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [pathlib.Path(line[-1]).name for line in lines] == [
        f"learning_rate={rate}_freeze=-{freeze}"
        for rate in ("1e-4", "5e-5")
        for freeze in ("", "action_in_proj-.-")
    ]
    assert {line[3] for line in lines} == {"--config.train.batch_size=8"}
    assert lines[-1][:2] == ["python", "experiments/train.py"]
    assert not list(tmp_path.iterdir())
    given = []
    monkeypatch.setattr(train, "train", lambda config, *_, **__: given.append(config.train))
    for line in lines:
        config = "--config=configs/pi0_state.py"
        commands.run(["python", "experiments/train.py", config, *line[3:]])
    assert [(t.learning_rate, t.freeze, t.batch_size) for t in given] == [
        (rate, freeze, 8) for rate in (1e-4, 5e-5) for freeze in ((), ("action_in_proj/.*",))
    ]


def test_values_of_a_sweep_may_hold_commas(tmp_path, capsys):
    values = ["('a(b|c)','d,e')", "('[,]', (\"f)\",))", ""]
    sweep(f"--workdir={tmp_path}", f"--sweep=train.freeze={values[0]},{values[1]}")
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [line[3] for line in lines] == [f"--config.train.freeze={v}" for v in values[:2]]
    sweep(f"--workdir={tmp_path}", "--sweep=train.init_from=,runs/base")
    assert capsys.readouterr().out.count("--config.train.init_from=") == 2


def test_a_sweep_passes_on_what_all_mains_take(tmp_path, capsys):
    sweep(f"--workdir={tmp_path}", "--sweep=train.seed=0,1", "--overwrite", "--verbose")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[4:6] for line in lines] == [["--overwrite", "--verbose"]] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sweep=train.learning_rat=1,2",), 'Did you mean "learning_rate"'),
        (("--sweep=train.seed=0,one",), "train.seed=one: invalid literal"),
        (("--sweep=train.seed=0,0",), "each value once"),
        (("--sweep=train.seed",), "expected a new FIELD=VALUE"),
        (("--sweep=train.seed=1", "--sweep=train.seed=2"), "a new FIELD"),
        (("--sweep=train.seed=1,2", "--config.train.seed=3"), "a new FIELD"),
        (("--sweep=data.path=a/b,a-b",), "two points path=a-b"),
        (("--sweep=train.freeze=('a',),('b'",), "('b': a ) is missing"),
        (("--sweep=train.freeze=('a'],()",), "('a'],(): ] has no counterpart"),
        (("--sweep=train.freeze=(),'b",), "(),'b: ' has no counterpart"),
        (("--sweep=train.seed=0,1,",), "train.seed=: invalid literal"),
        (("--sweep=train.seed=0,1", "--overwrite"), "remove what is in runs first"),
    ],
)
def test_a_sweep_of_what_cannot_be_runs_nothing(arguments, message, programs, monkeypatch):
    programs.add("sbatch")
    monkeypatch.setenv("PATH", programs.env["PATH"])
    with pytest.raises(ValueError, match=re.escape(message)):
        sweep("--workdir=runs", "--slurm=", *arguments)
    assert not (programs.folder / "calls").exists()


def test_a_sweep_is_handed_to_slurm(programs, monkeypatch):
    monkeypatch.setenv("PATH", programs.env["PATH"])
    monkeypatch.chdir(commands.ROOT)
    programs.add("sbatch", "[[ $1 != *seed=1 ]]")
    with pytest.raises(ValueError, match="1 of 2 points failed: seed=1"):
        sweep("--workdir=runs", "--sweep=train.seed=0,1", "--slurm=--nodes=2 --time=1:00:00")
    options = ["--nodes=2", "--time=1:00:00", "experiments/launch/slurm.sbatch"]
    for seed, call in enumerate(programs.calls()):
        assert call[:5] == ["sbatch", f"--job-name=seed={seed}", *options]
        assert call[6:] == [f"--config.train.seed={seed}", f"--workdir=runs/seed={seed}"]
