"""Public encoders with random weights, and how closely ours must follow them."""

import functools
import pathlib

import jax
import numpy as np
import pytest
import torch

import audiolm_jax
from audiolm_jax import audio, commands
from audiolm_jax.errors import UserError
from audiolm_jax.interop.convert import convert
from audiolm_jax.semantic.tokenizer import SemanticTokenizer
from tests import tiny
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
    waves, encoder = clips(lengths, seed), tokenizer.encoder
    wave_BW = np.random.default_rng(seed).standard_normal((len(waves), max(lengths))).astype(np.float32)
    for row_W, wave in zip(wave_BW, waves):
        row_W[: len(wave)] = wave
    run = jax.jit(functools.partial(encoder.hidden_states, layers=tuple(range(encoder.num_layers + 1))))
    states = [np.asarray(x_BTD) for x_BTD in run(tokenizer.weights, wave_BW, np.array(lengths, np.int32))]
    worst = 0.0
    for row, wave in enumerate(waves):
        alone = theirs(wave)
        assert len(alone) == len(states)
        for ours_BTD, theirs_TD in zip(states, alone):
            assert len(theirs_TD) == encoder.num_frames(len(wave))
            found_TD = ours_BTD[row, : len(theirs_TD)]
            parity.assert_features_close(found_TD, theirs_TD)
            worst = max(worst, np.linalg.norm(found_TD - theirs_TD) / np.linalg.norm(theirs_TD))
    print(f"worst relative error of a hidden state: {worst:.1e}")
    assert worst < 1e-4


def assert_refused(source: pathlib.Path, message: str):
    """`convert` refuses a folder, names why, and leaves nothing beside it."""
    with pytest.raises(UserError, match=message):
        convert(source, source.parent / "part")
    assert [path.name for path in source.parent.iterdir()] == [source.name]


def assert_becomes_a_tokenizer(encoder: pathlib.Path, folder: pathlib.Path, layer: int):
    """`fit-kmeans` makes tokens of an encoder's layer: those of the nearest centroid."""
    recordings = tiny.write_recordings(folder / "recordings", (1.0, 0.7))
    output = str(folder / "tokenizer")
    commands.fit_kmeans(commands.FitKmeansOptions(
        encoder=str(encoder), layers=[layer], input_path=str(recordings), num_clusters=[5], output=output
    ))  # fmt: skip
    tokenizer = audiolm_jax.load_semantic_tokenizer(folder / "tokenizer")
    wave_W = audio.read(next(recordings.rglob("*.wav")), 16_000)
    tokens_T = tokenizer.encode(wave_W[None])[0]
    clusters = {name: np.asarray(value) for name, value in tokenizer.clusters.items()}
    features_TD = audiolm_jax.load_semantic_tokenizer(encoder).features(wave_W[None], layer=layer)[0]
    normed_TD = (features_TD - clusters["mean"]) / clusters["std"]
    distances_TK = np.linalg.norm(normed_TD[:, None] - clusters["centroids"], axis=-1)
    np.testing.assert_array_equal(tokens_T, distances_TK.argmin(-1))
    assert len(tokens_T) == tokenizer.num_frames(len(wave_W)) and len(set(tokens_T.tolist())) > 1


def without(name: str):
    """What takes a tensor out of a folder's weights."""
    return lambda folder: parity.rewrite(folder, lambda tensors: {k: v for k, v in tensors.items() if k != name})


def with_extra(name: str):
    """What adds a tensor to a folder's weights."""
    return lambda folder: parity.rewrite(folder, lambda tensors: {**tensors, name: torch.zeros(1)})


def with_config(**fields):
    """What changes fields of a folder's config.json."""
    return lambda folder: parity.set_config(folder, **fields)


def with_preprocessor(content: str):
    """What writes a folder's preprocessor_config.json."""
    return lambda folder: (folder / "preprocessor_config.json").write_text(content)
