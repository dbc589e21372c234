"""Public encoders with random weights, and how closely ours must follow them."""

import numpy as np
import torch

from audiolm_jax.semantic.tokenizer import SemanticTokenizer
from tests.interop import parity


def randomized(model, seed: int):
    """The model with weights in which every part counts: activations keep their size, scales and biases vary."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif parameter.ndim == 1:
                parameter.normal_(0.0, 0.2, generator=generator)
            else:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
    return model.eval()


def clips(lengths, seed: int) -> list[np.ndarray]:
    """Noisy chirps of so many samples, each of another loudness."""
    generator = np.random.default_rng(seed)
    found = []
    for length in lengths:
        time = np.arange(length) / 16_000
        tone = np.sin(2 * np.pi * generator.uniform(100, 400) * time * (1 + time)) * np.sin(7 * time) ** 2
        wave = generator.uniform(0.05, 0.5) * tone + 10 ** generator.uniform(-3, -1) * generator.standard_normal(length)
        found.append(wave.astype(np.float32))
    return found


def assert_rows_are_alone(tokenizer: SemanticTokenizer, theirs, lengths, seed: int):
    """Every hidden state of each row of a ragged batch is what the original gives for that clip alone.

    Args:
      tokenizer: ours.
      theirs: [W] -> the original's hidden states, each [T, D].
      lengths: of the rows, whose padding is noise.
      seed: of the clips.
    """
    waves = clips(lengths, seed)
    wave_BW = np.random.default_rng(seed).standard_normal((len(waves), max(lengths))).astype(np.float32)
    for row_W, wave in zip(wave_BW, waves):
        row_W[: len(wave)] = wave
    states = tokenizer.features_of_layers(wave_BW, lengths, range(tokenizer.num_layers + 1))
    worst = 0.0
    for row, wave in enumerate(waves):
        alone = theirs(wave)
        assert len(alone) == len(states)
        for ours_BTD, theirs_TD in zip(states, alone):
            assert len(theirs_TD) == tokenizer.num_frames(len(wave))
            found_TD = ours_BTD[row, : len(theirs_TD)]
            parity.assert_features_close(found_TD, theirs_TD)
            worst = max(worst, np.linalg.norm(found_TD - theirs_TD) / np.linalg.norm(theirs_TD))
    print(f"worst relative error of a hidden state: {worst:.1e}")
    assert worst < 1e-4
