"""Training the classifier: cross-entropy of the labels of one-second crops.

Shape suffixes: B batch, W waveform samples, T frames, M mel bands, K labels.
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import ml_collections
import optax

from audiolm_jax.classifier.network import ClassifierConfig, ClassifierNetwork
from audiolm_jax.errors import UserError
from audiolm_jax.objective import Batch, Metrics, Objective, State, Totals
from audiolm_jax.semantic import features


def classifier_objective(config: ml_collections.ConfigDict, optimizer: optax.GradientTransformation) -> Objective:
    """The objective of a `classifier_config`.

    A batch is {"wave_BW": float32, "lengths_B": int32 samples of each row, "labels_B": int32 indices into
    `config.model.labels`}; a row of length 0 counts for nothing. The state holds `step`, `params`, `batch_stats` (of
    the batch normalisation: moving averages, over all devices), `statistics` (of the features, constant after
    `warm_start`) and `opt_state`.

    Raises:
      UserError: fields of `config.model` that no network has.
    """
    model = ClassifierConfig(**config.model.to_dict())
    if not model.channels or min(model.channels) < 1:
        raise UserError("channels must be 1 or more", f"config.model.channels={model.channels}", "change them")
    training = _Training(model, optimizer)
    return Objective(
        init=training.init,
        step=training.step,
        eval_step=training.eval_step,
        weights=lambda state: {name: state[name] for name in ("params", "batch_stats", "statistics")},
        warm_start=training.warm_start,
        warm_start_batches=config.statistics_batches,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Training:
    """The functions of the classifier's `Objective`."""

    model: ClassifierConfig
    optimizer: optax.GradientTransformation

    def init(self, key: jax.Array) -> State:
        mel_BTM = jnp.zeros((1, 1, self.model.num_mels))
        variables = ClassifierNetwork(self.model).init(key, mel_BTM, jnp.ones((1, 1), bool), train=False)
        return {
            "step": jnp.zeros((), jnp.int32),
            "params": variables["params"],
            "batch_stats": variables["batch_stats"],
            "statistics": features.initial_statistics(self.model.num_mels),
            "opt_state": self.optimizer.init(variables["params"]),
        }

    def warm_start(self, state: State, batches: Iterable[Batch], key: jax.Array) -> State:
        del key  # Statistics draw nothing.
        return {**state, "statistics": features.fit_statistics(batches, self.model.sample_rate, self.model.num_mels)}

    def step(self, state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        del key  # Nothing is drawn.

        def loss_function(params):
            weights = {**state, "params": params}
            logits_BK, batch_stats = classify(self.model, weights, batch["wave_BW"], batch["lengths_B"], train=True)
            totals = label_totals(logits_BK, batch["labels_B"], batch["lengths_B"] > 0)
            means = {name: total / jnp.maximum(count, 1) for name, (total, count) in totals.items()}
            return means["loss"], (means, batch_stats)

        gradients, (metrics, batch_stats) = jax.grad(loss_function, has_aux=True)(state["params"])
        updates, opt_state = self.optimizer.update(gradients, state["opt_state"], state["params"])
        changed = {
            "step": state["step"] + 1,
            "params": optax.apply_updates(state["params"], updates),
            "batch_stats": batch_stats,
            "opt_state": opt_state,
        }
        return {**state, **changed}, metrics

    def eval_step(self, state: State, batch: Batch, key: jax.Array) -> Totals:
        del key
        logits_BK, _ = classify(self.model, state, batch["wave_BW"], batch["lengths_B"], train=False)
        return label_totals(logits_BK, batch["labels_B"], (batch["valid_B"] > 0) & (batch["lengths_B"] > 0))


def classify(
    model: ClassifierConfig, weights: State, wave_BW: jax.Array, lengths_B: jax.Array, train: bool
) -> tuple[jax.Array, State]:
    """Logits [B, K] of clips, and the batch normalisation's statistics: with `train` those that the batch moved.

    Args:
      model: of the network.
      weights: `params`, `batch_stats` and `statistics`.
      wave_BW: clips.
      lengths_B: samples of each row; what lies beyond them does not matter.
      train: normalise by the batch's own statistics.
    """
    mel_BTM = features.log_mel(wave_BW, lengths_B, model.sample_rate, model.num_mels)
    mel_BTM = features.normalize(mel_BTM, weights["statistics"])
    mask_BT = features.length_mask(-(-lengths_B // (model.sample_rate // 100)), mel_BTM.shape[1])
    variables = {"params": weights["params"], "batch_stats": weights["batch_stats"]}
    logits_BK, moved = ClassifierNetwork(model).apply(variables, mel_BTM, mask_BT, train, mutable=["batch_stats"])
    return logits_BK, moved["batch_stats"]


def label_totals(logits_BK: jax.Array, labels_B: jax.Array, counts_B: jax.Array) -> Totals:
    """Cross-entropy and accuracy, summed over the rows that count."""
    losses_B = optax.softmax_cross_entropy_with_integer_labels(logits_BK, labels_B)
    right_B = jnp.argmax(logits_BK, axis=-1) == labels_B
    count = jnp.sum(counts_B)
    return {
        "loss": (jnp.sum(losses_B, where=counts_B), count),
        "accuracy": (jnp.sum(right_B, where=counts_B, dtype=jnp.float32), count),
    }
