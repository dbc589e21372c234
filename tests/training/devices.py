"""Processes that see several CPU devices."""

import json
import os
import subprocess
import sys


def environment(num_devices: int, **more: str) -> dict[str, str]:
    """This process's, with so many devices, which wait for one another as long as a busy machine may need."""
    flags = (
        os.environ.get("XLA_FLAGS", ""),
        f"--xla_force_host_platform_device_count={num_devices}",
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    )
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags), **more}


def on_eight_devices(module: str, *arguments: str, **environment_variables: str):
    """What a module of ours prints on its last line, as JSON, when it is run with 8 devices."""
    command = [sys.executable, "-m", module, *arguments]
    given = environment(8, **environment_variables)
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=given)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
