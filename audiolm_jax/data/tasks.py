"""The recipes' training data as seqio Tasks and Mixtures, for T5X-style use; the only module that loads TensorFlow.

    from audiolm_jax.data import tasks

    tasks.register("coarse_librilight", ["--config.data_dir=runs/tokens"])
    dataset = seqio.get_mixture_or_task("audiolm_coarse_librilight").get_dataset(split="train", num_epochs=None)

Examples are those of `data.pipeline`, array for array, for the same record and epoch; their order, the shuffling and
which member of a mixture comes next are seqio's.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import seqio
import tensorflow as tf

from audiolm_jax.config import load_config
from audiolm_jax.data import transforms
from audiolm_jax.data.pipeline import Example, Member, open_members
from audiolm_jax.errors import UserError
from audiolm_jax.lm.objective import stage_from_config
from audiolm_jax.lm.stages import Stage


def register(recipe: str, overrides: Sequence[str] = ()) -> seqio.Task | seqio.Mixture:
    """Adds what `audiolm train --config=RECIPE OVERRIDES` trains on to seqio's registry, as `audiolm_RECIPE`.

    Where the config names a mixture, that is a Mixture of the Tasks `audiolm_RECIPE_0`, `audiolm_RECIPE_1`, …. In the
    split `train` is a random crop of each record in each epoch (with packing, rows of them), in `validation` all of it.

    Args:
      recipe: a language model's: the name of a shipped recipe, or a file.
      overrides: flags as given on the command line; `--config.data_dir=TOKENS` at least.

    Raises:
      UserError: a recipe, field or token dataset that `audiolm train` would refuse.
    """
    config = load_config(recipe, overrides)
    if "stage" not in config:
        raise UserError("trains on recordings, not on tokens", recipe, "name a language model's recipe")
    stage = stage_from_config(config)
    members = open_members(config, stage)
    name = f"audiolm_{pathlib.Path(recipe).stem}"
    if len(members) == 1:
        return _add_task(name, members[0], stage, config.packing)
    for number, member in enumerate(members):
        _add_task(f"{name}_{number}", member, stage, config.packing)
    rates = [(f"{name}_{number}", float(member.rate)) for number, member in enumerate(members)]
    return seqio.MixtureRegistry.add(name, rates)


def _add_task(name: str, member: Member, stage: Stage, packed: bool) -> seqio.Task:
    tokens = seqio.Feature(seqio.PassThroughVocabulary(stage.vocab_size), add_eos=False)
    features = {
        "decoder_input_tokens": tokens,
        "decoder_target_tokens": tokens,
        "decoder_loss_weights": seqio.ContinuousFeature(dtype=tf.float32),
    }
    if packed:
        # Held-out examples are alone in their rows.
        features["decoder_segment_ids"] = seqio.Feature(seqio.PassThroughVocabulary(0), add_eos=False, required=False)
    sizes = {"train": len(member.training), "validation": len(member.held_out)}
    sizes = {split: size for split, size in sizes.items() if size}
    return seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(functools.partial(_elements, sizes), tuple(sizes), sizes),
        preprocessors=[functools.partial(_examples, member=member, stage=stage)],
        output_features=features,
    )


def _elements(sizes: dict[str, int], split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    """Numbers of the elements of a split, as "index"; in training also their "order", from which epochs are told."""
    dataset = tf.data.Dataset.range(sizes[split])
    if shuffle_files:
        dataset = dataset.shuffle(sizes[split], seed=seed)
    if split == "train":
        return dataset.enumerate().map(lambda order, index: {"order": order, "index": index})
    return dataset.map(lambda index: {"index": index})


def _examples(dataset: tf.data.Dataset, member: Member, stage: Stage) -> tf.data.Dataset:
    """Numbers of elements, over any number of epochs -> examples."""

    def crop(index: int, epoch: int) -> list[Example]:
        return [member.training.example(index, epoch)]

    def windows(index: int) -> list[Example]:
        return [transforms.encode(window, stage) for window in transforms.windows(member.held_out[index], stage)]

    if "order" in dataset.element_spec:
        return _mapped(_with_epochs(dataset), crop, crop(0, 0)[0])
    return _mapped(dataset, windows, windows(0)[0])


def _with_epochs(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Tells epochs from "order": one begins where it, which grows within an epoch (of a shard, too), does not grow."""

    def count(before, element):
        last, epoch = before
        epoch += tf.cast(element["order"] <= last, tf.int64)
        return (element["order"], epoch), {"index": element["index"], "epoch": epoch}

    return dataset.scan((tf.constant(tf.int64.max, tf.int64), tf.constant(-1, tf.int64)), count)


def _mapped(dataset: tf.data.Dataset, function: Callable[..., list[Example]], like: Example) -> tf.data.Dataset:
    """The examples that a function in NumPy makes of the numbers in each element, all with the arrays of `like`."""

    def in_numpy(*numbers: np.ndarray) -> list[np.ndarray]:
        examples = function(**dict(zip(dataset.element_spec, map(int, numbers), strict=True)))
        return [np.stack([example[name] for example in examples]) for name in like]

    def in_graph(element: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        numbers = [element[name] for name in dataset.element_spec]
        arrays = tf.numpy_function(in_numpy, numbers, [array.dtype for array in like.values()])
        return {
            name: tf.ensure_shape(array, (None, *like[name].shape)) for name, array in zip(like, arrays, strict=True)
        }

    return dataset.map(in_graph, tf.data.AUTOTUNE, deterministic=True).unbatch()
