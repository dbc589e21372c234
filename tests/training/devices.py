"""Environments of processes that see several CPU devices."""

import os


def environment(num_devices: int, **more: str) -> dict[str, str]:
    """This process's, with so many devices, which wait for one another as long as a busy machine may need."""
    flags = (
        f"--xla_force_host_platform_device_count={num_devices}",
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    )
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags), **more}
