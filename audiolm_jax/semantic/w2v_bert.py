"""w2v-BERT (arXiv 2108.06209): a contrastive and a masked-prediction stack of Conformer blocks.

Log-mel features go through two stride-2 convolutions (25 Hz). Spans of the result are replaced with noise
and run through the contrastive module, whose outputs must find the quantized vector of their own
frame among distractors, then through the masked-prediction module, which must name its code. The
quantizer looks at the features before masking.

Hidden states are numbered as Hugging Face does: 0 is the input of the first block, layer n the
output of block n, counted through both modules. AudioLM takes layer 12 + 7 of the XL model.

Shape suffixes: B batch, T frames, M mel bands, C channels, E subsampled features, D model, K codes, G code width.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from audiolm_jax.semantic import features
from audiolm_jax.semantic.blocks import states_between
from audiolm_jax.semantic.conformer import ConformerConfig, ConformerStack, dense, layer_norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class W2vBertConfig(ConformerConfig):
    """Architecture; these and `ConformerConfig`'s are the fields of a config's `model`.

    Attributes:
      sample_rate, num_mels: of the features.
      subsampling_channels: channels of the two 2-D convolutions (open in the paper).
      num_contrastive_layers, num_masked_layers: blocks of the two modules.
      codebook_size, codebook_dim: K and G of the quantizer.
      noise_scale: standard deviation of the vectors that replace masked frames (open in the paper).
      default_layer: hidden state that semantic tokens are taken from unless told otherwise.
      window_seconds: longest audio that is seen at once when it is tokenized.
    """

    sample_rate: int
    num_mels: int
    subsampling_channels: int
    num_contrastive_layers: int
    num_masked_layers: int
    codebook_size: int
    codebook_dim: int
    noise_scale: float
    default_layer: int
    window_seconds: float = 30.0

    @property
    def num_layers(self) -> int:
        return self.num_contrastive_layers + self.num_masked_layers

    @property
    def hop_length(self) -> int:
        return features.samples_per_frame(self.sample_rate)

    def num_frames(self, num_samples: Any) -> Any:
        """ceil(W / 640) at 16 kHz (an integer or an array of them)."""
        return features.num_frames(num_samples, self.sample_rate)

    def hidden_states(
        self, weights: Mapping[str, Any], wave_BW: jax.Array, lengths_B: jax.Array, layers: tuple[int, ...]
    ) -> tuple[jax.Array, ...]:
        """Hidden states of waveforms; see `semantic.encoder.Encoder`. `weights` are the objective's."""
        mel_BTM = features.log_mel(wave_BW, lengths_B, self.sample_rate, self.num_mels)
        mask_BT = features.length_mask(self.num_frames(lengths_B), mel_BTM.shape[1] // features.MELS_PER_FRAME)
        mel_BTM = features.normalize(mel_BTM, weights["statistics"])
        return hidden_states(self, weights["params"], mel_BTM, mask_BT, layers)


@flax.struct.dataclass
class Predictions:
    """What a masked pass gives the losses.

    Attributes:
      context_BTG: outputs of the contrastive module, projected to the code vectors' width.
      quantized_BTG: code vector of each frame.
      selected_BT: code that `quantized_BTG` took (sampled while training).
      targets_BT: the most likely code, which the masked-prediction module must name.
      usage_K: probabilities of the codes, summed over the frames that exist.
      predicted_BTD: outputs of the masked-prediction module, of which `W2vBert.logits` makes scores of the codes.
    """

    context_BTG: jax.Array
    quantized_BTG: jax.Array
    selected_BT: jax.Array
    targets_BT: jax.Array
    usage_K: jax.Array
    predicted_BTD: jax.Array


class Subsampling(nn.Module):
    """Two 3x3 convolutions of stride 2 over time and frequency, then a LayerNorm: four mel frames become one."""

    config: W2vBertConfig

    @nn.compact
    def __call__(self, mel_BTM: jax.Array, mask_BT: jax.Array) -> jax.Array:
        """Normalised log-mels [B, 4T, M] and the mask [B, T] of the frames that exist -> [B, T, E]."""
        config = self.config
        x_BTMC = mel_BTM[..., None].astype(config.dtype)
        for rate in (4, 2):
            exists_BT = jnp.repeat(mask_BT, rate, axis=1)
            x_BTMC = jnp.where(exists_BT[..., None, None], x_BTMC, 0.0)
            kernel_init = nn.initializers.lecun_normal()
            x_BTMC = nn.Conv(
                config.subsampling_channels,
                kernel_size=(3, 3),
                strides=(2, 2),
                dtype=config.dtype,
                kernel_init=nn.with_logical_partitioning(kernel_init, (None, None, None, "conv")),
                bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("conv",)),
            )(x_BTMC)
            x_BTMC = nn.swish(x_BTMC)
        return layer_norm(config, "norm")(x_BTMC.reshape(*mask_BT.shape, -1))


class GumbelQuantizer(nn.Module):
    """One codebook with straight-through Gumbel-softmax selection (arXiv 2006.11477 §2, one group)."""

    config: W2vBertConfig

    @nn.compact
    def __call__(self, x_BTE: jax.Array, temperature: jax.Array, deterministic: bool):
        """Chooses a code for each frame, in float32.

        Args:
          x_BTE: subsampled features, unmasked.
          temperature: of the Gumbel-softmax.
          deterministic: False samples, with the "gumbel" key; True takes the most likely code.

        Returns:
          quantized [B, T, G], selected and most likely codes [B, T] and probabilities [B, T, K].
        """
        config = self.config
        size = config.codebook_size
        # Unit-variance weights, as in wav2vec 2.0: codes differ from the first step on.
        kernel_init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("embed", "vocab"))
        logits_BTK = nn.Dense(size, use_bias=False, kernel_init=kernel_init, name="logits")(x_BTE.astype(jnp.float32))
        codebook_init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed"))
        codebook_KG = self.param("codebook", codebook_init, (size, config.codebook_dim))
        targets_BT = jnp.argmax(logits_BTK, axis=-1)
        usage_BTK = jax.nn.softmax(logits_BTK)
        if deterministic:
            return codebook_KG[targets_BT], targets_BT, targets_BT, usage_BTK
        noise_BTK = jax.random.gumbel(self.make_rng("gumbel"), logits_BTK.shape)
        soft_BTK = jax.nn.softmax((logits_BTK + noise_BTK) / temperature)
        selected_BT = jnp.argmax(soft_BTK, axis=-1)
        hard_BTK = jax.nn.one_hot(selected_BT, size) + soft_BTK - jax.lax.stop_gradient(soft_BTK)
        return hard_BTK @ codebook_KG, selected_BT, targets_BT, usage_BTK


class W2vBert(nn.Module):
    """Both modules, the quantizer and the prediction heads."""

    config: W2vBertConfig

    def setup(self):
        config = self.config
        self.subsampling = Subsampling(config)
        self.input_projection = dense(config, config.embed_dim, (None, "embed"))
        self.contrastive = ConformerStack(config, config.num_contrastive_layers)
        self.masked = ConformerStack(config, config.num_masked_layers)
        self.quantizer = GumbelQuantizer(config)
        self.context_projection = dense(config, config.codebook_dim, ("embed", None))
        self.head = dense(config, config.codebook_size, ("embed", "vocab"))
        self.dropout = nn.Dropout(config.dropout_rate)

    def __call__(
        self, mel_BTM: jax.Array, mask_BT: jax.Array, spans_BT: jax.Array, temperature: jax.Array, deterministic: bool
    ) -> Predictions:
        """Predicts the frames that are masked; needs the "noise" key, and for training "gumbel" and "dropout".

        Args:
          mel_BTM: normalised log-mels [B, 4T, M].
          mask_BT: True where a frame exists.
          spans_BT: True where a frame is replaced with noise.
          temperature: of the Gumbel-softmax.
          deterministic: True for evaluation.
        """
        # Features of all frames and scores of all codes are the widest arrays of all, and needed first and last.
        front = W2vBert._front if self.config.remat == "none" else nn.remat(W2vBert._front, static_argnums=(5,))
        x_BTD, quantized_BTG, selected_BT, targets_BT, usage_K = front(
            self, mel_BTM, mask_BT, spans_BT, temperature, deterministic
        )
        context_BTD = self.contrastive(x_BTD, mask_BT, deterministic)
        predicted_BTD = self.masked(context_BTD, mask_BT, deterministic)
        if self.is_initializing():
            self.logits(predicted_BTD)
        return Predictions(
            context_BTG=self.context_projection(context_BTD).astype(jnp.float32),
            quantized_BTG=quantized_BTG,
            selected_BT=selected_BT,
            targets_BT=targets_BT,
            usage_K=usage_K,
            predicted_BTD=predicted_BTD,
        )

    def logits(self, predicted_BTD: jax.Array) -> jax.Array:
        """Scores of the codes, float32 [B, T, K], from the last block's output."""
        return self.head(predicted_BTD).astype(jnp.float32)

    def _front(self, mel_BTM, mask_BT, spans_BT, temperature, deterministic):
        """Input of the first block [B, T, D], masked, and what the quantizer makes of the unmasked frames."""
        features_BTE = self.subsampling(mel_BTM, mask_BT)
        *codes, usage_BTK = self.quantizer(features_BTE, temperature, deterministic)
        usage_K = jnp.sum(usage_BTK, axis=(0, 1), where=mask_BT[..., None])
        noise_BTE = self.config.noise_scale * jax.random.normal(
            self.make_rng("noise"), features_BTE.shape, features_BTE.dtype
        )
        masked_BTE = jnp.where(spans_BT[..., None], noise_BTE, features_BTE)
        return self.dropout(self.input_projection(masked_BTE), deterministic=deterministic), *codes, usage_K

    def inputs(self, mel_BTM: jax.Array, mask_BT: jax.Array) -> jax.Array:
        """Input [B, T, D] of the first block, nothing masked."""
        return self.input_projection(self.subsampling(mel_BTM, mask_BT))


def hidden_states(
    config: W2vBertConfig, params: dict[str, Any], mel_BTM: jax.Array, mask_BT: jax.Array, layers: Sequence[int]
) -> tuple[jax.Array, ...]:
    """Hidden states [B, T, D] of some layers, from one pass that ends with the last of them.

    Args:
      config: architecture of the whole model.
      params: its parameters, unboxed.
      mel_BTM: normalised log-mels [B, 4T, M].
      mask_BT: True where a frame exists; the others hold finite numbers of no meaning.
      layers: each 0 (input of the first block) to `config.num_layers`.
    """
    front = {name: params[name] for name in ("subsampling", "input_projection")}
    x_BTD = W2vBert(config).apply({"params": front}, mel_BTM, mask_BT, method="inputs")
    num_contrastive, num_masked = config.num_contrastive_layers, config.num_masked_layers
    stacks = (("contrastive", 0, num_contrastive), ("masked", num_contrastive, num_masked))

    def run(x_BTD: jax.Array, start: int, stop: int) -> jax.Array:
        for name, first, size in stacks:
            begin, end = max(start - first, 0), min(stop - first, size)
            if begin < end:
                blocks = jax.tree.map(lambda leaf, begin=begin, end=end: leaf[begin:end], params[name])
                x_BTD = ConformerStack(config, end - begin).apply({"params": blocks}, x_BTD, mask_BT)
        return x_BTD

    return states_between(x_BTD, layers, run)
