"""Grain and seqio: the same examples of a record in an epoch, the same members of a mixture at the same rates."""

import collections
import hashlib
import itertools

import numpy as np
import pytest
import scipy.stats
import seqio

from audiolm_jax import config as configs
from audiolm_jax.data import tasks
from audiolm_jax.data.token_dataset import TokenDataset
from audiolm_jax.errors import UserError
from audiolm_jax.lm.objective import stage_from_config
from audiolm_jax.training.registry import build_input
from tests import tiny
from tests.data.pipeline_test import METADATA
from tests.training import tokens

SEED, EPOCHS, RECORDS = 3, 3, 20


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two token datasets of the same tokenizers."""
    return [str(tokens.write(tmp_path_factory.mktemp("data") / "tokens", METADATA, seed)) for seed in (0, 1)]


def register(folder, name, **fields):
    """A recipe file, registered; its config and what seqio has of it."""
    config = tiny.config_of(name.split("_")[0], batch_size=4, seed=SEED, **fields)
    recipe = folder / f"{name}.json"
    recipe.write_text(configs.to_json(config))
    tasks.register(str(recipe))
    return config, seqio.get_mixture_or_task(f"audiolm_{name}")


def key(example):
    """An example as something that can be counted; equal only bit for bit."""
    return tuple((name, np.asarray(example[name]).tobytes()) for name in sorted(example))


def grain_examples(config, count):
    batches = build_input(config, print).training(np.arange(4))
    rows = ({name: array[row] for name, array in batch.items()} for batch in batches for row in range(4))
    return list(itertools.islice(rows, count))


def expected(record, stage, epoch):
    """The example of a record in an epoch, in plain words."""
    digest = hashlib.blake2b(b"%d/%d/%s" % (SEED, epoch, record["id"]), digest_size=8).digest()
    frames, crop = len(record["semantic"]), round(stage.crop_seconds * 25)
    start = int.from_bytes(digest, "little") * max(1, frames - crop + 1) // 2**64
    at_end = start + crop >= frames
    sequence, loss_start = stage.sequence(
        record["semantic"][start : start + crop], record["acoustic"][2 * start : 2 * (start + crop)], at_end
    )
    padding = np.zeros(stage.sequence_length + 1 - len(sequence), np.int32)
    padded = np.concatenate([sequence, padding])
    places = np.arange(stage.sequence_length)
    return {
        "decoder_input_tokens": np.where(places < len(sequence) - 1, padded[:-1], 0),
        "decoder_target_tokens": padded[1:],
        "decoder_loss_weights": ((places >= loss_start - 1) & (places < len(sequence) - 1)).astype(np.float32),
    }


@pytest.mark.parametrize("name", ["semantic_alone", "coarse_alone", "fine_alone"])
def test_both_give_the_same_example_of_a_record_in_an_epoch(name, folders, tmp_path):
    config, task = register(tmp_path, name, data_dir=folders[0])
    stage = stage_from_config(config)
    source = TokenDataset(folders[0]).source("train")
    records = [source[index] for index in range(RECORDS)]
    assert max(len(record["semantic"]) for record in records) > stage.crop_frames
    wanted = [[key(expected(record, stage, epoch)) for record in records] for epoch in range(EPOCHS)]
    assert len(set(itertools.chain(*wanted))) > RECORDS + 10
    in_order = task.get_dataset(split="train", shuffle=False, num_epochs=EPOCHS)
    assert [key(example) for example in in_order.as_numpy_iterator()] == list(itertools.chain(*wanted))
    ours = [key(example) for example in grain_examples(config, EPOCHS * RECORDS)]
    for epoch in range(EPOCHS):
        ours_then = ours[epoch * RECORDS : (epoch + 1) * RECORDS]
        assert ours_then != wanted[epoch] and sorted(ours_then) == sorted(wanted[epoch])


def test_both_give_the_same_packed_rows_shuffled_and_in_shards(folders, tmp_path):
    config, task = register(tmp_path, "semantic_packed", data_dir=folders[0], packing=True)
    rows = task.num_input_examples("train")
    assert rows < RECORDS
    ours = collections.Counter(key(example) for example in grain_examples(config, EPOCHS * rows))
    shuffled = task.get_dataset(split="train", shuffle=True, seed=1, num_epochs=EPOCHS)
    assert collections.Counter(map(key, shuffled.as_numpy_iterator())) == ours
    # Shards of two rows and of one.
    shards = [
        task.get_dataset(split="train", shuffle=False, num_epochs=EPOCHS, shard_info=seqio.ShardInfo(index, rows - 1))
        for index in range(rows - 1)
    ]
    examples = [list(map(key, shard.as_numpy_iterator())) for shard in shards]
    assert [len(shard) for shard in examples] == [2 * EPOCHS] + [EPOCHS] * (rows - 2)
    assert collections.Counter(itertools.chain(*examples)) == ours


def test_both_hold_out_everything_once(folders, tmp_path):
    config, task = register(tmp_path, "fine_held_out", data_dir=folders[0], packing=True)
    ours = [
        key({name: array[row] for name, array in batch.items() if name != "valid_B"})
        for batch in build_input(config, print).evaluation(np.arange(4))
        for row in np.flatnonzero(batch["valid_B"])
    ]
    theirs = [key(example) for example in task.get_dataset(split="validation", shuffle=False).as_numpy_iterator()]
    # Records of 30, 37, 44 and 51 frames in windows of 25.
    assert theirs == ours and len(ours) == 2 + 2 + 2 + 3


def test_a_mixture_has_the_same_members_and_rates(folders, tmp_path):
    fields = {"mixture.data_dirs": tuple(folders), "mixture.rates": (3, 1.5), "stage.crop_seconds": 30.0}
    config, mixture = register(tmp_path, "semantic_mixture", **fields)
    of_member = {}
    for number, folder in enumerate(folders):
        source = TokenDataset(folder).source("train")
        # Whole records: the same in every epoch.
        examples = [expected(source[index], stage_from_config(config), 0) for index in range(RECORDS)]
        of_member.update({key(example): number for example in examples})
    assert len(of_member) == 2 * RECORDS
    count = 450
    low, high = scipy.stats.binom.interval(0.99, count, 2 / 3)
    ours = [of_member[key(example)] for example in grain_examples(config, count)]
    dataset = seqio.get_dataset(
        mixture.name,
        task_feature_lengths={name: stage_from_config(config).sequence_length for name in mixture.output_features},
        dataset_split="train",
        num_epochs=None,
        shuffle=True,
        seed=5,
        feature_converter=seqio.PassThroughFeatureConverter(),
    )
    theirs = [of_member[key(example)] for example in dataset.take(count).as_numpy_iterator()]
    for members in (ours, theirs):
        assert low <= members.count(0) <= high
    assert ours.count(0) == count * 2 // 3


def test_a_recipe_of_recordings_is_refused():
    with pytest.raises(UserError, match="trains on recordings, not on tokens: soundstream_tiny"):
        tasks.register("soundstream_tiny")
