"""The networks that semantic tokens can be made of, and what all of them do.

Shape suffixes: B batch, W waveform samples, T frames, D model.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

from audiolm_jax.config import build_kind
from audiolm_jax.semantic.w2v_bert import W2vBertConfig
from audiolm_jax.semantic.wav2vec2 import Wav2Vec2Config
from audiolm_jax.semantic.wav2vec2_bert import Wav2Vec2BertConfig
from audiolm_jax.semantic.whisper import WhisperConfig

Weights = Mapping[str, Any]


class Encoder(Protocol):
    """What encoders have in common: a frozen dataclass of the fields of a config's `model`.

    Hidden states are numbered as Hugging Face does: 0 is the input of the first block, layer n the output of block n.

    Attributes:
      sample_rate: Hz.
      hop_length: samples from one frame to the next.
      num_layers: blocks.
      default_layer: hidden state that tokens are taken from unless told otherwise.
      window_seconds: longest audio that is seen at once.
    """

    @property
    def sample_rate(self) -> int: ...
    @property
    def hop_length(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def default_layer(self) -> int: ...
    @property
    def window_seconds(self) -> float: ...

    def num_frames(self, num_samples: Any) -> Any:
        """Frames of so many samples (an integer or an array of them), 0 of too few.

        A hop more or less of samples is a frame more or less, wherever there are frames at all.
        """

    def hidden_states(
        self, weights: Weights, wave_BW: jax.Array, lengths_B: jax.Array, layers: tuple[int, ...]
    ) -> tuple[jax.Array, ...]:
        """Hidden states [B, T, D], T at least `num_frames(W)`, of each of `layers`, float32.

        A row's first `num_frames(lengths_B[b])` frames are those of its first `lengths_B[b]` samples alone, whatever
        the others hold; past them stand finite numbers of no meaning. Blocks behind the last of `layers` do not run.
        """


def _w2v_bert(**fields: Any) -> W2vBertConfig:
    """In float32, whatever it was trained in."""
    return dataclasses.replace(W2vBertConfig(**fields), dtype="float32", remat="none")


ENCODERS: Mapping[str, Callable[..., Encoder]] = {
    "w2v_bert": _w2v_bert,
    "wav2vec2": Wav2Vec2Config,
    "wav2vec2_bert": Wav2Vec2BertConfig,
    "whisper": WhisperConfig,
}


def build_encoder(model: Mapping[str, Any]) -> Encoder:
    """The network that a config's `model` describes: of the kind `architecture`, by default w2v-BERT.

    Raises:
      UserError: an unknown architecture or unknown fields.
    """
    return build_kind(ENCODERS, model, default="w2v_bert")
