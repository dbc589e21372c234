"""Joining the processes of one run, `jax.distributed`, before anything else touches a device."""

import os

import jax

from audiolm_jax.errors import UserError

COORDINATOR, NUM_PROCESSES, PROCESS_ID = "AUDIOLM_COORDINATOR", "AUDIOLM_NUM_PROCESSES", "AUDIOLM_PROCESS_ID"


def join():
    """Connects this process to the others of the run.

    On TPU pods, Slurm and Open MPI JAX finds them by itself. Elsewhere the environment names them:
    AUDIOLM_COORDINATOR (HOST:PORT of process 0), AUDIOLM_NUM_PROCESSES and AUDIOLM_PROCESS_ID (from 0).

    Raises:
      UserError: variables that are missing or malformed, no cluster, or no answer from the others.
    """
    if os.environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    coordinator = os.environ.get(COORDINATOR)
    try:
        if coordinator is None:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(coordinator, _number(NUM_PROCESSES), _number(PROCESS_ID))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot join the other processes ({error})",
            coordinator or "--distributed",
            f"start every process of the run, or set {COORDINATOR}, {NUM_PROCESSES} and {PROCESS_ID}",
        ) from error


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdigit():
        raise UserError(f"not a number: {text!r}", name, f"set it beside {COORDINATOR}")
    return int(text)
