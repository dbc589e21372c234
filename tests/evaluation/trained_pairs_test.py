"""Where the right answer is known, speech against the same speech with its pieces shuffled, a trained model finds it.

Its tokens are clusters of what an untrained encoder makes of the shipped recordings; its semantic stage is trained on
those for training, and judged on speakers and recordings that were held out.
"""

import json
import pathlib

import jax
import numpy as np
import optax
import pytest
from sklearn.cluster import KMeans

from audiolm_jax import bundle
from audiolm_jax.data import manifest, transforms
from audiolm_jax.evaluation.suites import Request, evaluate
from audiolm_jax.lm.objective import language_model_objective, stage_from_config
from audiolm_jax.parts import Part, write_part
from audiolm_jax.training.sharding import unbox
from tests import tiny
from tests.evaluation.pair_sets import RATE, write_sets

SAMPLES = pathlib.Path(__file__).resolve().parents[2] / "samples" / "manifest.jsonl"
# The input of the encoder's first block: untrained blocks only blur it.
LAYER = 0
CLUSTERS, STEPS, BATCH = 32, 300, 8
PIECE_SECONDS, CHUNK_SECONDS = 2.5, 0.12


def train_semantic(config, tokens) -> dict:
    """Parameters of the semantic stage after some steps on the tokens of recordings."""
    objective = language_model_objective(config, optax.adam(1e-2))
    stage, step = stage_from_config(config), jax.jit(objective.step)
    state = unbox(objective.init(jax.random.key(0)))
    generator = np.random.default_rng(0)
    records = [
        {"id": str(number).encode(), "semantic": z_T, "acoustic": np.zeros((0, tiny.LEVELS)), "is_end": True}
        for number, z_T in enumerate(tokens)
    ]
    for number in range(STEPS):
        chosen = generator.choice(len(records), BATCH)
        rows = [transforms.encode(transforms.crop(records[i], stage, 0, number), stage) for i in chosen]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        state, metrics = step(state, batch, jax.random.key(number))
    assert metrics["loss"] < 0.9 * np.log(CLUSTERS)
    return jax.tree.map(np.asarray, objective.weights(state))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    waves = [r.read(RATE) for r in manifest.read_manifest(SAMPLES) if r.split == "train"]
    encoder = tiny.part_of("w2v_bert")
    untrained = bundle.tokenizer_from_part(encoder)
    x_FD = np.concatenate([untrained.features(wave_W[None], layer=LAYER)[0] for wave_W in waves])
    mean_D, std_D = x_FD.mean(axis=0), x_FD.std(axis=0)
    centroids_KD = KMeans(CLUSTERS, n_init=1, random_state=0).fit((x_FD - mean_D) / std_D).cluster_centers_
    clusters = {"layer": LAYER, "mean": mean_D, "std": std_D, "centroids": centroids_KD.astype(np.float32)}
    parts = {"codec": tiny.codec_part(), "semantic_tokenizer": bundle.with_clusters(encoder, clusters)}
    tokenizer = bundle.tokenizer_from_part(parts["semantic_tokenizer"])
    tokens = {**{role: part.fingerprint() for role, part in parts.items()}, "mean_run_length": 1.5}
    for stage in tiny.STAGES:
        parts[stage] = tiny.part_of(stage, 0, {"tokens": tokens}, **{"stage.num_clusters": CLUSTERS})
    config = parts["semantic"].config
    weights = train_semantic(config, [tokenizer.encode(wave_W[None])[0] for wave_W in waves])
    parts["semantic"] = Part("semantic", config, weights, {"tokens": tokens})
    for role, part in parts.items():
        (folder / role).mkdir()
        write_part(folder / role, part)
    bundle.write_bundle({role: str(folder / role) for role in parts}, folder / "bundle")
    return folder / "bundle"


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Pieces of the recordings that were held out, and the same with their chunks in another order."""
    generator, pairs = np.random.default_rng(0), []
    size, chunk = round(PIECE_SECONDS * RATE), round(CHUNK_SECONDS * RATE)
    for recording in manifest.read_manifest(SAMPLES):
        if recording.split == "train":
            continue
        wave_W = recording.read(RATE)
        for start in range(0, len(wave_W) - size + 1, size):
            piece_W = wave_W[start : start + size]
            chunks = [piece_W[first : first + chunk] for first in range(0, size, chunk)]
            pairs.append((piece_W, np.concatenate([chunks[i] for i in generator.permutation(len(chunks))])))
    return write_sets(tmp_path_factory.mktemp("sets"), pairs)


@pytest.mark.slow
@pytest.mark.parametrize("suite", ("swuggy", "sblimp", "storycloze", "salmon"))
def test_speech_is_likelier_than_shuffled_speech(suite, trained, sets, tmp_path):
    evaluate(Request(suite, str(tmp_path / "out"), bundle=str(trained), data=str(sets[suite])))
    metrics = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    for name in ("all.normalized", "all.sum"):
        assert metrics[name]["count"] >= 15
        assert metrics[name]["low"] > 0.5, (name, metrics[name])
