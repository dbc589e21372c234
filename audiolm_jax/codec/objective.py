"""Adversarial training of the codec, as an `Objective` (SoundStream, arXiv 2107.03312 §III)."""

import dataclasses
import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import ml_collections
import optax

from audiolm_jax.codec import losses
from audiolm_jax.codec.architecture import Architecture, build_architecture, decode, encode, features
from audiolm_jax.codec.convolution import initialize
from audiolm_jax.codec.discriminators import Discriminators, Judgement
from audiolm_jax.codec.quantizer import QuantizerTraining, fill_masked
from audiolm_jax.objective import Batch, Metrics, Objective, State, Totals


def discriminators_from_config(config: ml_collections.ConfigDict) -> Discriminators:
    """The discriminators that a codec's config describes."""
    fields = dict(config.discriminator)
    del fields["start_step"]
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
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Training:
    """The parts of a codec's training and the functions of its `Objective`."""

    config: ml_collections.ConfigDict
    model: Architecture
    discriminators: Discriminators
    generator_optimizer: optax.GradientTransformation
    discriminator_optimizer: optax.GradientTransformation

    def init(self, key: jax.Array) -> State:
        encoder_key, decoder_key, codebook_key, discriminator_key = jax.random.split(key, 4)
        wave_BW = jnp.zeros((1, max(self.model.hop_length, self.config.discriminator.stft_window)), jnp.float32)
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

    def similarity(self, wave_BW: jax.Array, target_BW: jax.Array) -> tuple[jax.Array, Metrics]:
        """Weighted loss of a reconstruction by itself, and its parts."""
        spectral = jnp.mean(self.spectral_loss(target_BW, wave_BW))
        waveform = jnp.mean(jnp.abs(target_BW - wave_BW))
        loss = self.config.loss.reconstruction_weight * spectral + self.config.loss.waveform_weight * waveform
        return loss, {"reconstruction": spectral, "waveform": waveform}

    def judge(self, params, wave_BW: jax.Array, target_BW: jax.Array) -> tuple[list[Judgement], list[Judgement]]:
        """Judgements of real and reconstructed waveforms, in one pass over both."""
        batch, size = wave_BW.shape
        # Pairs side by side: on a mesh every row stays on its device.
        pairs_BW = jnp.stack([target_BW, wave_BW], axis=1).reshape(2 * batch, size)
        judgements = self.discriminators.apply({"params": params}, pairs_BW)
        side = lambda index: jax.tree.map(lambda x: x.reshape(batch, 2, *x.shape[1:])[:, index], judgements)
        return side(0), side(1)

    def deception(self, judgements: tuple[list[Judgement], list[Judgement]]) -> tuple[jax.Array, Metrics]:
        """Weighted loss that the discriminators mean for the codec, and its parts."""
        real, fake = judgements
        adversarial, feature = losses.adversarial_loss(fake), losses.feature_loss(real, fake)
        loss = self.config.loss.adversarial_weight * adversarial + self.config.loss.feature_weight * feature
        return loss, {"adversarial": adversarial, "feature": feature}

    def compete(self, discriminator, opt_state, wave_BW: jax.Array, target_BW: jax.Array):
        """(codec's loss, its gradient for the waveform, new discriminator, its optimiser's state, metrics)."""
        judgements, pull_back = jax.vjp(functools.partial(self.judge, target_BW=target_BW), discriminator, wave_BW)
        (loss, metrics), to_codec = jax.value_and_grad(self.deception, has_aux=True)(judgements)
        discriminator_loss, to_discriminator = jax.value_and_grad(lambda x: losses.discriminator_loss(*x))(judgements)
        wave_grad_BW = pull_back(to_codec)[1]
        updates, opt_state = self.discriminator_optimizer.update(
            pull_back(to_discriminator)[0], opt_state, discriminator
        )
        metrics["discriminator"] = discriminator_loss
        return loss, wave_grad_BW, optax.apply_updates(discriminator, updates), opt_state, metrics

    def wait(self, discriminator, opt_state, wave_BW: jax.Array, target_BW: jax.Array):
        """What `compete` returns, before the discriminators take part."""
        del target_BW
        zero = jnp.zeros((), wave_BW.dtype)
        metrics = {name: zero for name in ("adversarial", "feature", "discriminator")}
        return zero, jnp.zeros_like(wave_BW), discriminator, opt_state, metrics

    def step(self, state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        target_BW = batch["wave_BW"]
        (wave_BW, commitment), pull_back, quantized = jax.vjp(
            lambda generator: self.reconstruct(generator, state["codebooks"], batch, key),
            state["generator"],
            has_aux=True,
        )
        (loss, metrics), wave_grad_BW = jax.value_and_grad(self.similarity, has_aux=True)(wave_BW, target_BW)
        started = state["step"] >= self.config.discriminator.start_step
        deception_loss, deception_grad_BW, discriminator, discriminator_opt, more_metrics = jax.lax.cond(
            started, self.compete, self.wait, state["discriminator"], state["discriminator_opt"], wave_BW, target_BW
        )
        commitment_weight = self.config.quantizer.commitment_weight
        (grads,) = pull_back((wave_grad_BW + deception_grad_BW, jnp.full_like(commitment, commitment_weight)))
        updates, generator_opt = self.generator_optimizer.update(grads, state["generator_opt"], state["generator"])
        new_state = {
            "step": state["step"] + 1,
            "generator": optax.apply_updates(state["generator"], updates),
            "codebooks": quantized.codebooks,
            "discriminator": discriminator,
            "generator_opt": generator_opt,
            "discriminator_opt": discriminator_opt,
        }
        total = loss + deception_loss + commitment_weight * commitment
        metrics = {"loss": total, **metrics, **more_metrics, "commitment": commitment}
        for level in range(self.model.num_quantizers):
            metrics[f"perplexity_{level}"] = quantized.perplexity_Q[level]
            metrics[f"dead_codes_{level}"] = quantized.dead_Q[level]
        metrics["gradient_norm"] = optax.tree.norm(grads)
        return new_state, metrics

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
