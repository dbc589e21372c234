"""The launch scripts: linted, what they would run, and run with stand-ins for the clusters' commands."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from audiolm_jax.training.checkpoint import find_checkpoint
from audiolm_jax.training.metrics import read_metrics
from tests import tiny
from tests.data.pipeline_test import METADATA
from tests.training import tokens

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
TRAIN = ["--", "train", "--config=coarse_tiny", "--config.data_dir=/data/my tokens"]
LAUNCHERS = {
    "gpus.sh": ["--workdir=runs/a"],
    "slurm.sh": ["--workdir=runs/a"],
    "tpu_pod.sh": ["--workdir=gs://b/sweep/A_b=1"],
    "gke.sh": ["--workdir=gs://b/sweep/A_b=1"],
}


def launch(script, *arguments, root=ROOT, **environment):
    command = ["bash", str(root / "launch" / script), *arguments]
    settings = {**os.environ, "SUPERVISE_PAUSE": "0", "TPU_POLL_SECONDS": "0", "AUDIOLM_INSTALLED": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=settings)


def test_shellcheck():
    shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"
    if not shellcheck.exists():
        pytest.skip("no shellcheck")
    files = [*SCRIPTS, ROOT / ".ci" / "run"]
    done = subprocess.run([shellcheck, "-x", *files], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help_and_errors(script):
    helped = launch(script, "--help")
    assert helped.returncode == 0 and "usage: launch/" in helped.stdout and "--dry-run" in helped.stdout
    for arguments in (["nonsense", *TRAIN], ["--", "evaluate"], TRAIN):
        failed = launch(script, "--dry-run", *arguments)
        assert failed.returncode == 2 and failed.stderr.startswith("error: ") and failed.stdout == ""


def test_gpus_dry_run():
    done = launch("gpus.sh", "--dry-run", "--gpus=3", *TRAIN, *LAUNCHERS["gpus.sh"])
    assert done.returncode == 0
    assert done.stdout.startswith("env CUDA_VISIBLE_DEVICES=0\\,1\\,2 ")
    assert done.stdout.split("audiolm ")[1].startswith(
        "train --config=coarse_tiny --config.data_dir=/data/my\\ tokens "
    )
    assert launch("gpus.sh", "--dry-run", "--gpus=0", *TRAIN, "--workdir=w").returncode == 2


@pytest.fixture
def repository(tmp_path):
    """A copy of `launch/` beside a virtual environment whose `audiolm` the test writes."""
    root = tmp_path / "repository"
    shutil.copytree(ROOT / "launch", root / "launch")
    (root / ".venv" / "bin").mkdir(parents=True)
    return root


def name_of(workdir):
    command = f'source {ROOT}/launch/common.sh; job_name "$1"'
    return subprocess.run(["bash", "-c", command, "-", workdir], capture_output=True, text=True).stdout.strip()


def test_names_of_jobs_are_short_and_of_one_workdir_alone():
    long = "gs://b/sweep/num_layers=12,optimizer.learning_rate=0.0003,weight_decay="
    names = [name_of(workdir) for workdir in (f"{long}0.1", f"{long}0.2", "gs://a/runs/coarse", "gs://b/runs/coarse")]
    assert len(set(names)) == 4
    # JobSet makes NAME-slice-I-J-abcde of it, of 63 characters at most.
    assert all(re.fullmatch(r"audiolm-[a-z0-9-]+-[0-9a-f]{8}", name) and len(name) <= 47 for name in names)


def write_command(path, body):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def statuses_in_turn(root, statuses):
    """An `audiolm` that ends with these statuses, one a call, and logs its arguments."""
    (root / "statuses").write_text("".join(f"{status}\n" for status in statuses))
    write_command(
        root / ".venv" / "bin" / "audiolm",
        f'cd {root}; echo "$@" >> calls; status=$(head -n 1 statuses); sed -i 1d statuses; exit "$status"',
    )


@pytest.mark.parametrize(
    ("statuses", "calls", "expected"),
    [
        ([0], 1, 0),
        ([143, 143, 143, 143, 143, 0], 6, 0),
        ([1, 139, 143, 1, 0], 5, 0),
        ([1, 1, 1, 1, 0], 4, 1),
        ([2, 0], 1, 2),
        ([143, 130, 0], 2, 130),
    ],
)
def test_interrupted_runs_go_on(repository, statuses, calls, expected):
    statuses_in_turn(repository, statuses)
    done = launch("gpus.sh", *TRAIN, "--workdir=w", root=repository)
    assert done.returncode == expected, done.stderr
    lines = (repository / "calls").read_text().splitlines()
    assert lines == ["train --config=coarse_tiny --config.data_dir=/data/my tokens --workdir=w"] * calls


def test_sigterm_to_the_script_saves_the_run_and_ends_it(repository, tmp_path):
    data = tokens.write(tmp_path / "tokens", METADATA)
    write_command(repository / ".venv" / "bin" / "audiolm", f'exec {sys.executable} -m audiolm_jax "$@"')
    workdir = tmp_path / "w"
    settings = {"data_dir": data, "num_train_steps": 100000, "log_every_steps": 1, "checkpoint_every_steps": 50000}
    arguments = ["train", "--config=semantic_tiny", f"--workdir={workdir}", *tiny.flags_of("semantic")]
    arguments += [f"--config.{name}={value}" for name, value in settings.items()]
    command = ["bash", str(repository / "launch" / "gpus.sh"), "--", *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "AUDIOLM_INSTALLED": "1"}, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not (rows := read_metrics(workdir)) or rows[-1]["step"] < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143
    assert int(find_checkpoint(workdir).name) == read_metrics(workdir)[-1]["step"]


def test_sigterm_while_the_script_waits_ends_it(repository):
    statuses_in_turn(repository, [1, 0])
    settings = {**os.environ, "AUDIOLM_INSTALLED": "1", "SUPERVISE_PAUSE": "100"}
    command = ["bash", str(repository / "launch" / "gpus.sh"), *TRAIN, "--workdir=w"]
    process = subprocess.Popen(command, env=settings, stderr=subprocess.PIPE, text=True)
    while "going on in 100 s" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    assert len((repository / "calls").read_text().splitlines()) == 1


def test_slurm_submits_and_requeues(repository, tmp_path):
    bin_folder, log = tmp_path / "bin", tmp_path / "log"
    write_command(bin_folder / "sbatch", f'echo "sbatch $@" >> {log}; cat > {tmp_path}/job.sh; echo 4711')
    write_command(bin_folder / "srun", f'printf "%s\\n" "$@" > {tmp_path}/srun; exit "$STATUS"')
    write_command(bin_folder / "scontrol", f'echo "scontrol $@" >> {log}')
    path = f"{bin_folder}:{os.environ['PATH']}"
    options = ["--nodes=2", "--gpus=4", "--partition=gpu", "--time=24:00:00"]
    done = launch("slurm.sh", *options, *TRAIN, "--workdir=/shared/sweep/a=1", root=repository, PATH=path)
    assert done.returncode == 0 and done.stdout == "4711\n", done.stderr
    job = (tmp_path / "job.sh").read_text()
    assert (
        job == launch("slurm.sh", "--dry-run", *options, *TRAIN, "--workdir=/shared/sweep/a=1", root=repository).stdout
    )
    for option in (
        f"job-name={name_of('/shared/sweep/a=1')}", "nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "requeue",
        "signal=TERM@300", "partition=gpu", "time=24:00:00",
    ):  # fmt: skip
        assert f"\n#SBATCH --{option}\n" in job

    def run_job(status, **environment):
        log.write_text("")
        settings = {**os.environ, "PATH": path, "STATUS": str(status), "SLURM_JOB_ID": "4711", **environment}
        done = subprocess.run(["bash", str(tmp_path / "job.sh")], env=settings, capture_output=True, text=True)
        return done.returncode, log.read_text()

    assert run_job(0) == (0, "")
    assert (tmp_path / "srun").read_text().splitlines()[1:] == [
        str(repository / ".venv/bin/audiolm"), "train", "--distributed", "--config=coarse_tiny",
        "--config.data_dir=/data/my tokens", "--workdir=/shared/sweep/a=1",
    ]  # fmt: skip
    for status in (143, 1, 137):
        assert run_job(status) == (status, "scontrol requeue 4711\n")
    assert run_job(2) == (2, "")
    assert run_job(1, SLURM_RESTART_COUNT="20") == (1, "")
    assert run_job(143, SLURM_RESTART_COUNT="20") == (143, "scontrol requeue 4711\n")


def test_tpu_pod_dry_run():
    options = ["--zone=us-central2-b", "--type=v4-32", "--bucket=lab", "--spot"]
    done = launch("tpu_pod.sh", "--dry-run", *options, *TRAIN, *LAUNCHERS["tpu_pod.sh"])
    assert done.returncode == 0, done.stderr
    create, leave, copy, install, train, delete = done.stdout.strip().splitlines()
    name = name_of("gs://b/sweep/A_b=1")
    assert create.startswith(
        f"gcloud compute tpus queued-resources create {name} --zone=us-central2-b --node-id={name} "
    )
    assert "--accelerator-type=v4-32" in create and "--spot" in create
    assert f"{name}:audiolm_jax.tar.gz" in copy and copy.rstrip().endswith("--worker=all")
    assert "pkill" in leave and "launch/tpu_worker.sh\\ lab" in install
    assert "train\\ --distributed\\ --config=coarse_tiny" in train and "--worker=all" in train
    assert delete.startswith(f"gcloud compute tpus queued-resources delete {name}")
    several = launch("tpu_pod.sh", "--dry-run", *options, "--slices=2", *TRAIN, *LAUNCHERS["tpu_pod.sh"]).stdout
    assert "--node-count=2" in several and several.count("tpu-vm ssh") == 6
    for wrong in (["--type=v4-32"], ["--zone=z"], [*options, "--type=v99-1"], [*options, "--slices=x"]):
        assert launch("tpu_pod.sh", "--dry-run", *wrong, *TRAIN, *LAUNCHERS["tpu_pod.sh"]).returncode == 2
    local = launch("tpu_pod.sh", "--dry-run", *options, *TRAIN, "--workdir=runs/a")
    assert local.returncode == 2 and "give a folder in a bucket" in local.stderr


GCLOUD = """
cd {folder}
echo "$3 $4" >> log
case "$3 $4" in
  "queued-resources create") echo ACTIVE > state ;;
  "queued-resources delete") rm -f state ;;
  "queued-resources describe") cat state ;;
  "tpu-vm ssh")
    case "$*" in
      *pkill*) {leave} ;;
      *distributed*)
        {train}
        status=$(head -n 1 statuses); sed -i 1d statuses
        if [[ "$status" == gone ]]; then echo SUSPENDED > state; exit 255; fi
        exit "$status" ;;
    esac ;;
esac
"""


def test_tpu_pod_asks_anew_for_a_slice_that_was_taken_away(tmp_path):
    folder = tmp_path / "cloud"
    write_command(folder / "gcloud", GCLOUD.format(folder=folder, leave="exit 0", train=""))
    (folder / "statuses").write_text("143\ngone\n0\n")
    path = f"{folder}:{os.environ['PATH']}"
    arguments = ["--zone=z", "--type=v4-32", *TRAIN, *LAUNCHERS["tpu_pod.sh"]]
    done = launch("tpu_pod.sh", *arguments, PATH=path)
    assert done.returncode == 0, done.stderr
    log = (folder / "log").read_text().splitlines()
    actions = [line.split()[1] for line in log if not line.endswith("describe")]
    attempt = ["ssh", "scp", "ssh", "ssh"]
    assert actions == ["create", *attempt, *attempt, "delete", "create", *attempt, "delete"]
    (folder / "statuses").write_text("2\n")
    assert launch("tpu_pod.sh", *arguments, PATH=path).returncode == 2
    assert not (folder / "state").exists()


def test_tpu_pod_stopped_by_a_signal_lets_the_workers_save(tmp_path):
    """The stand-in's worker is a process of this machine, under a name that no training has."""
    folder = tmp_path / "cloud"
    leave = 'exec bash -c "$(printf %s "${@: -1}" | sed "s/^--command=//; s/audiolm train/stand-in train/g")"'
    gcloud = GCLOUD.format(folder=folder, leave=leave, train=".venv/bin/stand-in train --distributed")
    write_command(folder / "gcloud", gcloud)
    saving = "trap 'sleep 2; touch saved; exit 143' TERM; touch started; while true; do sleep 0.1; done"
    write_command(folder / ".venv" / "bin" / "stand-in", saving)
    settings = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "TPU_POLL_SECONDS": "0"}
    command = ["bash", f"{ROOT}/launch/tpu_pod.sh", "--zone=z", "--type=v4-32", *TRAIN, *LAUNCHERS["tpu_pod.sh"]]
    process = subprocess.Popen(command, env=settings, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (folder / "started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert (folder / "saved").exists() and not (folder / "state").exists()
    assert (folder / "log").read_text().splitlines()[-2:] == ["tpu-vm ssh", "queued-resources delete"]


def test_gke_jobset(tmp_path):
    options = ["--image=gcr.io/lab/audiolm", "--topology=v5e:4x8", "--slices=2", "--bucket=lab"]
    done = launch("gke.sh", "--dry-run", *options, *TRAIN, *LAUNCHERS["gke.sh"])
    assert done.returncode == 0, done.stderr
    jobset = yaml.safe_load(done.stdout)
    assert jobset["kind"] == "JobSet" and jobset["metadata"]["name"] == name_of("gs://b/sweep/A_b=1")
    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert slices["replicas"] == 2 and job["parallelism"] == job["completions"] == 8
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [143]
    assert jobset["spec"]["failurePolicy"]["rules"][0]["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 120
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x8"
    (container,) = pod["containers"]
    assert container["command"] == [
        "audiolm", "train", "--distributed", "--config=coarse_tiny", "--config.data_dir=/data/my tokens",
        "--workdir=gs://b/sweep/A_b=1",
    ]  # fmt: skip
    assert container["resources"]["limits"]["google.com/tpu"] == 4
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "lab"
    kubectl = f"""case "$1" in
  apply) cat > {tmp_path}/applied; echo "jobset/a [$*]" ;;
  get) echo Failed ;;
  *) echo "$*" >> {tmp_path}/log ;;
esac"""
    write_command(tmp_path / "bin" / "kubectl", kubectl)
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    applied = launch("gke.sh", *options, *TRAIN, *LAUNCHERS["gke.sh"], PATH=path)
    assert applied.returncode == 0 and applied.stdout == "jobset/a [apply -f - -o name]\n"
    assert (tmp_path / "applied").read_text() == done.stdout
    # A JobSet that had failed for good makes room.
    assert (tmp_path / "log").read_text() == f"delete jobset {name_of('gs://b/sweep/A_b=1')}\n"
    for wrong in ("--topology=v9:4x4", "--topology=v5e", "--topology=v5e:4by4", "--topology=v5e:0x4", "--slices=0"):
        assert launch("gke.sh", "--dry-run", *options, wrong, *TRAIN, *LAUNCHERS["gke.sh"]).returncode == 2
