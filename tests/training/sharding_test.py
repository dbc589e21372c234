"""Meshes and partition specs: every parameter lands where the rules say."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from audiolm_jax.compile import WORTH_CUTTING
from audiolm_jax.config import language_model_config, load_config
from audiolm_jax.errors import UserError
from audiolm_jax.training import sharding
from audiolm_jax.training.registry import build_objective
from audiolm_jax.training.step import initial_state
from tests import tiny


def test_golden_specs_of_a_language_model():
    objective = build_objective(language_model_config("coarse"))
    abstract = jax.eval_shape(objective.init, jax.random.key(0))
    mesh = AbstractMesh((2, 4, 2), sharding.MESH_AXES)
    specs = jax.tree.map(lambda place: place.spec, sharding.state_shardings(abstract, mesh))
    attention = {
        "query": PartitionSpec(None, "fsdp", "tensor", None),
        "key": PartitionSpec(None, "fsdp", "tensor", None),
        "value": PartitionSpec(None, "fsdp", "tensor", None),
        "out": PartitionSpec(None, "tensor", None, "fsdp"),
    }
    expected = {
        "embedding": {"embedding": PartitionSpec("tensor", "fsdp")},
        "final_norm": {"scale": PartitionSpec("fsdp")},
        "head": PartitionSpec("fsdp", "tensor"),
        "position_bias": PartitionSpec(None, "tensor"),
        "layers": {
            "attention": attention,
            "attention_norm": {"scale": PartitionSpec(None, "fsdp")},
            "mlp": {"wide": PartitionSpec(None, "fsdp", "tensor"), "narrow": PartitionSpec(None, "tensor", "fsdp")},
            "mlp_norm": {"scale": PartitionSpec(None, "fsdp")},
        },
    }
    assert specs["params"] == expected
    moments = [leaf for leaf in jax.tree.leaves(specs["opt_state"]) if leaf != PartitionSpec()]
    assert sorted(map(str, moments)) == sorted(2 * list(map(str, jax.tree.leaves(expected))))


@pytest.mark.parametrize(
    ("name", "fsdp", "tensor"), [("w2v_bert_xl", 16, 1), ("w2v_bert_xl", 4, 4), ("soundstream_base", 16, 1)]
)
def test_nothing_large_of_the_tokenizers_stays_whole(name, fsdp, tensor):
    config = load_config(name)
    objective = build_objective(config)
    abstract = jax.eval_shape(objective.init, jax.random.key(0))
    places = sharding.state_shardings(abstract, AbstractMesh((1, fsdp, tensor), sharding.MESH_AXES))
    leaves = jax.tree_util.tree_leaves_with_path(sharding.unbox(abstract))
    whole = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.size
        for (path, leaf), place in zip(leaves, jax.tree.leaves(places), strict=True)
        if place.spec == PartitionSpec() or not any(place.spec)
    }
    # Codebooks are small and every device reads all of them; a discriminator's kernels of one channel cannot be cut.
    large = {name for name, size in whole.items() if size * 4 >= WORTH_CUTTING}
    assert large == ({f"codebooks/{name}" for name in ("embedding", "embedding_sum")} if "sound" in name else set())


def test_golden_specs_of_a_conformer_block():
    abstract = jax.eval_shape(build_objective(load_config("w2v_bert_xl")).init, jax.random.key(0))
    mesh = AbstractMesh((2, 4, 2), sharding.MESH_AXES)
    specs = jax.tree.map(lambda place: place.spec, sharding.state_shardings(abstract, mesh)["params"])
    block = specs["contrastive"]["layers"]
    for name in ("query", "key", "value", "position"):
        assert block["attention"][name]["kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert block["attention"]["out"]["kernel"] == PartitionSpec(None, "tensor", "fsdp")
    for mlp in ("first_mlp", "last_mlp"):
        assert block[mlp]["wide"]["kernel"] == PartitionSpec(None, "fsdp", "tensor")
        assert block[mlp]["narrow"]["kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert block["convolution"]["value"]["kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert block["convolution"]["depthwise"] == PartitionSpec(None, None, "fsdp")
    assert specs["quantizer"]["codebook"] == PartitionSpec("tensor", "fsdp")


def test_golden_specs_of_adafactor_s_statistics():
    config = language_model_config("coarse")
    config.optimizer.name = "adafactor"
    abstract = jax.eval_shape(build_objective(config).init, jax.random.key(0))
    mesh = AbstractMesh((2, 4, 2), sharding.MESH_AXES)
    specs = jax.tree.map(lambda place: place.spec, sharding.state_shardings(abstract, mesh)["opt_state"])
    rows, columns = (optax.tree_utils.tree_get(specs, name)["layers"] for name in ("v_row", "v_col"))
    # [layers, embed, mlp]: rows keep the narrower axis, columns the wider one.
    assert rows["mlp"]["wide"] == PartitionSpec(None, "fsdp")
    assert columns["mlp"]["wide"] == PartitionSpec(None, "tensor")
    assert rows["mlp"]["narrow"] == PartitionSpec(None, "fsdp")
    assert columns["mlp"]["narrow"] == PartitionSpec(None, "tensor")
    # Heads of 64 are too narrow to factor: the statistics are the whole parameter's.
    whole = optax.tree_utils.tree_get(specs, "v")["layers"]["attention"]
    assert whole["query"] == PartitionSpec(None, "fsdp", "tensor", None)
    assert rows["attention"]["query"] == PartitionSpec()


def test_moving_averages_lie_where_their_parameters_do():
    config = language_model_config("coarse")
    config.ema_decay = 0.999
    mesh = AbstractMesh((2, 4, 2), sharding.MESH_AXES)
    abstract = jax.eval_shape(
        lambda key: initial_state(build_objective(config), config.ema_decay, key), jax.random.key(0)
    )
    specs = jax.tree.map(lambda place: place.spec, sharding.state_shardings(abstract, mesh))
    assert specs["ema"]["params"] == specs["params"]


def test_rows_of_each_process_follow_from_the_mesh():
    mesh = sharding.make_mesh(ml_collections.ConfigDict({"data": -1, "fsdp": 1, "tensor": 1}))
    assert sharding.process_rows(mesh, 6).tolist() == list(range(6))


def test_batch_that_the_mesh_or_the_microbatches_do_not_divide():
    config = tiny.config_of("coarse", batch_size=12)
    sharding.check_batch(config, AbstractMesh((2, 3, 1), sharding.MESH_AXES))
    with pytest.raises(UserError, match="batch_size=12 is not divided by mesh.data x mesh.fsdp = 8: "):
        sharding.check_batch(config, AbstractMesh((4, 2, 1), sharding.MESH_AXES))
    config.accumulation_steps = 4
    with pytest.raises(UserError, match="times accumulation_steps = 4"):
        sharding.check_batch(config, AbstractMesh((2, 1, 1), sharding.MESH_AXES))


@pytest.mark.parametrize("objective", tiny.OVERRIDES)
def test_every_axis_name_has_a_rule(objective):
    abstract = jax.eval_shape(build_objective(tiny.config_of(objective)).init, jax.random.key(0))
    places = sharding.state_shardings(abstract, AbstractMesh((1, 1, 1), sharding.MESH_AXES))
    assert len(jax.tree.leaves(places)) == len(jax.tree.leaves(abstract))


def test_misspelt_axis_name_is_an_error():
    boxed = {"kernel": nn.LogicallyPartitioned(jnp.zeros((4, 4)), ("embed", "mpl"))}
    with pytest.raises(KeyError, match="mpl"):
        sharding.state_shardings(boxed, AbstractMesh((1, 1, 1), sharding.MESH_AXES))


def test_axis_that_does_not_divide_is_named():
    boxed = {"kernel": nn.LogicallyPartitioned(jnp.zeros((6, 4)), ("heads", "embed"))}
    with pytest.raises(UserError, match="mesh does not divide the axis 'heads' of length 6: config.mesh.tensor=4"):
        sharding.state_shardings(boxed, AbstractMesh((1, 1, 4), sharding.MESH_AXES))


def test_single_channel_convolution_stays_whole():
    boxed = nn.LogicallyPartitioned(jnp.zeros((7, 16, 1)), (None, "conv_in", "conv_out"))
    mesh = AbstractMesh((1, 4, 1), sharding.MESH_AXES)
    assert sharding.state_shardings(boxed, mesh).spec == PartitionSpec(None, None, None)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"data": 3, "fsdp": 1, "tensor": 1}, "mesh does not divide the 1 devices"),
        ({"data": -1, "fsdp": -1, "tensor": 1}, "at most one of them -1"),
        ({"data": 0, "fsdp": 1, "tensor": 1}, "1 or more"),
        ({"data": -1, "fsdp": 1, "tensor": 2}, "mesh does not divide"),
    ],
)
def test_impossible_meshes(mesh, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(ml_collections.ConfigDict(mesh))
