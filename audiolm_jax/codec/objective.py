"""Adversarial training of the codec, as an `Objective` (SoundStream, arXiv 2107.03312 §III)."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from audiolm_jax.codec import balancer, health, losses
from audiolm_jax.codec.architecture import Architecture, build_architecture, decode, encode, features
from audiolm_jax.codec.convolution import initialize
from audiolm_jax.codec.discriminators import Discriminators, Judgement
from audiolm_jax.codec.quantizer import QuantizerTraining, fill_masked
from audiolm_jax.errors import UserError
from audiolm_jax.objective import Batch, Metrics, Objective, State, Totals

# Losses of the waveform by who says so; the weight of each is the field NAME_weight of a config's `loss`.
SIMILARITY = ("reconstruction", "waveform")
DECEPTION = ("adversarial", "feature")


def discriminators_from_config(config: ml_collections.ConfigDict) -> Discriminators:
    """The discriminators that a codec's config describes.

    Raises:
      UserError: a window that four hops do not fill.
    """
    fields = dict(config.discriminator)
    del fields["start_step"]
    for window in (windows := fields.get("multi_stft_windows", ())):
        if not isinstance(window, int) or window < 16 or window % 4:
            where = f"config.discriminator.multi_stft_windows={windows}"
            raise UserError(f"no window of {window} samples", where, "give multiples of 4 from 16 on")
    return Discriminators(**fields)


def soundstream_objective(
    config: ml_collections.ConfigDict,
    generator_optimizer: optax.GradientTransformation,
    discriminator_optimizer: optax.GradientTransformation,
) -> Objective:
    """The objective of a codec; batches are crops of recordings.

    A batch holds `wave_BW` (float32) and optionally `lengths_B` (int32): samples from there on are padding, of which
    neither the codebooks nor the evaluation take notice. A row of length 0 only fills a batch up.

    One step computes reconstruction and discriminators once and updates both sides from them, each against the other
    as it was before the step. Until `discriminator.start_step` the discriminators stay out of it.

    Metrics, beside the losses: `gradient_norm` and `discriminator_gradient_norm`; `log_mel_low`, `_middle` and `_high`,
    the reconstruction by band (see `losses.log_mel_distance_by_band`); `accuracy_real` and `accuracy_fake`, how often
    the discriminators are right; of each level `perplexity_` and `dead_codes_` (replaced in this step); and with
    `loss.balancer` the losses' `share_` in what moves the codec.
    """
    model = build_architecture(config.model)
    training = _Training(
        config, model, discriminators_from_config(config), generator_optimizer, discriminator_optimizer
    )
    frames_per_batch = config.batch_size * model.num_frames(round(config.crop_seconds * model.sample_rate))
    return Objective(
        init=training.init,
        step=training.step,
        eval_step=training.eval_step,
        weights=lambda state: {"generator": state["generator"], "codebooks": state["codebooks"]},
        warm_start=training.warm_start,
        warm_start_batches=math.ceil(config.quantizer.kmeans_frames_per_code * model.codebook_size / frames_per_batch),
        optional_weights=("discriminator",),
        symptoms=health.symptoms(model.num_quantizers, model.codebook_size),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Training:
    """The parts of a codec's training and the functions of its `Objective`."""

    config: ml_collections.ConfigDict
    model: Architecture
    discriminators: Discriminators
    generator_optimizer: optax.GradientTransformation
    discriminator_optimizer: optax.GradientTransformation

    @property
    def weights(self) -> dict[str, float]:
        """Of the waveform's losses, by name."""
        return {name: self.config.loss[f"{name}_weight"] for name in (*SIMILARITY, *DECEPTION)}

    @property
    def balanced(self) -> bool:
        """Whether the gradients of the waveform's losses are balanced."""
        return self.config.loss.get("balancer", False)

    def init(self, key: jax.Array) -> State:
        encoder_key, decoder_key, codebook_key, discriminator_key = jax.random.split(key, 4)
        windows = (self.config.discriminator.stft_window, *self.discriminators.multi_stft_windows)
        wave_BW = jnp.zeros((1, max(self.model.hop_length, *windows)), jnp.float32)
        generator = {
            "encoder": initialize(self.model.encoder, encoder_key, wave_BW),
            "decoder": initialize(self.model.decoder, decoder_key, jnp.zeros((1, 1, self.model.embed_dim))),
        }
        parameters, codebooks = self.model.quantizer.init(codebook_key)
        if parameters:
            generator["quantizer"] = parameters
        discriminator = initialize(self.discriminators, discriminator_key, wave_BW)
        return {
            "step": jnp.int32(0),
            "generator": generator,
            "codebooks": codebooks,
            "discriminator": discriminator,
            "generator_opt": self.generator_optimizer.init(generator),
            "discriminator_opt": self.discriminator_optimizer.init(discriminator),
            **({"balancer": balancer.init(self.weights)} if self.balanced else {}),
        }

    def frames_mask(self, batch: Batch) -> jax.Array:
        """True for frames of a row's own samples: [B, T]."""
        num_frames = self.model.num_frames(batch["wave_BW"].shape[1])
        return jnp.arange(num_frames) < self.model.num_frames(_lengths(batch))[:, None]

    def reconstruct(self, generator, codebooks, batch: Batch, key: jax.Array):
        """((waveform [B, W], commitment), Quantized) of a training batch."""
        x_BTD = self.model.encoder.apply({"params": generator["encoder"]}, batch["wave_BW"], _lengths(batch))
        fields = {field.name: self.config.quantizer[field.name] for field in dataclasses.fields(QuantizerTraining)}
        quantized = self.model.quantizer.train(
            generator.get("quantizer", {}), codebooks, x_BTD, key, QuantizerTraining(**fields), self.frames_mask(batch)
        )
        frames_B = self.model.num_frames(_lengths(batch))
        wave_BW = self.model.decoder.apply({"params": generator["decoder"]}, quantized.vectors_BTD, frames_B)
        return (_cut(wave_BW, batch["wave_BW"].shape[1]), quantized.commitment), quantized

    def spectral_loss(self, target_BW: jax.Array, wave_BW: jax.Array) -> jax.Array:
        return losses.reconstruction_loss(
            target_BW,
            wave_BW,
            sample_rate=self.model.sample_rate,
            num_mels=self.config.loss.num_mels,
            min_log2_window=self.config.loss.min_log2_window,
            max_log2_window=self.config.loss.max_log2_window,
        )

    def similarity(self, wave_BW: jax.Array, target_BW: jax.Array) -> Metrics:
        """The losses of a reconstruction by itself."""
        return {
            "reconstruction": jnp.mean(self.spectral_loss(target_BW, wave_BW)),
            "waveform": jnp.mean(jnp.abs(target_BW - wave_BW)),
        }

    def judge(self, params, wave_BW: jax.Array, target_BW: jax.Array) -> tuple[list[Judgement], list[Judgement]]:
        """Judgements of real and reconstructed waveforms, in one pass over both."""
        batch, size = wave_BW.shape
        # Pairs side by side: on a mesh every row stays on its device.
        pairs_BW = jnp.stack([target_BW, wave_BW], axis=1).reshape(2 * batch, size)
        judgements = self.discriminators.apply({"params": params}, pairs_BW)
        side = lambda index: jax.tree.map(lambda x: x.reshape(batch, 2, *x.shape[1:])[:, index], judgements)
        return side(0), side(1)

    def deception(self, judgements: tuple[list[Judgement], list[Judgement]]) -> Metrics:
        """The losses that the discriminators mean for the codec."""
        real, fake = judgements
        return {"adversarial": losses.adversarial_loss(fake), "feature": losses.feature_loss(real, fake)}

    def pulling(self, kind: tuple[str, ...]) -> tuple[str, ...]:
        """Names of the gradients of a kind of losses: each by itself to be balanced, else their weighted sum as one."""
        return kind if self.balanced else kind[:1]

    def gradients(self, kind: tuple[str, ...], compute: Callable[[Any], Metrics], at: Any):
        """(losses of a kind, their gradients by the names of `pulling`)."""

        def pulled(x, name: str):
            values = compute(x)
            return values[name] if self.balanced else sum(self.weights[one] * values[one] for one in kind), values

        found = {name: jax.value_and_grad(pulled, has_aux=True)(at, name) for name in self.pulling(kind)}
        (_, values), _ = found[kind[0]]
        return values, {name: gradient for name, (_, gradient) in found.items()}

    def combine(self, state: State, wave_grads_BW: dict[str, jax.Array]) -> tuple[jax.Array, State, Metrics]:
        """(the gradient that goes into the decoder, new entries of the state, metrics)."""
        if not self.balanced:
            return jnp.sum(jnp.stack(list(wave_grads_BW.values())), axis=0), {}, {}
        balanced = balancer.balance(state["balancer"], wave_grads_BW, self.weights)
        shares = {f"share_{name}": share for name, share in balanced.shares.items()}
        return balanced.grad_BW, {"balancer": balanced.state}, shares

    def compete(self, discriminator, opt_state, wave_BW: jax.Array, target_BW: jax.Array):
        """(metrics, codec's gradients for the waveform by loss, new discriminator, its optimiser's state)."""
        judgements, pull_back = jax.vjp(functools.partial(self.judge, target_BW=target_BW), discriminator, wave_BW)
        metrics, to_codec = self.gradients(DECEPTION, self.deception, judgements)
        metrics["discriminator"], to_discriminator = jax.value_and_grad(lambda x: losses.discriminator_loss(*x))(
            judgements
        )
        metrics["accuracy_real"], metrics["accuracy_fake"] = losses.accuracy(*judgements)
        wave_grads_BW = {name: pull_back(gradient)[1] for name, gradient in to_codec.items()}
        grads = pull_back(to_discriminator)[0]
        metrics["discriminator_gradient_norm"] = optax.tree.norm(grads)
        updates, opt_state = self.discriminator_optimizer.update(grads, opt_state, discriminator)
        return metrics, wave_grads_BW, optax.apply_updates(discriminator, updates), opt_state

    def wait(self, discriminator, opt_state, wave_BW: jax.Array, target_BW: jax.Array):
        """What `compete` returns, before the discriminators take part."""
        del target_BW
        names = (*DECEPTION, "discriminator", "accuracy_real", "accuracy_fake", "discriminator_gradient_norm")
        metrics = dict.fromkeys(names, jnp.zeros((), wave_BW.dtype))
        return metrics, dict.fromkeys(self.pulling(DECEPTION), jnp.zeros_like(wave_BW)), discriminator, opt_state

    def step(self, state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        target_BW = batch["wave_BW"]
        (wave_BW, commitment), pull_back, quantized = jax.vjp(
            lambda generator: self.reconstruct(generator, state["codebooks"], batch, key),
            state["generator"],
            has_aux=True,
        )
        similarity = functools.partial(self.similarity, target_BW=target_BW)
        metrics, wave_grads_BW = self.gradients(SIMILARITY, similarity, wave_BW)
        started = state["step"] >= self.config.discriminator.start_step
        more_metrics, more_grads_BW, discriminator, discriminator_opt = jax.lax.cond(
            started, self.compete, self.wait, state["discriminator"], state["discriminator_opt"], wave_BW, target_BW
        )
        wave_grad_BW, balancer_state, shares = self.combine(state, {**wave_grads_BW, **more_grads_BW})
        commitment_weight = self.config.quantizer.commitment_weight
        (grads,) = pull_back((wave_grad_BW, jnp.full_like(commitment, commitment_weight)))
        updates, generator_opt = self.generator_optimizer.update(grads, state["generator_opt"], state["generator"])
        new_state = {
            "step": state["step"] + 1,
            "generator": optax.apply_updates(state["generator"], updates),
            "codebooks": quantized.codebooks,
            "discriminator": discriminator,
            "generator_opt": generator_opt,
            "discriminator_opt": discriminator_opt,
            **balancer_state,
        }
        metrics |= {**more_metrics, **shares, "commitment": commitment, "gradient_norm": optax.tree.norm(grads)}
        loss = sum(weight * metrics[name] for name, weight in self.weights.items()) + commitment_weight * commitment
        for band, distance in losses.log_mel_distance_by_band(target_BW, wave_BW, self.model.sample_rate).items():
            metrics[f"log_mel_{band}"] = distance
        for level in range(self.model.num_quantizers):
            metrics[f"perplexity_{level}"] = quantized.perplexity_Q[level]
            metrics[f"dead_codes_{level}"] = quantized.dead_Q[level]
        return new_state, {"loss": loss, **metrics}

    def eval_step(self, state: State, batch: Batch, key: jax.Array) -> Totals:
        """Totals over rows of the spectral loss ("loss") and SI-SDR, over frames of the log-mel distance."""
        del key
        target_BW, lengths_B = batch["wave_BW"], _lengths(batch)
        size = target_BW.shape[1]
        codes_BTQ = encode(self.model, state, target_BW, lengths_B)
        wave_BW = _cut(decode(self.model, state, codes_BTQ, self.model.num_frames(lengths_B)), size)
        wave_BW = jnp.where(jnp.arange(size) < lengths_B[:, None], wave_BW, 0.0)
        present_B = (lengths_B > 0).astype(target_BW.dtype)
        distance_BT = losses.log_mel_distance(target_BW, wave_BW, self.model.sample_rate)
        frame_starts_T = jnp.arange(distance_BT.shape[1]) * (self.model.sample_rate // 100)
        present_BT = (frame_starts_T < lengths_B[:, None]).astype(target_BW.dtype)
        rows = jnp.sum(present_B)
        return {
            "loss": (jnp.sum(self.spectral_loss(target_BW, wave_BW) * present_B), rows),
            "log_mel_distance": (jnp.sum(distance_BT * present_BT), jnp.sum(present_BT)),
            "si_sdr": (jnp.sum(losses.si_sdr(target_BW, wave_BW) * present_B), rows),
        }

    def warm_start(self, state: State, batches: Iterable[Batch], key: jax.Array) -> State:
        """Codebooks by k-means on the untrained encoder's frames (§III-C)."""
        fit_key, fill_key = jax.random.split(key)

        @jax.jit
        def frames(generator, batch: Batch) -> tuple[jax.Array, jax.Array]:
            x_BTD = features(self.model, {"generator": generator}, batch["wave_BW"], _lengths(batch))
            return x_BTD.reshape(-1, self.model.embed_dim), self.frames_mask(batch).reshape(-1)

        @jax.jit
        def fit(generator_frames):
            x_MD, mask_M = (jnp.concatenate(parts) for parts in zip(*generator_frames))
            return self.model.quantizer.fit(
                state["generator"].get("quantizer", {}),
                state["codebooks"],
                fill_masked(fill_key, x_MD, mask_M),
                fit_key,
                self.config.quantizer.kmeans_iterations,
                frames_per_step=x_MD.shape[0] / len(generator_frames),
            )

        parameters, codebooks = fit([frames(state["generator"], batch) for batch in batches])
        generator = {**state["generator"], **({"quantizer": parameters} if parameters else {})}
        return {**state, "generator": generator, "codebooks": codebooks}


def _cut(wave_BW: jax.Array, num_samples: int) -> jax.Array:
    """The first samples of decoded waveforms, which may be a few samples longer or shorter than what was encoded."""
    wave_BW = wave_BW[:, :num_samples]
    return jnp.pad(wave_BW, ((0, 0), (0, num_samples - wave_BW.shape[1])))


def _lengths(batch: Batch) -> jax.Array:
    """Samples of each row that are not padding, int32 [B]: none in the rows that only fill up an evaluation batch."""
    batch_size, size = batch["wave_BW"].shape
    lengths_B = batch.get("lengths_B", jnp.full(batch_size, size, jnp.int32))
    return jnp.where(batch["valid_B"] > 0, lengths_B, 0) if "valid_B" in batch else lengths_B
