"""What the accelerators can do, from their makers' data sheets: the peaks that utilisation and floors refer to.

TPUs: cloud.google.com/tpu/docs/system-architecture; links: "How to scale your model", jax-ml.github.io/scaling-book.
GPUs: NVIDIA's H100 SXM and H200 SXM data sheets, dense rates.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One device as JAX counts them: a whole chip.

    Attributes:
      name: as in a topology's name.
      device_kind: what `jax.Device.device_kind` begins with.
      peak_flops: bfloat16 operations a second.
      memory_bytes: of its own memory.
      memory_bandwidth: bytes a second.
      link_bandwidth: bytes a second that it can send over all its links to neighbours together.
    """

    name: str
    device_kind: str
    peak_flops: float
    memory_bytes: int
    memory_bandwidth: float
    link_bandwidth: float


GIB = 2**30
ACCELERATORS = (
    Accelerator("v4", "TPU v4", 275e12, 32 * GIB, 1228e9, 6 * 45e9),
    Accelerator("v5e", "TPU v5 lite", 197e12, 16 * GIB, 819e9, 4 * 45e9),
    Accelerator("v5p", "TPU v5", 459e12, 95 * GIB, 2765e9, 6 * 90e9),
    Accelerator("v6e", "TPU v6 lite", 918e12, 32 * GIB, 1640e9, 4 * 90e9),
    Accelerator("h100", "NVIDIA H100", 989e12, 80 * 10**9, 3350e9, 450e9),
    Accelerator("h200", "NVIDIA H200", 989e12, 141 * 10**9, 4800e9, 450e9),
)


def of_device(device_kind: str) -> Accelerator | None:
    """The accelerator of a `jax.Device.device_kind`; None for one that is not listed."""
    # "TPU v5 lite" begins like "TPU v5": the longest name that fits.
    fitting = [known for known in ACCELERATORS if device_kind.startswith(known.device_kind)]
    return max(fitting, key=lambda known: len(known.device_kind), default=None)
