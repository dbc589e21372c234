"""Waveforms to semantic tokens: an encoder's layer, per-dimension normalisation, nearest centroid.

AudioLM (arXiv 2209.03143) §3.2 and §4.1: layer 7 of w2v-BERT's masked-prediction module, every dimension normalised
to zero mean and unit variance, k-means.

An encoder sees all of a clip at once. What is longer than its `window_seconds` is cut into windows of that length, a
sixth of which on either side is context only: a recording's tokens are by definition those of its windows' middles.
The grid depends on the recording alone.

Shape suffixes: B batch, W waveform samples, T frames, D model, K clusters.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from audiolm_jax import kmeans
from audiolm_jax.errors import UserError
from audiolm_jax.semantic.encoder import Encoder, Weights, build_encoder
from audiolm_jax.semantic.kmeans import check_width

CONTEXT_SHARE = 6  # A window's context on either side is its length over this.
BATCH_SECONDS = 240.0  # Windows of more audio than this are run one batch after the other.


class Window(NamedTuple):
    """A stretch of a row that is run at once, and the frames that are kept of it.

    Attributes:
      row: in the batch.
      start, stop: its samples.
      first, last: frames of the row that are taken from it, `last` excluded.
    """

    row: int
    start: int
    stop: int
    first: int
    last: int


@dataclasses.dataclass(frozen=True)
class SemanticTokenizer:
    """A trained encoder, and the clusters of its hidden states once they are fitted.

    Row b of a result holds `num_frames(lengths_B[b])` frames, the same as for that clip alone whatever stands beside
    or behind it; past them stand zeros (features and tokens alike), which mean nothing.

    Attributes:
      encoder: the network.
      weights: its weights.
      clusters: None, or {"layer": int, "mean": [D], "std": [D], "centroids": [K, D]}.
    """

    encoder: Encoder
    weights: Weights
    clusters: dict[str, Any] | None = None

    @classmethod
    def from_weights(
        cls, config: Mapping[str, Any], weights: Weights, clusters: Mapping[str, Any] | None = None
    ) -> "SemanticTokenizer":
        """Puts weights on the device.

        Args:
          config: of which `model` counts.
          weights: as the encoder takes them, unboxed: for w2v-BERT the objective's.
          clusters: what `semantic.kmeans.fit_clusters` gave.
        """
        if clusters is not None:
            arrays = {name: jnp.asarray(clusters[name], jnp.float32) for name in ("mean", "std", "centroids")}
            clusters = {"layer": int(clusters["layer"]), **arrays}
        return cls(build_encoder(config["model"]), jax.device_put(dict(weights)), clusters)

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.encoder.sample_rate

    @property
    def frame_rate(self) -> int | float:
        """Frames a second, an integer where it is one."""
        rate = self.encoder.sample_rate / self.encoder.hop_length
        return int(rate) if rate.is_integer() else rate

    @property
    def num_layers(self) -> int:
        """Blocks; hidden states are 0 … `num_layers`."""
        return self.encoder.num_layers

    @property
    def vocab_size(self) -> int:
        """Number of clusters.

        Raises:
          UserError: the encoder has no clusters yet.
        """
        return self._fitted()["centroids"].shape[0]

    def num_frames(self, num_samples):
        """Frames of clips of that many samples (integer or integer array)."""
        return self.encoder.num_frames(num_samples)

    def features(self, wave_BW, lengths_B=None, layer: int | None = None) -> np.ndarray:
        """Hidden states of one layer, float32 [B, `num_frames(W)`, D].

        Args:
          wave_BW: waveforms at `sample_rate`.
          lengths_B: samples of each row; all of them by default.
          layer: index in Hugging Face's `hidden_states`; by default the clusters' layer, or without
            clusters the encoder's.

        Raises:
          UserError: a bad layer or shape, samples that are not finite, or a clip too short for a frame.
        """
        return self.features_of_layers(wave_BW, lengths_B, (self._layer(layer),))[0]

    def features_of_layers(self, wave_BW, lengths_B, layers: Sequence[int]) -> tuple[np.ndarray, ...]:
        """What `features` gives of each of several layers, in one pass."""
        chosen = tuple(self._layer(layer) for layer in layers)
        wave_BW, lengths_B = self._checked(wave_BW, lengths_B)
        run = functools.partial(_features, self.encoder, chosen, self.weights)
        return tuple(self._assembled(run, wave_BW, lengths_B))

    def encode(self, wave_BW, lengths_B=None) -> np.ndarray:
        """Semantic tokens, int32 [B, `num_frames(W)`], repeats kept.

        Args:
          wave_BW, lengths_B: see `features`.

        Raises:
          UserError: as `features`; or the encoder has no clusters yet.
        """
        clusters = self._fitted()
        wave_BW, lengths_B = self._checked(wave_BW, lengths_B)
        arrays = {name: clusters[name] for name in ("mean", "std", "centroids")}
        run = functools.partial(_encode, self.encoder, clusters["layer"], self.weights, arrays)
        return self._assembled(run, wave_BW, lengths_B)[0]

    def _assembled(self, run: Callable[..., Sequence], wave_BW: np.ndarray, lengths_B: np.ndarray) -> list[np.ndarray]:
        """The arrays [B, T, …] that `run(wave_NW, lengths_N)` gives, put together from the windows of all rows."""
        hop, size = self.encoder.hop_length, self.num_frames(wave_BW.shape[1])
        whole: list[np.ndarray] = []
        for windows in self._batches(lengths_B):
            lengths_N = np.array([window.stop - window.start for window in windows], np.int32)
            longest = int(lengths_N.max(initial=0))
            padded = max(longest, min(bucket(-(-longest // hop)) * hop, self._window_samples))
            wave_NW = np.zeros((len(windows), padded), np.float32)
            for row_W, window, length in zip(wave_NW, windows, lengths_N, strict=True):
                row_W[:length] = wave_BW[window.row, window.start : window.stop]
            parts = [np.asarray(part) for part in run(wave_NW, lengths_N)]
            whole = whole or [np.zeros((len(wave_BW), size, *part.shape[2:]), part.dtype) for part in parts]
            for index, window in enumerate(windows):
                begin = window.start // hop
                for array, part in zip(whole, parts, strict=True):
                    kept = part[index, window.first - begin : window.last - begin]
                    array[window.row, window.first : window.last] = kept
        return whole

    @property
    def _window_samples(self) -> int:
        return (
            round(self.encoder.window_seconds * self.sample_rate) // self.encoder.hop_length * self.encoder.hop_length
        )

    def windows(self, row: int, length: int) -> Iterator[Window]:
        """The windows of row `row`, which has `length` samples."""
        hop, in_all, in_window = self.encoder.hop_length, self.num_frames(length), self.num_frames(self._window_samples)
        context = in_window // CONTEXT_SHARE
        start, first = 0, 0
        while start * hop + self._window_samples < length:
            last = start + in_window - context
            yield Window(row, start * hop, start * hop + self._window_samples, first, last)
            start, first = last - context, last
        yield Window(row, start * hop, length, first, in_all)

    def _batches(self, lengths_B: np.ndarray) -> Iterator[list[Window]]:
        """The windows of all rows, so many at a time as memory should hold; at least one batch, be it empty."""
        batch: list[Window] = []
        longest = 0
        for row, length in enumerate(lengths_B.tolist()):
            for window in self.windows(row, length):
                longest = max(longest, window.stop - window.start)
                if batch and (len(batch) + 1) * longest > BATCH_SECONDS * self.sample_rate:
                    yield batch
                    batch, longest = [], window.stop - window.start
                batch.append(window)
        yield batch

    def _fitted(self) -> dict[str, Any]:
        if self.clusters is None:
            raise UserError("encoder without clusters", "semantic tokenizer", "run `audiolm fit-kmeans` on it first")
        return self.clusters

    def _layer(self, layer: int | None) -> int:
        if layer is None:
            layer = self.clusters["layer"] if self.clusters else self.encoder.default_layer
        if not 0 <= layer <= self.num_layers:
            raise UserError("no such layer", f"layer {layer}", f"choose 0 to {self.num_layers}")
        return int(layer)

    def _checked(self, wave_BW, lengths_B) -> tuple[np.ndarray, np.ndarray]:
        wave_BW = np.asarray(wave_BW, np.float32)
        if wave_BW.ndim != 2:
            raise UserError("waveforms are not [B, W]", f"shape {wave_BW.shape}", "add a batch axis, mix down to mono")
        if lengths_B is None:
            lengths_B = np.full(wave_BW.shape[0], wave_BW.shape[1])
        lengths_B = np.asarray(lengths_B, np.int32)
        if lengths_B.shape != wave_BW.shape[:1] or np.any((lengths_B < 0) | (lengths_B > wave_BW.shape[1])):
            raise UserError("lengths do not fit the waveforms", f"lengths {lengths_B}", "give one length a row, 0 to W")
        bad_BW = ~np.isfinite(wave_BW) & (np.arange(wave_BW.shape[1]) < lengths_B[:, None])
        if np.any(bad_BW):
            row, sample = np.argwhere(bad_BW)[0]
            raise UserError("samples that are not finite", f"row {row}, sample {sample}", "mend the recording")
        short_B = (lengths_B > 0) & (np.asarray(self.num_frames(lengths_B)) < 1)
        if np.any(short_B):
            row = int(np.argmax(short_B))
            what = f"a clip of {lengths_B[row]} samples has no frame"
            raise UserError(what, f"row {row}", "leave out what is shorter than the encoder's receptive field")
        return wave_BW, lengths_B


def bucket(num_frames: int) -> int:
    """Smallest of 16, 24, 32, 48, 64, 96 … frames that holds `num_frames`, so that few lengths are compiled."""
    size = 16
    while size < num_frames:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def tokens_of(clusters: Mapping[str, Any], x_BTD: jax.Array) -> jax.Array:
    """Nearest centroids [...] of hidden states [..., D] of the clusters' layer.

    Raises:
      UserError: clusters of another width.
    """
    check_width(clusters, x_BTD.shape[-1])
    normed_BTD = (x_BTD - clusters["mean"]) / clusters["std"]
    z_M = kmeans.nearest(normed_BTD.reshape(-1, normed_BTD.shape[-1]), clusters["centroids"])
    return z_M.reshape(x_BTD.shape[:-1])


@functools.partial(jax.jit, static_argnames=("encoder", "layers"))
def _features(encoder: Encoder, layers: tuple[int, ...], weights, wave_BW, lengths_B) -> tuple[jax.Array, ...]:
    return encoder.hidden_states(weights, wave_BW, lengths_B, layers)


@functools.partial(jax.jit, static_argnames=("encoder", "layer"))
def _encode(encoder: Encoder, layer: int, weights, clusters, wave_BW, lengths_B) -> tuple[jax.Array]:
    (x_BTD,) = encoder.hidden_states(weights, wave_BW, lengths_B, (layer,))
    return (tokens_of(clusters, x_BTD),)
