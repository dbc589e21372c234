"""How good speech sounds, judged without the original."""

from collections.abc import Callable

import numpy as np

from audiolm_jax.evaluation.adapters import Adapter

KIND = "quality"
SAMPLE_RATE = 16_000


def _dnsmos() -> Callable[[np.ndarray], float]:
    """DNSMOS P.835 (arXiv 2110.01763), the overall score from 1 to 5. It repeats what is shorter than 9 s."""
    from speechmos import dnsmos

    return lambda wave_W: float(dnsmos.run(wave_W, SAMPLE_RATE)["ovrl_mos"])


QUALITY = {
    "dnsmos": Adapter(
        "DNSMOS, overall",
        SAMPLE_RATE,
        _dnsmos,
        ("speechmos", "onnxruntime", "librosa", "requests"),
        min_seconds=0.1,
    ),
}
