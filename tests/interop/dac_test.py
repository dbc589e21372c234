"""DAC against transformers' DacModel: random weights of several sizes, saved as theirs and read as ours."""

import dataclasses

import jax
import numpy as np
import pytest
import safetensors.numpy

import audiolm_jax
from audiolm_jax import commands
from audiolm_jax.codec.codec import Codec
from audiolm_jax.codec.streaming import ChunkDecoder
from audiolm_jax.data import token_dataset, transforms
from audiolm_jax.errors import UserError
from audiolm_jax.interop.dac import part_from_huggingface
from audiolm_jax.lm.objective import stage_from_config
from audiolm_jax.parts import read_part, write_part
from audiolm_jax.training.registry import build_objective
from audiolm_jax.training.sharding import unbox
from tests import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# The published grids at 16 and 24 kHz (strides of which one is odd) and at 44.1 kHz, and one of odd strides only.
SIZES = {
    "16k": {"downsampling_ratios": [2, 4, 5, 8], "n_codebooks": tiny.LEVELS, "codebook_dim": 4},
    "44k": {"downsampling_ratios": [2, 4, 8, 8], "n_codebooks": 2, "sampling_rate": 44_100},
    "odd": {"downsampling_ratios": [3, 5], "n_codebooks": 4, "codebook_dim": 2, "sampling_rate": 24_000},
}
SPELLINGS = {"16k": "plain", "44k": "parametrizations", "odd": "weight_g"}


def random_model(size: str):
    """A DacModel in which every parameter counts and none drowns the signal or makes snakes chaotic.

    Its weights are normalised in one of PyTorch's spellings or not at all.
    """
    torch.manual_seed(0)
    config = transformers.DacConfig(
        encoder_hidden_size=2, decoder_hidden_size=48, codebook_size=tiny.CODES, **SIZES[size]
    )
    model = transformers.DacModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("alpha"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif "codebook" in name:
                parameter.normal_()
            else:
                # Of a transposed convolution's taps, two meet in a sample.
                fan_in = 2 * len(parameter) if "conv_t1" in name else parameter[0].numel()
                parameter.normal_(std=(0.2 if "res_unit" in name and "conv2" in name else 1.0) * fan_in**-0.5)
        model.decoder.tanh = torch.nn.Identity()
        loud = model.decode(audio_codes=torch.randint(tiny.CODES, (1, config.n_codebooks, 30))).audio_values
        model.decoder.conv2.weight.mul_(0.5 / loud.std())
        model.decoder.tanh = torch.nn.Tanh()
        if SPELLINGS[size] != "plain":
            model.apply_weight_norm()
            for name, parameter in model.named_parameters():
                if name.endswith("original0"):
                    parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.4))
        # Projections around zero, so that frames choose between all the codes.
        residual = model.encoder(torch.rand(1, 1, 100 * config.hop_length) - 0.5)
        for quantizer in model.quantizer.quantizers:
            quantizer.in_proj.bias.sub_(quantizer.in_proj(residual).mean(dim=(0, 2)))
            residual = residual - quantizer(residual)[0]
    return model


def save(model, folder, spelling: str):
    model.save_pretrained(folder)
    if spelling == "weight_g":
        path = folder / "model.safetensors"
        for old, new in (("original0", "weight_g"), ("original1", "weight_v")):
            tensors = safetensors.numpy.load_file(path)
            renamed = {name.replace(f"parametrizations.weight.{old}", new): array for name, array in tensors.items()}
            assert set(renamed) != set(tensors)
            safetensors.numpy.save_file(renamed, path)


@pytest.fixture(scope="module", params=list(SIZES))
def pair(request, tmp_path_factory):
    """(their model, our codec) of the same weights."""
    model, folder = random_model(request.param), tmp_path_factory.mktemp("dac")
    save(model, folder, SPELLINGS[request.param])
    part = part_from_huggingface(folder)
    return model, Codec.from_weights(part.config, part.weights)


def waves(batch, size, seed=0):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (batch, size)).astype(np.float32)


def theirs(model, wave_BW):
    """(features [B, T, D], codes [B, T, Q], waveform of the codes) of PyTorch's model."""
    with torch.no_grad():
        wave = torch.from_numpy(wave_BW)[:, None]
        features = model.encoder(wave).transpose(1, 2)
        codes = model.encode(wave).audio_codes
        return features.numpy(), codes.transpose(1, 2).numpy(), model.decode(audio_codes=codes).audio_values.numpy()


def margins(model, features_BTD, codes_BTQ):
    """By how much the chosen code beats the second at each level, in cosine."""
    residual, found = torch.from_numpy(features_BTD).transpose(1, 2), []
    for quantizer, codes_BT in zip(model.quantizer.quantizers, np.moveaxis(codes_BTQ, -1, 0), strict=True):
        with torch.no_grad():
            normalise = torch.nn.functional.normalize
            directions = normalise(quantizer.in_proj(residual).transpose(1, 2), dim=-1)
            best = torch.topk(directions @ normalise(quantizer.codebook.weight, dim=-1).T, 2).values
            found.append((best[..., 0] - best[..., 1]).numpy())
            codes = torch.from_numpy(codes_BT)
            residual = residual - quantizer.out_proj(quantizer.codebook(codes).transpose(1, 2))
    return np.stack(found, axis=-1)


@pytest.mark.parametrize(("batch", "frames", "more"), [(1, 16, 0), (3, 16, 0), (3, 15, 1), (3, 16, -1), (3, 15, 0.5)])
def test_features_codes_and_waveforms_are_theirs(pair, batch, frames, more):
    model, codec = pair
    hop = codec.hop_length
    wave_BW = waves(batch, frames * hop + (hop // 2 if more == 0.5 else more), seed=frames)
    features_BTD, codes_BTQ, decoded_BW = theirs(model, wave_BW)
    found_BTD = np.asarray(codec.features(wave_BW))
    assert found_BTD.shape == features_BTD.shape
    np.testing.assert_allclose(found_BTD, features_BTD, atol=1e-4 * np.abs(features_BTD).max(), rtol=0)
    found_BTQ = np.asarray(codec.encode(wave_BW))
    assert found_BTQ.shape == codes_BTQ.shape and len(np.unique(codes_BTQ)) > 8
    different = float(np.mean(found_BTQ != codes_BTQ))
    print(f"{different:.2%} of codes differ; margins from {margins(model, features_BTD, codes_BTQ).min():.1e}")
    assert different < 1e-3
    found_BW = np.asarray(codec.decode(codes_BTQ))
    assert found_BW.shape == decoded_BW.shape and 0.1 < np.std(decoded_BW) < 0.7
    np.testing.assert_allclose(found_BW, decoded_BW, atol=1e-4)


def test_fewer_levels_are_theirs(pair):
    model, codec = pair
    wave_BW = waves(1, 9 * codec.hop_length)
    with torch.no_grad():
        encoded = model.encode(torch.from_numpy(wave_BW)[:, None], n_quantizers=1)
        decoded_BW = model.decode(audio_codes=encoded.audio_codes).audio_values.numpy()
    codes_BTQ = np.asarray(codec.encode(wave_BW, num_quantizers=1))
    np.testing.assert_array_equal(codes_BTQ[..., 0], encoded.audio_codes[:, 0])
    np.testing.assert_allclose(codec.decode(codes_BTQ), decoded_BW, atol=1e-4)


def test_a_row_of_a_ragged_batch_is_that_recording_alone(pair):
    model, codec = pair
    hop = codec.hop_length
    wave_BW, lengths_B = waves(4, 13 * hop), np.array([13 * hop, 9 * hop + 1, 5 * hop - 1, 2 * hop + hop // 2])
    features_BTD, codes_BTQ = codec.features(wave_BW, lengths_B), np.asarray(codec.encode(wave_BW, lengths_B))
    frames_B = np.array([codec.num_frames(int(length)) for length in lengths_B])
    decoded_BW = np.asarray(codec.decode(codes_BTQ, frames_B))
    for row, (length, frames) in enumerate(zip(lengths_B, frames_B, strict=True)):
        alone_1TD, alone_1TQ, alone_1W = theirs(model, wave_BW[row : row + 1, :length])
        assert alone_1TD.shape[1] == frames
        scale = np.abs(alone_1TD).max()
        np.testing.assert_allclose(features_BTD[row, :frames], alone_1TD[0], atol=1e-4 * scale, rtol=0)
        np.testing.assert_array_equal(codes_BTQ[row, :frames], alone_1TQ[0])
        samples = alone_1W.shape[1]
        np.testing.assert_allclose(decoded_BW[row, :samples], alone_1W[0], atol=1e-4)
        assert not decoded_BW[row, samples:].any()


def test_less_than_a_frame_gives_no_frames(pair):
    _, codec = pair
    codes_BTQ = codec.encode(waves(2, 1))
    assert codes_BTQ.shape == (2, 0, codec.num_quantizers) and codec.decode(codes_BTQ).shape == (2, 0)


@pytest.mark.parametrize("chunk", [1, 3, 17])
def test_chunks_decode_as_the_whole(pair, chunk, monkeypatch):
    """Rows that end early included; samples that the decoder leaves out at the very end are zeros."""
    _, codec = pair
    decode, decoded = Codec.decode, []
    noted = lambda codec, codes_BTQ, *rest: decoded.append(codes_BTQ.shape[1]) or decode(codec, codes_BTQ, *rest)
    num_frames, frames_B = 50, np.array([50, 31, 2])
    codes_BTQ = np.random.default_rng(1).integers(tiny.CODES, size=(3, num_frames, codec.num_quantizers))
    decoder, pieces = ChunkDecoder(codec), []
    monkeypatch.setattr(Codec, "decode", noted)
    for start in range(0, num_frames, chunk):
        codes = codes_BTQ[:, start : start + chunk]
        pieces.append(decoder.decode(codes, np.clip(frames_B - start, 0, codes.shape[1])))
    pieces.append(decoder.finish())
    # Nothing waits longer than it must, or is kept longer.
    assert max(decoded) <= chunk + 2 * codec.config.reach
    assert pieces[-1].shape[1] == min(num_frames, codec.config.reach) * codec.hop_length
    wave_BW = np.concatenate(pieces, axis=1)
    assert wave_BW.shape[1] == num_frames * codec.hop_length
    for wave_W, codes_TQ, frames in zip(wave_BW, codes_BTQ, frames_B, strict=True):
        alone_W = np.asarray(codec.decode(codes_TQ[None, :frames]))[0]
        np.testing.assert_allclose(wave_W[: len(alone_W)], alone_W, atol=1e-5)
    assert not wave_BW[0, codec.config.num_samples(num_frames) :].any()


def test_reach_is_as_far_as_a_sample_depends_on_frames(pair):
    _, codec = pair
    reach, hop = codec.config.reach, codec.hop_length
    middle = reach + 2
    x_1TD = np.random.default_rng(2).standard_normal((1, 2 * middle, codec.config.embed_dim)).astype(np.float32)
    params = {"params": codec.weights["generator"]["decoder"]}
    weights_W = np.random.default_rng(3).standard_normal(hop)

    def weighted(x_1TD):
        return codec.config.decoder.apply(params, x_1TD)[0, middle * hop : (middle + 1) * hop] @ weights_W

    (felt,) = np.nonzero(np.any(np.asarray(jax.jit(jax.grad(weighted))(x_1TD))[0], axis=-1))
    assert max(middle - felt.min(), felt.max() - middle) == reach


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dac")
    random_model("16k").save_pretrained(folder)
    return part_from_huggingface(folder)


def test_a_bundle_on_it_works_from_end_to_end(part, tmp_path):
    model = audiolm_jax.load_bundle(tiny.write_bundle(tmp_path, part))
    parts, recordings = tmp_path / "parts", tiny.write_recordings(tmp_path / "recordings", (2.03, 1.5, 2.6))
    roles = {role: str(parts / role) for role in ("codec", "semantic_tokenizer")}
    commands.tokenize(commands.TokenizeOptions(**roles, input_path=str(recordings), output=str(tmp_path / "d")))
    dataset = token_dataset.TokenDataset(str(tmp_path / "d"))
    records = [record for split in dataset.splits for record in dataset.source(split)]
    assert len(records) == 3
    for record in records:
        assert len(record["acoustic"]) == model.codec.num_frames(int(record["num_samples"]))
        for name in ("coarse", "fine"):
            stage = stage_from_config(read_part(parts / name).config)
            example = transforms.encode(transforms.crop(record, stage, seed=0, epoch=0), stage)
            assert example["decoder_loss_weights"].sum() > 40
    # Two prompts of different length, longer than the crops, and each row is what its codes alone sound like.
    wave_BW, lengths_B = waves(2, 17_000), np.array([17_000, 12_345])
    windows = model.stream(wave_BW, seconds=2.5, lengths_B=lengths_B, ignore_end=True)
    first, *rest = windows
    assert len(rest) > 2 and max(block.wave_BW.shape[1] for block in rest) <= 16_000
    # One second of the longer prompt, but for what must wait.
    assert first.wave_BW.shape[1] == (50 - model.codec.config.reach) * 320
    np.testing.assert_array_equal(windows.lengths_B, lengths_B + round(2.5 * 16_000))
    written_BW = np.concatenate([block.wave_BW for block in (first, *rest)], axis=1)
    for wave_W, row, length in zip(written_BW, windows.rows, windows.lengths_B, strict=True):
        alone_W = np.asarray(model.codec.decode(row.acoustic[None]))[0, :length]
        np.testing.assert_allclose(wave_W[: len(alone_W)], alone_W, atol=1e-5)
        assert np.std(alone_W) > 0.1 and not wave_W[len(alone_W) :].any() and length - len(alone_W) <= 8


def test_it_is_a_part_that_training_starts_from(part, tmp_path):
    write_part(tmp_path, part)
    again = read_part(tmp_path)
    assert again.fingerprint() == part.fingerprint() and again.config == part.config
    objective = build_objective(again.config)
    abstract_state = unbox(jax.eval_shape(objective.init, jax.random.key(0)))
    weights = again.weights_for(abstract_state, objective)
    assert jax.tree.structure(weights) == jax.tree.structure(objective.weights(abstract_state))


def damaged(folder, change):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("encoder.block.1.snake1.alpha"), "encoder.block.1.snake1.alpha is missing"),
        (lambda tensors: tensors.update(extra=np.zeros(3)), "tensor extra belongs to no layer"),
        (
            lambda tensors: tensors.update({"decoder.conv2.bias": np.zeros(2)}),
            r"decoder.conv2.bias is \[2\], not \[1\]",
        ),
    ],
)
def test_other_weights_are_refused(tmp_path, change, message):
    random_model("16k").save_pretrained(tmp_path)
    damaged(tmp_path, change)
    with pytest.raises(UserError, match=message):
        part_from_huggingface(tmp_path)


def test_other_models_are_refused(pair, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "encodec"}')
    with pytest.raises(UserError, match="not a DAC but a encodec"):
        part_from_huggingface(tmp_path)
    with pytest.raises(UserError, match="decoder makes 4 samples of a frame"):
        dataclasses.replace(pair[1].config, decoder_strides=(4,))
