"""Waveforms to semantic tokens: a w2v-BERT layer, per-dimension normalisation, nearest centroid.

AudioLM (arXiv 2209.03143) §3.2 and §4.1: layer 7 of the masked-prediction module, every dimension normalised
to zero mean and unit variance, k-means.

Shape suffixes: B batch, W waveform samples, T frames, D model, K clusters.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from audiolm_jax import kmeans
from audiolm_jax.errors import UserError
from audiolm_jax.semantic import features
from audiolm_jax.semantic.w2v_bert import W2vBertConfig, hidden_state


@dataclasses.dataclass(frozen=True)
class SemanticTokenizer:
    """A trained encoder, and the clusters of its hidden states once they are fitted.

    Row b of a result holds ceil(lengths_B[b] / 640) frames (at 16 kHz), the same as for that clip alone whatever
    stands beside or behind it; past them stand zeros (features and tokens alike), which mean nothing.

    Attributes:
      model_config: architecture; computation is in float32 whatever the training's type was.
      params, statistics: the objective's `weights`.
      clusters: None, or {"layer": int, "mean": [D], "std": [D], "centroids": [K, D]}.
    """

    model_config: W2vBertConfig
    params: Any
    statistics: dict[str, jax.Array]
    clusters: dict[str, Any] | None = None

    @classmethod
    def from_weights(
        cls, config: ml_collections.ConfigDict, weights: Mapping[str, Any], clusters: Mapping[str, Any] | None = None
    ) -> "SemanticTokenizer":
        """Puts an objective's weights on the device.

        Args:
          config: the run's config, of which `model` counts.
          weights: {"params", "statistics"}, unboxed.
          clusters: what `semantic.kmeans.fit_clusters` gave.
        """
        model_config = dataclasses.replace(W2vBertConfig(**config.model.to_dict()), dtype="float32", remat="none")
        if clusters is not None:
            arrays = {name: jnp.asarray(clusters[name], jnp.float32) for name in ("mean", "std", "centroids")}
            clusters = {"layer": int(clusters["layer"]), **arrays}
        params, statistics = jax.device_put((weights["params"], weights["statistics"]))
        return cls(model_config, params, statistics, clusters)

    @property
    def sample_rate(self) -> int:
        return self.model_config.sample_rate

    @property
    def frame_rate(self) -> int:
        return features.FRAME_RATE

    @property
    def num_layers(self) -> int:
        return self.model_config.num_layers

    @property
    def vocab_size(self) -> int:
        """Number of clusters.

        Raises:
          UserError: the encoder has no clusters yet.
        """
        return self._fitted()["centroids"].shape[0]

    def num_frames(self, num_samples):
        """Frames of clips of that many samples (integer or integer array)."""
        return features.num_frames(num_samples, self.sample_rate)

    def features(self, wave_BW, lengths_B=None, layer: int | None = None) -> np.ndarray:
        """Hidden states of one layer, float32 [B, ceil(W / 640), D].

        Args:
          wave_BW: waveforms at `sample_rate`.
          lengths_B: samples of each row; all of them by default.
          layer: index in Hugging Face's `hidden_states`; by default the clusters' layer, or without
            clusters the config's.

        Raises:
          UserError: a bad layer or shape, or samples that are not finite.
        """
        layer = self._layer(layer)
        wave_BW, lengths_B = self._checked(wave_BW, lengths_B)
        padded_BW = _pad_to_bucket(wave_BW, features.samples_per_frame(self.sample_rate))
        x_BTD = _features(self.model_config, layer, self.params, self.statistics, padded_BW, lengths_B)
        return np.asarray(x_BTD)[:, : self.num_frames(wave_BW.shape[1])]

    def encode(self, wave_BW, lengths_B=None) -> np.ndarray:
        """Semantic tokens, int32 [B, ceil(W / 640)], repeats kept.

        Args:
          wave_BW, lengths_B: see `features`.

        Raises:
          UserError: as `features`; or the encoder has no clusters yet.
        """
        clusters = self._fitted()
        wave_BW, lengths_B = self._checked(wave_BW, lengths_B)
        padded_BW = _pad_to_bucket(wave_BW, features.samples_per_frame(self.sample_rate))
        arrays = {name: clusters[name] for name in ("mean", "std", "centroids")}
        layer = clusters["layer"]
        z_BT = _encode(self.model_config, layer, self.params, self.statistics, arrays, padded_BW, lengths_B)
        return np.asarray(z_BT)[:, : self.num_frames(wave_BW.shape[1])]

    def _fitted(self) -> dict[str, Any]:
        if self.clusters is None:
            raise UserError("encoder without clusters", "semantic tokenizer", "run `audiolm fit-kmeans` on it first")
        return self.clusters

    def _layer(self, layer: int | None) -> int:
        if layer is None:
            layer = self.clusters["layer"] if self.clusters else self.model_config.default_layer
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
        return wave_BW, lengths_B


def bucket(num_frames: int) -> int:
    """Smallest of 16, 24, 32, 48, 64, 96 … frames that holds `num_frames`, so that few lengths are compiled."""
    size = 16
    while size < num_frames:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def _pad_to_bucket(wave_BW: np.ndarray, samples_per_frame: int) -> np.ndarray:
    num_samples = bucket(-(-wave_BW.shape[1] // samples_per_frame)) * samples_per_frame
    return np.pad(wave_BW, ((0, 0), (0, num_samples - wave_BW.shape[1])))


@functools.partial(jax.jit, static_argnames=("config", "layer"))
def _features(config, layer, params, statistics, wave_BW, lengths_B):
    mel_BTM = features.log_mel(wave_BW, lengths_B, config.sample_rate, config.num_mels)
    frames_B = features.num_frames(lengths_B, config.sample_rate)
    mask_BT = features.length_mask(frames_B, mel_BTM.shape[1] // features.MELS_PER_FRAME)
    x_BTD = hidden_state(config, params, features.normalize(mel_BTM, statistics), mask_BT, layer)
    return jnp.where(mask_BT[..., None], x_BTD, 0.0)


@functools.partial(jax.jit, static_argnames=("config", "layer"))
def _encode(config, layer, params, statistics, clusters, wave_BW, lengths_B):
    x_BTD = _features(config, layer, params, statistics, wave_BW, lengths_B)
    normed_BTD = (x_BTD - clusters["mean"]) / clusters["std"]
    z_BT = kmeans.nearest(normed_BTD.reshape(-1, normed_BTD.shape[-1]), clusters["centroids"]).reshape(x_BTD.shape[:2])
    frames_B = features.num_frames(lengths_B, config.sample_rate)
    return jnp.where(features.length_mask(frames_B, z_BT.shape[1]), z_BT, 0)
