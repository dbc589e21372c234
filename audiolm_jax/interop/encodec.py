"""Hugging Face's `EncodecModel`: the mono model as a codec of ours, the stereo one as a class of its own.

Shape suffixes: U chunks, B batch, C channels, W waveform samples, T frames, Q levels.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from audiolm_jax.codec import architecture
from audiolm_jax.codec.architecture import Weights
from audiolm_jax.codec.encodec import EncodecConfig
from audiolm_jax.config import soundstream_config
from audiolm_jax.errors import UserError
from audiolm_jax.interop import seanet
from audiolm_jax.interop.huggingface import Tensors, read_config
from audiolm_jax.parts import Part

# What a config.json leaves out.
DEFAULTS = {
    "target_bandwidths": (1.5, 3.0, 6.0, 12.0, 24.0),
    "sampling_rate": 24_000,
    "audio_channels": 1,
    "normalize": False,
    "chunk_length_s": None,
    "overlap": None,
    "hidden_size": 128,
    "num_filters": 32,
    "num_residual_layers": 1,
    "upsampling_ratios": (8, 5, 4, 2),
    "norm_type": "weight_norm",
    "kernel_size": 7,
    "last_kernel_size": 7,
    "residual_kernel_size": 3,
    "dilation_growth_rate": 2,
    "use_causal_conv": True,
    "pad_mode": "reflect",
    "compress": 2,
    "num_lstm_layers": 2,
    "trim_right_ratio": 1.0,
    "codebook_size": 1024,
    "codebook_dim": None,
    "use_conv_shortcut": True,
}


def part_from_huggingface(source: str | os.PathLike[str]) -> Part:
    """The mono model of a folder as a part that `load_codec` and fine-tuning take.

    Raises:
      UserError: not an EnCodec of ours to convert, or weights that do not belong to its config.
    """
    config = {**DEFAULTS, **read_config(source)}
    if config["audio_channels"] != 1 or config["chunk_length_s"] or config["normalize"]:
        what = "an EnCodec that is stereo, scaled or works in chunks is no codec of one waveform"
        raise UserError(what, source, "load it by audiolm_jax.interop.load_encodec_48khz(DIR)")
    model = _model(config, source)
    training = soundstream_config()
    training.model = {"architecture": "encodec", **dataclasses.asdict(model)}
    return Part("soundstream", training, _weights(model, config, source))


def _model(config: Mapping[str, Any], source: str | os.PathLike[str]) -> EncodecConfig:
    if config["codebook_dim"] not in (None, config["hidden_size"]):
        widths = f"codebook_dim {config['codebook_dim']}, hidden_size {config['hidden_size']}"
        raise UserError(f"codes are not as wide as frames ({widths})", source, "mend config.json")
    fields = seanet.config_fields(config)
    rate = math.ceil(config["sampling_rate"] / math.prod(config["upsampling_ratios"]))
    bits = math.ceil(math.log2(config["codebook_size"]))
    return EncodecConfig(
        **fields,
        num_quantizers=int(1000 * config["target_bandwidths"][-1] // (rate * bits)),
        num_lstm_layers=config["num_lstm_layers"],
        group_norm=config["norm_type"] == "time_group_norm",
    )


def _weights(model: EncodecConfig, config: Mapping[str, Any], source: str | os.PathLike[str]) -> dict[str, Any]:
    tensors = Tensors(source)
    tensors.ignore(".codebook.inited", ".codebook.embed_avg")
    generator = {
        "encoder": seanet.encoder_weights(tensors, "encoder", model),
        "decoder": seanet.decoder_weights(tensors, "decoder", model),
    }
    levels = [f"quantizer.layers.{level}.codebook" for level in range(model.num_quantizers)]
    shape = (model.codebook_size, model.embed_dim)
    embedding_QND = np.stack([tensors.take(f"{level}.embed", shape) for level in levels])
    cluster_size_QN = np.stack([tensors.take(f"{level}.cluster_size", shape[:1]) for level in levels])
    tensors.check_all_used()
    if not cluster_size_QN.any():  # Nobody counted: fine-tuning starts with codes that are used alike.
        cluster_size_QN = np.ones_like(cluster_size_QN)
    codebooks = {
        "embedding": embedding_QND,
        "cluster_size": cluster_size_QN,
        "embedding_sum": embedding_QND * cluster_size_QN[..., None],
    }
    return {"generator": generator, "codebooks": codebooks}


class Chunks(NamedTuple):
    """Codes of recordings, chunk by chunk.

    Attributes:
      codes_UBTQ: int32; zeros after a chunk's own frames.
      scales_UB: loudness that each chunk was divided by.
      frames_U: of each chunk.
    """

    codes_UBTQ: np.ndarray
    scales_UB: np.ndarray
    frames_U: np.ndarray


@dataclasses.dataclass(frozen=True)
class ChunkedEncodec:
    """An EnCodec of several channels, which scales and codes overlapping chunks; made by `load_encodec_48khz`.

    Attributes:
      config: of the networks.
      weights: of the networks.
      chunk_length, chunk_stride: samples of a chunk, and from one to the next; None: one chunk for everything.
      normalize: whether chunks are scaled to a loudness of 1.
      bandwidths: kbit/s that `encode` offers.
    """

    config: EncodecConfig
    weights: Weights
    chunk_length: int | None
    chunk_stride: int | None
    normalize: bool
    bandwidths: tuple[float, ...]

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.config.sample_rate

    def num_quantizers(self, bandwidth: float) -> int:
        """Levels that make up so many kbit/s."""
        if bandwidth not in self.bandwidths:
            choice = ", ".join(f"{one:g}" for one in self.bandwidths)
            raise UserError("no such bandwidth", f"bandwidth={bandwidth}", f"use one of {choice}")
        rate = math.ceil(self.config.sample_rate / self.config.hop_length)
        return max(1, math.floor(bandwidth * 1000 / (math.log2(self.config.codebook_size) * rate)))

    def encode(self, wave_BCW: np.ndarray, bandwidth: float | None = None) -> Chunks:
        """Codes of whole recordings.

        Args:
          wave_BCW: floats at `sample_rate`, one row a recording.
          bandwidth: kbit/s, the lowest of `bandwidths` by default.

        Raises:
          UserError: not such waveforms, or no such bandwidth.
        """
        levels = self.num_quantizers(self.bandwidths[0] if bandwidth is None else bandwidth)
        wave_BCW = np.asarray(wave_BCW)
        if wave_BCW.ndim != 3 or wave_BCW.shape[1] != self.config.audio_channels or wave_BCW.shape[2] == 0:
            wanted = f"[batch, {self.config.audio_channels}, samples]"
            raise UserError(f"waveforms are not {wanted}", list(wave_BCW.shape), "give one row a recording")
        if not (np.issubdtype(wave_BCW.dtype, np.floating) and np.isfinite(wave_BCW).all()):
            raise UserError("waveforms are not finite floats", wave_BCW.dtype, "mend the recording")
        batch, _, total = wave_BCW.shape
        size, stride = self.chunk_length or total, self.chunk_stride or total
        codes, scales, frames = [], [], []
        for start in range(0, total, stride):
            chunk_BWC = wave_BCW[:, :, start : start + size].astype(np.float32).transpose(0, 2, 1)
            length = chunk_BWC.shape[1]
            scale_B = np.ones(batch, np.float32)
            if self.normalize:
                scale_B = np.sqrt(np.mean(np.square(chunk_BWC.mean(axis=2)), axis=1)) + np.float32(1e-8)
            padded_BWC = np.pad(chunk_BWC / scale_B[:, None, None], ((0, 0), (0, size - length), (0, 0)))
            lengths_B = np.full(batch, length, np.int32)
            codes_BTQ = np.array(_encode(self.config, self.weights, padded_BWC, lengths_B, levels))
            frames.append(self.config.num_frames(length))
            codes_BTQ[:, frames[-1] :] = 0
            codes.append(codes_BTQ)
            scales.append(scale_B)
        return Chunks(np.stack(codes), np.stack(scales), np.array(frames))

    def decode(self, chunks: Chunks) -> np.ndarray:
        """Waveforms [B, C, W] of `encode`'s codes: the chunks faded into each other; the last frame may be long."""
        num_chunks, batch, num_frames, _ = chunks.codes_UBTQ.shape
        size = self.config.num_samples(num_frames)
        weight_W = 0.5 - np.abs(np.linspace(0, 1, size + 2)[1:-1] - 0.5)
        lengths_U = self.config.num_samples(chunks.frames_U)
        starts_U = np.arange(num_chunks) * (self.chunk_stride or 0)
        total = int(np.max(starts_U + lengths_U))
        wave_BWC, weights_W = np.zeros((batch, total, self.config.audio_channels)), np.zeros(total)
        for index, (start, length) in enumerate(zip(starts_U, lengths_U)):
            frames_B = np.full(batch, chunks.frames_U[index], np.int32)
            decoded_BWC = np.asarray(_decode(self.config, self.weights, chunks.codes_UBTQ[index], frames_B))
            decoded_BWC = decoded_BWC.reshape(batch, size, -1) * chunks.scales_UB[index][:, None, None]
            wave_BWC[:, start : start + length] += decoded_BWC[:, :length] * weight_W[:length, None]
            weights_W[start : start + length] += weight_W[:length]
        return (wave_BWC / weights_W[:, None]).astype(np.float32).transpose(0, 2, 1)


_encode = jax.jit(architecture.encode, static_argnums=(0, 4))
_decode = jax.jit(architecture.decode, static_argnums=0)


def load_encodec_48khz(source: str | os.PathLike[str]) -> ChunkedEncodec:
    """An EnCodec that is stereo, scaled or works in chunks, from the folder of its Hugging Face model.

    Raises:
      UserError: not such a model, or weights that do not belong to its config.
    """
    config = {**DEFAULTS, **read_config(source)}
    if config["model_type"] != "encodec":
        raise UserError(f"not an EnCodec but a {config['model_type']}", source, "use `audiolm convert`")
    length = stride = None
    if config["chunk_length_s"]:
        if config["overlap"] is None:
            raise UserError("chunks without an overlap", source, "mend config.json")
        length = int(config["chunk_length_s"] * config["sampling_rate"])
        stride = max(1, int((1.0 - config["overlap"]) * length))
    model = _model(config, source)
    weights = jax.device_put(_weights(model, config, source))
    return ChunkedEncodec(model, weights, length, stride, config["normalize"], tuple(config["target_bandwidths"]))
