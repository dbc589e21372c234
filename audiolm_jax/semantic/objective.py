"""w2v-BERT's training objective: contrastive, masked-prediction and diversity losses (arXiv 2108.06209 §3.3).

Shape suffixes: B batch, W waveform samples, T frames, M mel bands, K codes, X distractors.
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import ml_collections
import optax

from audiolm_jax.errors import UserError
from audiolm_jax.objective import Batch, Metrics, Objective, State, Totals, sum_over_blocks
from audiolm_jax.semantic import features, health, masking
from audiolm_jax.semantic.blocks import check_heads
from audiolm_jax.semantic.conformer import REMAT_POLICIES
from audiolm_jax.semantic.w2v_bert import Predictions, W2vBert, W2vBertConfig


def w2v_bert_objective(config: ml_collections.ConfigDict, optimizer: optax.GradientTransformation) -> Objective:
    """The objective of a `w2v_bert_config`.

    A batch is {"wave_BW": float32, "lengths_B": int32 samples of each row}; a row of length 0 counts for nothing. The
    state holds `step`, `params`, `statistics` (of the features, constant after `warm_start`) and `opt_state`.

    Raises:
      UserError: fields of `config.model` that contradict each other.
    """
    model = W2vBertConfig(**config.model.to_dict())
    _check(model)
    training = _Training(config, model, optimizer)
    return Objective(
        init=training.init,
        step=training.step,
        eval_step=training.eval_step,
        weights=lambda state: {"params": state["params"], "statistics": state["statistics"]},
        warm_start=training.warm_start,
        warm_start_batches=config.statistics_batches,
        symptoms=health.symptoms(model.codebook_size),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Training:
    """The parts of w2v-BERT's training and the functions of its `Objective`."""

    config: ml_collections.ConfigDict
    model: W2vBertConfig
    optimizer: optax.GradientTransformation

    @property
    def network(self) -> W2vBert:
        return W2vBert(self.model)

    def init(self, key: jax.Array) -> State:
        mel_BTM = jnp.zeros((1, features.MELS_PER_FRAME, self.model.num_mels))
        frame_BT = jnp.ones((1, 1), bool)
        keys = {"params": key, "noise": key}
        variables = self.network.init(keys, mel_BTM, frame_BT, frame_BT, 1.0, deterministic=True)
        return {
            "step": jnp.zeros((), jnp.int32),
            "params": variables["params"],
            "statistics": features.initial_statistics(self.model.num_mels),
            "opt_state": self.optimizer.init(variables["params"]),
        }

    def warm_start(self, state: State, batches: Iterable[Batch], key: jax.Array) -> State:
        del key  # Statistics draw nothing.
        statistics = features.fit_statistics(batches, self.model.sample_rate, self.model.num_mels)
        return {**state, "statistics": statistics}

    def predict(self, params, statistics, batch: Batch, key: jax.Array, temperature, deterministic: bool) -> Totals:
        """Masks the batch, runs the model, and sums the losses over the masked frames."""
        span_key, noise_key, gumbel_key, dropout_key, distractor_key = jax.random.split(key, 5)
        wave_BW, lengths_B = batch["wave_BW"], batch["lengths_B"]
        mel_BTM = features.log_mel(wave_BW, lengths_B, self.model.sample_rate, self.model.num_mels)
        mel_BTM = features.normalize(mel_BTM, statistics)
        frames_B = features.num_frames(lengths_B, self.model.sample_rate)
        mask_BT = features.length_mask(frames_B, mel_BTM.shape[1] // features.MELS_PER_FRAME)
        spans_BT = masking.span_mask(span_key, frames_B, mask_BT.shape[1], **self.config.masking)
        keys = {"noise": noise_key, "gumbel": gumbel_key, "dropout": dropout_key}
        variables = {"params": params}
        predictions = self.network.apply(variables, mel_BTM, mask_BT, spans_BT, temperature, deterministic, rngs=keys)
        distractors_BTX = masking.sample_distractors(distractor_key, spans_BT, self.config.loss.num_distractors)
        totals = contrastive_totals(predictions, spans_BT, distractors_BTX, self.config.loss.contrastive_temperature)

        def masked(predicted_BTD, targets_BT, spans_BT) -> Totals:
            logits_BTK = self.network.apply(variables, predicted_BTD, method="logits")
            return masked_totals(logits_BTK, targets_BT, spans_BT)

        arrays = predictions.predicted_BTD, predictions.targets_BT, spans_BT
        totals.update(sum_over_blocks(masked, self.model.block_positions, *arrays))
        totals["code_usage"] = (predictions.usage_K, jnp.sum(mask_BT))
        return totals

    def loss_terms(self, totals: Totals) -> Metrics:
        """The loss and its parts, from the sums of `predict`."""
        means = {name: mean(*totals[name]) for name in totals}
        perplexity = jnp.exp(entropy(means["code_usage"]))
        diversity = 1.0 - perplexity / self.model.codebook_size
        loss = (
            self.config.loss.contrastive_weight * means["contrastive"]
            + self.config.loss.masked_weight * means["masked"]
            + self.config.loss.diversity_weight * diversity
        )
        metrics = {name: means[name] for name in ("contrastive", "masked", "contrastive_accuracy", "masked_accuracy")}
        target_perplexity = jnp.exp(entropy(means["target_histogram"]))
        metrics.update(diversity=diversity, codebook_perplexity=perplexity, target_perplexity=target_perplexity)
        return {"loss": loss, **metrics}

    def step(self, state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        temperature = gumbel_temperature(state["step"], self.config.loss)

        def loss_function(params):
            totals = self.predict(params, state["statistics"], batch, key, temperature, deterministic=False)
            metrics = self.loss_terms(totals)
            return metrics["loss"], metrics

        gradients, metrics = jax.grad(loss_function, has_aux=True)(state["params"])
        updates, opt_state = self.optimizer.update(gradients, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics["gumbel_temperature"] = temperature
        return {**state, "step": state["step"] + 1, "params": params, "opt_state": opt_state}, metrics

    def eval_step(self, state: State, batch: Batch, key: jax.Array) -> Totals:
        """Sums over the batch's masked frames; `target_histogram` and `code_usage` are vectors over the codes."""
        batch = {**batch, "lengths_B": jnp.where(batch["valid_B"] > 0, batch["lengths_B"], 0)}
        temperature = gumbel_temperature(state["step"], self.config.loss)
        totals = self.predict(state["params"], state["statistics"], batch, key, temperature, deterministic=True)
        terms, num_masked = self.loss_terms(totals), totals["masked"][1]
        return {**totals, **{name: (terms[name] * num_masked, num_masked) for name in ("loss", "diversity")}}


def _check(model: W2vBertConfig):
    check_heads(model.embed_dim, model.num_heads)
    if not 0 <= model.default_layer <= model.num_layers:
        where = f"config.model.default_layer={model.default_layer}"
        raise UserError("no such layer", where, f"choose 0 to {model.num_layers}")
    if model.remat != "none" and model.remat not in REMAT_POLICIES:
        known = ", ".join(("none", *REMAT_POLICIES))
        raise UserError("unknown remat policy", f"config.model.remat={model.remat}", f"use one of {known}")


def contrastive_totals(
    predictions: Predictions, spans_BT: jax.Array, distractors_BTX: jax.Array, temperature: float
) -> Totals:
    """InfoNCE over cosine similarities between each masked frame's context and code vectors.

    A distractor of the same code as the frame's own is no distractor and drops out, as in wav2vec 2.0's
    reference code; a frame that is left with none counts for nothing, so that a collapsed codebook earns nothing.
    """
    context_BTG, quantized_BTG = unit_length(predictions.context_BTG), unit_length(predictions.quantized_BTG)
    similarity_BTS = jnp.einsum("BTG,BSG->BTS", context_BTG, quantized_BTG) / temperature
    positive_BT1 = jnp.diagonal(similarity_BTS, axis1=1, axis2=2)[..., None]
    negative_BTX = jnp.take_along_axis(similarity_BTS, distractors_BTX, axis=2)
    codes_BTX = jnp.take_along_axis(predictions.selected_BT[:, None], distractors_BTX, axis=2)
    differs_BTX = codes_BTX != predictions.selected_BT[..., None]
    negative_BTX = jnp.where(differs_BTX, negative_BTX, -jnp.inf)
    losses_BT = jax.nn.logsumexp(jnp.concatenate([positive_BT1, negative_BTX], axis=-1), axis=-1) - positive_BT1[..., 0]
    found_BT = positive_BT1[..., 0] > jnp.max(negative_BTX, axis=-1)
    counted_BT = spans_BT & jnp.any(differs_BTX, axis=-1)
    count = jnp.sum(counted_BT)
    return {
        "contrastive": (jnp.sum(losses_BT, where=counted_BT), count),
        "contrastive_accuracy": (jnp.sum(found_BT, where=counted_BT, dtype=jnp.float32), count),
    }


def masked_totals(logits_BTK: jax.Array, targets_BT: jax.Array, spans_BT: jax.Array) -> Totals:
    """Cross-entropy and accuracy of naming the masked frames' codes, and how often each code was the target."""
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTK, targets_BT)
    right_BT = jnp.argmax(logits_BTK, axis=-1) == targets_BT
    one_hot_BTK = jax.nn.one_hot(targets_BT, logits_BTK.shape[-1])
    count = jnp.sum(spans_BT)
    return {
        "masked": (jnp.sum(losses_BT, where=spans_BT), count),
        "masked_accuracy": (jnp.sum(right_BT, where=spans_BT, dtype=jnp.float32), count),
        "target_histogram": (jnp.sum(one_hot_BTK, axis=(0, 1), where=spans_BT[..., None]), count),
    }


def gumbel_temperature(step: jax.Array, loss_config: ml_collections.ConfigDict) -> jax.Array:
    """Decays geometrically from `gumbel_start`, not below `gumbel_end` (arXiv 2006.11477 §4.2)."""
    decayed = loss_config.gumbel_start * loss_config.gumbel_decay ** step.astype(jnp.float32)
    return jnp.maximum(decayed, loss_config.gumbel_end)


def mean(total: jax.Array, count: jax.Array) -> jax.Array:
    """total / count, 0 of nothing."""
    return total / jnp.maximum(count, 1)


def entropy(probabilities_K: jax.Array) -> jax.Array:
    """Entropy in nats; its gradient is finite where a probability is 0."""
    return -jnp.sum(probabilities_K * jnp.log(jnp.maximum(probabilities_K, 1e-9)))


def unit_length(x: jax.Array) -> jax.Array:
    """Vectors along the last axis scaled to length 1, zeros to nearly 0 with finite gradients."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-8)
