"""What models ask of the waveforms that they are given.

Shape suffixes: B batch, W waveform samples.
"""

import numpy as np

from audiolm_jax.errors import UserError


def checked_waveform(wave_BW) -> np.ndarray:
    """The waveforms as float32 [B, W]; raises a UserError where they are not finite floats of two axes."""
    wave_BW = np.asarray(wave_BW)
    if wave_BW.ndim != 2 or not np.issubdtype(wave_BW.dtype, np.floating):
        found = f"{wave_BW.dtype}{list(wave_BW.shape)}"
        raise UserError("waveforms are not floats [batch, samples]", found, "give one row a recording")
    if not np.isfinite(wave_BW).all():
        row = int(np.argmin(np.isfinite(wave_BW).all(axis=1)))
        raise UserError("waveform with NaN or infinity", f"row {row}", "mend the recording")
    return wave_BW.astype(np.float32)


def checked_lengths(lengths_B, batch: int, size: int) -> np.ndarray:
    """Lengths of that many rows as int32; raises a UserError where they are not integers from 0 to `size`."""
    lengths_B = np.asarray(lengths_B)
    if lengths_B.shape != (batch,) or not np.issubdtype(lengths_B.dtype, np.integer):
        raise UserError(
            "lengths are not one integer a row", f"{lengths_B.dtype}{list(lengths_B.shape)}", f"give {batch}"
        )
    if batch and not 0 <= lengths_B.min() <= lengths_B.max() <= size:
        raise UserError(
            f"lengths from {lengths_B.min()} to {lengths_B.max()}", "lengths_B", f"rows have a length of 0 … {size}"
        )
    return lengths_B.astype(np.int32)
