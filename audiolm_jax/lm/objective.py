"""Next-token prediction for one stage, as an `Objective`."""

import jax
import jax.numpy as jnp
import ml_collections
import optax

from audiolm_jax.lm.stages import EOS, Stage, make_stage
from audiolm_jax.lm.transformer import Transformer, TransformerConfig
from audiolm_jax.objective import Batch, Metrics, Objective, State, Totals, sum_over_blocks


def stage_from_config(config: ml_collections.ConfigDict) -> Stage:
    """The stage that a language model's config describes."""
    return make_stage(config.objective, **config.stage)


def transformer_from_config(config: ml_collections.ConfigDict) -> TransformerConfig:
    """The transformer that a language model's config describes."""
    return TransformerConfig(vocab_size=stage_from_config(config).vocab_size, **config.model)


def token_losses(logits_BTV: jax.Array, targets_BT: jax.Array, z_loss: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of each target and the z-loss z · log(Z)^2 that keeps logits small (T5X): two [B, T]."""
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return log_z_BT - target_BT, z_loss * jnp.square(log_z_BT)


def language_model_objective(config: ml_collections.ConfigDict, optimizer: optax.GradientTransformation) -> Objective:
    """The objective of a stage; batches are `data.transforms` examples.

    A batch holds `decoder_input_tokens`, `decoder_target_tokens` (int32 [B, T]), `decoder_loss_weights`
    (float32 [B, T]) and, with `config.packing`, `decoder_segment_ids` (int32 [B, T]). The loss is the mean over all
    weighted targets of the global batch, in however many microbatches (`config.accumulation_steps`) its gradient is
    summed up; evaluation leaves out the rows whose `valid_B` is 0.
    """
    stage = stage_from_config(config)
    model = Transformer(transformer_from_config(config))
    block_positions = model.config.block_positions

    def init(key: jax.Array) -> State:
        params = model.init(key, jnp.zeros((1, 8), jnp.int32))["params"]
        return {"step": jnp.int32(0), "params": params, "opt_state": optimizer.init(params)}

    def loss_function(params, batch: Batch, key: jax.Array, total_weight: jax.Array) -> tuple[jax.Array, Metrics]:
        """This microbatch's share of the batch's loss, and of its metrics."""
        hidden_BTD = model.apply(
            {"params": params},
            batch["decoder_input_tokens"],
            deterministic=False,
            segment_ids_BT=batch.get("decoder_segment_ids"),
            rngs={"dropout": key},
            method="hidden",
        )

        def share(hidden_BTD, targets_BT, weights_BT) -> tuple[jax.Array, Metrics]:
            logits_BTV = model.apply({"params": params}, hidden_BTD, method="logits")
            loss_BT, z_loss_BT = token_losses(logits_BTV, targets_BT, config.z_loss)
            loss, z_loss = jnp.sum(loss_BT * weights_BT), jnp.sum(z_loss_BT * weights_BT)
            correct_BT = (jnp.argmax(logits_BTV, axis=-1) == targets_BT) * weights_BT
            return loss + z_loss, {"loss": loss, "z_loss": z_loss, "accuracy": jnp.sum(correct_BT)}

        weights_BT = batch["decoder_loss_weights"] / total_weight
        return sum_over_blocks(share, block_positions, hidden_BTD, batch["decoder_target_tokens"], weights_BT)

    def gradients(params, batch: Batch, key: jax.Array):
        """Gradients of the whole batch's loss, and its metrics."""
        total_weight = jnp.maximum(jnp.sum(batch["decoder_loss_weights"]), 1.0)
        gradient = jax.grad(loss_function, has_aux=True)
        if config.accumulation_steps == 1:
            return gradient(params, batch, key, total_weight)

        def add(sums, inputs):
            index, microbatch = inputs
            share = gradient(params, microbatch, jax.random.fold_in(key, index), total_weight)
            return jax.tree.map(jnp.add, sums, share), None

        parts = microbatches(batch, config.accumulation_steps)
        first = jax.tree.map(lambda part: part[0], parts)
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, params, first, key, total_weight))
        return jax.lax.scan(add, zeros, (jnp.arange(config.accumulation_steps), parts))[0]

    def step(state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        grads, metrics = gradients(state["params"], batch, key)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics["gradient_norm"] = optax.tree.norm(grads)
        return {"step": state["step"] + 1, "params": params, "opt_state": opt_state}, metrics

    def eval_step(state: State, batch: Batch, key: jax.Array) -> Totals:
        del key
        variables = {"params": state["params"]}
        hidden_BTD = model.apply(variables, batch["decoder_input_tokens"], method="hidden")
        weights_BT = batch["decoder_loss_weights"] * batch["valid_B"][:, None]

        def totals(hidden_BTD, targets_BT, weights_BT) -> Totals:
            logits_BTV = model.apply(variables, hidden_BTD, method="logits")
            return evaluation_totals(stage, logits_BTV, targets_BT, weights_BT)

        return sum_over_blocks(totals, block_positions, hidden_BTD, batch["decoder_target_tokens"], weights_BT)

    return Objective(init=init, step=step, eval_step=eval_step, weights=lambda state: {"params": state["params"]})


def microbatches(batch: Batch, count: int) -> Batch:
    """[B, …] -> [count, B / count, …]; each takes every count-th row, so that on a mesh rows stay on their devices."""
    return {name: jnp.swapaxes(array.reshape(-1, count, *array.shape[1:]), 0, 1) for name, array in batch.items()}


def evaluation_totals(stage: Stage, logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> Totals:
    """Totals of the loss over weighted targets: of all, of each level's codes, and of the end tokens."""
    loss_BT = token_losses(logits_BTV, targets_BT)[0] * weights_BT
    correct_BT = (jnp.argmax(logits_BTV, axis=-1) == targets_BT) * weights_BT
    level_BT = (targets_BT - stage.target_offset) // stage.target.codebook_size
    code_BT = weights_BT * (targets_BT != EOS)
    in_level_QBT = (level_BT == jnp.arange(stage.target.num_levels)[:, None, None]) * code_BT
    end_BT = weights_BT * (targets_BT == EOS)
    return {
        "loss": (jnp.sum(loss_BT), jnp.sum(weights_BT)),
        "accuracy": (jnp.sum(correct_BT), jnp.sum(weights_BT)),
        "level_loss": (jnp.sum(loss_BT * in_level_QBT, axis=(1, 2)), jnp.sum(in_level_QBT, axis=(1, 2))),
        "end_loss": (jnp.sum(loss_BT * end_BT), jnp.sum(end_BT)),
    }
