"""Parts and bundles: round trips, and everything that does not fit is refused by name."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

import audiolm_jax
from audiolm_jax import bundle
from audiolm_jax import config as configs
from audiolm_jax.errors import UserError
from audiolm_jax.parts import export, read_part, write_part
from audiolm_jax.training.checkpoint import Checkpoints
from audiolm_jax.training.registry import build_objective
from audiolm_jax.training.sharding import unbox
from audiolm_jax.training.step import initial_state
from tests import tiny

ROLES = ("codec", "semantic_tokenizer", *tiny.STAGES)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tiny.write_parts(tmp_path_factory.mktemp("parts"))


def sources(parts, **changed):
    return {role: parts[role] for role in ROLES} | changed


def test_export_round_trip(parts, tmp_path):
    part = read_part(parts["coarse"])
    write_part(tmp_path, part)
    again = read_part(tmp_path)
    assert again.fingerprint() == part.fingerprint() and again.settings == part.settings and again.config == part.config
    jax.tree.map(np.testing.assert_array_equal, again.weights, part.weights)


def test_an_exported_workdir_is_the_same_codec(tmp_path):
    config = tiny.config_of("soundstream", ema_decay=0.5, **{"model.snake": True, "model.codebook_dim": 2})
    state = unbox(jax.jit(functools.partial(initial_state, build_objective(config), 0.5))(jax.random.key(0)))
    with Checkpoints(epath.Path(tmp_path / "workdir"), 1, 0) as checkpoints:
        checkpoints.save(1, state, {}, {"config": config.to_dict(), "tokens": None}, None)
    export(tmp_path / "workdir", tmp_path / "exported")
    files = {path.name for path in (tmp_path / "exported").iterdir()}
    assert files == {"config.json", "model.safetensors", "training.safetensors"}
    discriminators = read_part(tmp_path / "exported", for_training=True).training["discriminator"]
    jax.tree.map(np.testing.assert_array_equal, discriminators, state["discriminator"])
    assert read_part(tmp_path / "exported").fingerprint() == read_part(tmp_path / "workdir").fingerprint()
    trained, exported = (audiolm_jax.load_codec(tmp_path / name) for name in ("workdir", "exported"))
    wave_BW = np.random.default_rng(0).uniform(-0.3, 0.3, (1, 3333)).astype(np.float32)
    codes_BTQ = trained.encode(wave_BW)
    assert len(np.unique(codes_BTQ)) > 2
    np.testing.assert_array_equal(exported.encode(wave_BW), codes_BTQ)
    np.testing.assert_array_equal(exported.decode(codes_BTQ), trained.decode(codes_BTQ))
    with pytest.raises(UserError, match="output already exists"):
        export(tmp_path / "workdir", tmp_path / "exported")


def test_a_part_may_carry_what_only_training_needs(parts, tmp_path):
    part = read_part(parts["codec"], for_training=True)
    assert part.training == {}
    objective = build_objective(part.config)
    state = unbox(jax.eval_shape(objective.init, jax.random.key(0)))
    generator = np.random.default_rng()
    shaped = lambda leaf: generator.standard_normal(leaf.shape).astype(np.float32)
    carrying = dataclasses.replace(part, training={"discriminator": jax.tree.map(shaped, state["discriminator"])})
    write_part(tmp_path, carrying)
    again = read_part(tmp_path, for_training=True)
    jax.tree.map(np.testing.assert_array_equal, again.training, carrying.training)
    assert read_part(tmp_path).training == {} and again.fingerprint() == part.fingerprint()
    assert set(again.weights_for(state, objective)) == {"generator", "codebooks", "discriminator"}
    # Without it, or with discriminators of another shape, they start afresh.
    assert set(part.weights_for(state, objective)) == {"generator", "codebooks"}
    part.config.discriminator.stft_channels *= 2
    other = build_objective(part.config)
    other_state = unbox(jax.eval_shape(other.init, jax.random.key(0)))
    assert set(again.weights_for(other_state, other)) == {"generator", "codebooks"}


def test_the_config_of_a_folder_can_be_trained(parts, tmp_path):
    folder = parts["codec"]
    config = read_part(folder).config
    tuned = configs.load_config(folder, ["--config.model.strides=(2,2)", f"--config.init_from={folder}"])
    changed = {"init_from": folder, "model.strides": (2, 2)}
    assert configs.flat(tuned) == {**configs.flat(config), **changed}
    (tmp_path / "config.json").write_text(configs.to_json(config))
    for path in (tmp_path, tmp_path / "config.json"):
        assert configs.flat(configs.load_config(str(path))) == configs.flat(config)


def test_fingerprint_tells_weights_and_architecture_apart(parts):
    part = read_part(parts["semantic"])
    before = part.fingerprint()
    part.weights["params"]["head"] = np.nextafter(part.weights["params"]["head"], np.float32(9))
    assert part.fingerprint() != before


def test_bundle_is_relocatable(parts, tmp_path):
    bundle.write_bundle(sources(parts), tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    model = audiolm_jax.load_bundle(tmp_path / "there")
    assert set(model.stages) == set(tiny.STAGES) and set(model.fingerprints) == set(ROLES)
    description = json.loads((tmp_path / "there" / "audiolm.json").read_text())
    assert description["parts"]["codec"]["fingerprint"] == read_part(parts["codec"]).fingerprint()
    assert sorted(path.suffix for path in (tmp_path / "there").rglob("*.*")) == [".json"] * 6 + [".safetensors"] * 5


def test_missing_and_changed_parts_are_named(parts, tmp_path):
    bundle.write_bundle(sources(parts), tmp_path / "b")
    shutil.copytree(tmp_path / "b", tmp_path / "lacking")
    shutil.rmtree(tmp_path / "lacking" / "coarse")
    with pytest.raises(UserError, match="bundle lacks its part coarse"):
        audiolm_jax.load_bundle(tmp_path / "lacking")
    part = read_part(parts["coarse"])
    part.weights["params"]["head"] += 1
    shutil.rmtree(tmp_path / "b" / "coarse")
    (tmp_path / "b" / "coarse").mkdir()
    write_part(tmp_path / "b" / "coarse", part)
    with pytest.raises(UserError, match="coarse is not the part that was bundled"):
        audiolm_jax.load_bundle(tmp_path / "b")
    with pytest.raises(UserError, match="not a bundle"):
        audiolm_jax.load_bundle(parts["codec"])


def test_fine_stage_may_not_be_left_out_where_it_is_needed(parts, tmp_path):
    with pytest.raises(UserError, match="part fine is missing: the coarse stage predicts 1 of 3 levels"):
        bundle.write_bundle(sources(parts, fine=None), tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("role", ["semantic_tokenizer", "semantic"])
def test_semantic_parts_may_not_be_left_out_where_they_are_needed(parts, tmp_path, role):
    with pytest.raises(UserError, match=f"part {role} is missing: .*; give --{role}=DIR"):
        bundle.write_bundle(sources(parts, **{role: None}), tmp_path / "b")
    # Nor may one of them, where there is the other.
    coarse = read_part(parts["coarse"])
    coarse.config.stage.semantic_condition = False
    (tmp_path / "coarse").mkdir()
    write_part(tmp_path / "coarse", coarse)
    with pytest.raises(UserError, match=f"part {role} is missing"):
        bundle.write_bundle(sources(parts, coarse=str(tmp_path / "coarse"), **{role: None}), tmp_path / "b")


def test_parts_that_do_not_fit_are_named(parts, tmp_path):
    other = read_part(parts["codec"])
    other.weights["codebooks"]["embedding"] = other.weights["codebooks"]["embedding"] + 1
    (tmp_path / "other").mkdir()
    write_part(tmp_path / "other", other)
    with pytest.raises(UserError, match="semantic does not fit: it was trained on tokens of another codec"):
        bundle.write_bundle(sources(parts, codec=str(tmp_path / "other")), tmp_path / "b")
    with pytest.raises(UserError, match="coarse is not a coarse but a fine"):
        bundle.write_bundle(sources(parts, coarse=parts["fine"]), tmp_path / "b")
    with pytest.raises(UserError, match="run `audiolm fit-kmeans` first"):
        bundle.write_bundle(sources(parts, semantic_tokenizer=parts["encoder"]), tmp_path / "b")
    wide = read_part(parts["coarse"])
    wide.config.stage.codebook_size = 32
    (tmp_path / "wide").mkdir()
    write_part(tmp_path / "wide", wide)
    with pytest.raises(UserError, match="coarse does not fit: its codebook_size is 32, not 16"):
        bundle.write_bundle(sources(parts, coarse=str(tmp_path / "wide")), tmp_path / "b")


def with_tensors(change):
    """Damage: the weights' file anew, after `change` to its dictionary."""

    def damage(folder):
        tensors = safetensors.numpy.load_file(folder / "model.safetensors")
        change(tensors)
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (with_tensors(lambda tensors: tensors.pop("codebooks/embedding")), "codebooks/embedding is missing"),
        (with_tensors(lambda tensors: tensors.update(more=np.ones(3))), "tensor more belongs to no layer"),
        (
            with_tensors(lambda tensors: tensors.update({"codebooks/cluster_size": np.ones(3)})),
            r"codebooks/cluster_size is \[3\], not \[3, 16\]",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"rubbish"), "part is damaged"),
        (lambda folder: (folder / "config.json").write_text("{"), "part is damaged"),
        (lambda folder: (folder / "config.json").unlink(), "part is damaged"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "hubert"}'),
            "format version none: not ours",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model here"),
    ],
)
def test_damaged_parts(parts, tmp_path, damage, message):
    folder = tmp_path / "part"
    shutil.copytree(parts["codec"], folder)
    damage(folder)
    with pytest.raises(UserError, match=message):
        audiolm_jax.load_codec(folder)


def test_output_that_exists_is_refused(parts, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "precious").touch()
    with pytest.raises(UserError, match="output already exists"):
        bundle.write_bundle(sources(parts), tmp_path / "b")
    assert (tmp_path / "b" / "precious").exists()


def test_encoder_without_clusters_gives_features_only(parts):
    encoder = audiolm_jax.load_semantic_tokenizer(parts["encoder"])
    wave_BW = np.random.default_rng(0).uniform(-0.1, 0.1, (1, 16000)).astype(np.float32)
    assert encoder.features(wave_BW, layer=1).shape == (1, 25, 8)
    with pytest.raises(UserError, match="fit-kmeans"):
        encoder.encode(wave_BW)
