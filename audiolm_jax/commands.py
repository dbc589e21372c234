"""What each command does between files and models; `cli` parses and calls one of these."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
import tqdm
from jax.sharding import Mesh

from audiolm_jax import audio, bundle, clustering, files
from audiolm_jax.data import manifest
from audiolm_jax.data import tokenize as tokenizing
from audiolm_jax.errors import UserError
from audiolm_jax.generate import DEFAULT_SECONDS, check_request
from audiolm_jax.lm.sampling import Sampling
from audiolm_jax.parts import read_part, write_part
from audiolm_jax.progress import report, seconds_bar
from audiolm_jax.semantic.kmeans import Settings
from audiolm_jax.training.sharding import make_mesh
from audiolm_jax.windows import Windows


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitKmeansOptions:
    """Options of `audiolm fit-kmeans`, as on the command line."""

    encoder: str
    layers: Sequence[int]
    input_path: str
    num_clusters: Sequence[int]
    output: str
    seed: int = 0
    cache: str | None = None
    cache_dtype: str = "float32"
    max_frames: int = 1_000_000
    num_iterations: int = 50
    tolerance: float = 1e-4
    mini_batch: int = 0


def fit_kmeans(options: FitKmeansOptions):
    """Fits normalisation and k-means on layers of an encoder; writes semantic tokenizers to a new folder.

    One layer and one number of clusters make OUTPUT a tokenizer; several make OUTPUT/layer_L_clusters_K tokenizers,
    with their figures in OUTPUT/results.json and results.png. Recordings whose split is not "train" are left out.
    """
    files.refuse_existing(options.output)
    encoder = bundle.read_encoder(options.encoder)
    tokenizer = bundle.tokenizer_from_part(encoder)
    settings = Settings(
        num_iterations=options.num_iterations, tolerance=options.tolerance, mini_batch=options.mini_batch
    )
    job = clustering.Job(
        layers=tuple(dict.fromkeys(options.layers)),
        num_clusters=tuple(dict.fromkeys(options.num_clusters)),
        seed=options.seed,
        max_frames=options.max_frames,
        cache_dtype=options.cache_dtype,
        settings=settings,
    )
    job.check(tokenizer.num_layers)
    recordings = [r for r in manifest.read_manifest(options.input_path) if r.split == "train"]
    usable, seconds = manifest.usable(recordings, report)
    with clustering.cache_folder(options.output, options.cache) as (folder, is_ours):
        fits = clustering.fit(job, tokenizer, encoder.fingerprint(), usable, seconds, folder, is_ours, report)
        with files.new_folder(options.output) as scratch:
            for fit in fits:
                target = scratch / fit.name if len(fits) > 1 else scratch
                target.mkdir(exist_ok=True)
                write_part(target, bundle.with_clusters(encoder, {"layer": fit.layer, **fit.clusters}))
            if len(fits) > 1:
                clustering.write_results(scratch, fits, options.seed, encoder.fingerprint())


def compile_config(config: ml_collections.ConfigDict, topology: str, num_slices: int, output: str):
    """Writes the report of `compile.compile_config` and prints its gist."""
    from audiolm_jax.compile import compile_config as compile_for_slice  # Reaches for libtpu: only where asked for.

    files.make_folder(pathlib.Path(output).parent)
    if num_slices < 1:
        raise UserError("must be 1 or more", f"--num_slices={num_slices}", "change it")
    report(f"compiling the {config.objective} train step for {num_slices} x {topology}: minutes, if it is large")
    result = compile_for_slice(config, topology, num_slices)
    files.write_bytes(output, (json.dumps(result, indent=2) + "\n").encode())
    if not result["fits"]:
        print(f"does not fit: {result['reason']}")
        return
    needed, there = (result[f"{name}_bytes_per_device"] / 2**30 for name in ("peak", "memory"))
    print(
        f"fits: {needed:.1f} of {there:.0f} GiB on each of {result['num_devices']} devices; a step takes "
        f"{result['step_seconds']:.3f} s or more (model FLOPs utilisation {result['utilization']:.0%} at most)"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizeOptions:
    """Options of `audiolm tokenize`, as on the command line."""

    codec: str
    semantic_tokenizer: str
    input_path: str
    output: str
    shard_seconds: float = tokenizing.SHARD_SECONDS
    batch_seconds: float = tokenizing.BATCH_SECONDS
    host: int = 0
    num_hosts: int = 1
    runner: str | None = None
    num_workers: int = 1
    pipeline_options: Sequence[str] = ()


def tokenize(options: TokenizeOptions):
    """Recordings → token dataset; see `data.tokenize.tokenize`."""
    for name in ("shard_seconds", "batch_seconds", "num_workers"):
        if not 0 < getattr(options, name) < float("inf"):
            raise UserError("must be more than 0", f"--{name}={getattr(options, name)}", "change it")
    if options.runner is None and (options.num_workers != 1 or options.pipeline_options):
        name = "pipeline_options" if options.pipeline_options else "num_workers"
        raise UserError("only for a runner", f"--{name}", "add --runner=direct, or leave it out")
    load = functools.partial(load_tokenizers, options.codec, options.semantic_tokenizer)
    write_shards = None
    if options.runner is not None:
        from audiolm_jax.data import beam  # Reaches for Apache Beam: only where asked for.

        write_shards = beam.write_shards(load, report, options.runner, options.num_workers, options.pipeline_options)
    recordings = manifest.read_manifest(options.input_path)
    request = tokenizing.Request(recordings, options.output, options.shard_seconds, options.batch_seconds)
    tokenizing.tokenize(request, load(), report, options.host, options.num_hosts, write_shards)


def load_tokenizers(codec: str, semantic_tokenizer: str) -> tokenizing.Tokenizers:
    """Loads what makes tokens; raises a UserError for parts that cannot, or that do not fit each other."""
    parts = {"codec": read_part(codec), "semantic_tokenizer": read_part(semantic_tokenizer)}
    codec_model, tokenizer_model = bundle.load_codec(codec), bundle.load_semantic_tokenizer(semantic_tokenizer)
    if codec_model.sample_rate != tokenizer_model.sample_rate:
        rates = f"{codec_model.sample_rate} and {tokenizer_model.sample_rate} Hz"
        raise UserError("codec and semantic tokenizer have different sample rates", rates, "use parts of one rate")
    tokenizer_model.vocab_size  # noqa: B018  An encoder without clusters says so before any work is done.
    fingerprints = {role: part.fingerprint() for role, part in parts.items()}
    return tokenizing.Tokenizers(codec_model, tokenizer_model, fingerprints)


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """Options of `audiolm generate`, as on the command line.

    Attributes:
      bundle, mode, output, prompt, prompt_seconds, seconds, num_samples, seed, ignore_end, weights, mesh_data,
        mesh_tensor: as `--help` says.
      sampling: settings given for each stage, by name; None leaves the paper's.
      batch_rows: how many rows are generated at once.
    """

    bundle: str
    mode: str
    output: str
    prompt: Sequence[str] = ()
    prompt_seconds: float = 3.0
    seconds: float | None = None
    num_samples: int = 1
    seed: int = 0
    ignore_end: bool = False
    weights: str | None = None
    mesh_data: int = 1
    mesh_tensor: int = 1
    sampling: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    batch_rows: int = 16


def generate(options: GenerateOptions) -> list[dict[str, Any]]:
    """Generates and writes WAVs and `generation.json`; returns the latter's entries."""
    check_request(options.mode, bool(options.prompt), options.seconds, options.num_samples)
    if not 0 < options.prompt_seconds < float("inf"):
        raise UserError("prompt_seconds out of range", options.prompt_seconds, "give more than 0")
    recordings = [recording for prompt in options.prompt for recording in manifest.read_manifest(prompt)]
    names = _unique_stems([_named_path(recording) for recording in recordings]) if recordings else ["unconditional"]
    model = bundle.load_bundle(options.bundle, options.weights, _mesh(options.mesh_data, options.mesh_tensor))
    heard = recordings
    if options.mode == "continuation":
        heard = [recording.crop(0.0, min(options.prompt_seconds, recording.seconds())) for recording in recordings]
    prompts = [recording.read(model.codec.sample_rate) for recording in heard]
    sampling = {
        name: Sampling(**{"temperature": lm.stage.temperature, **_given(options.sampling.get(name, {}))})
        for name, lm in model.stages.items()
    }
    folder = files.make_folder(options.output)
    entries: list[dict[str, Any]] = []
    size = max(1, options.batch_rows // options.num_samples)
    settings = {name: dataclasses.asdict(stage) for name, stage in sampling.items()}
    with _progress(options, prompts, model.codec.sample_rate) as progress:
        for first in range(0, len(names), size):
            batch = prompts[first : first + size]
            lengths_B = np.array([len(wave_W) for wave_W in batch])
            windows = model.stream(
                np.stack([np.pad(wave_W, (0, lengths_B.max() - len(wave_W))) for wave_W in batch]) if batch else None,
                options.mode,
                options.seconds,
                options.num_samples,
                options.seed,
                lengths_B if batch else None,
                sampling,
                options.ignore_end,
            )
            rows = [(first + row // options.num_samples, row % options.num_samples) for row in range(len(windows.rows))]
            wavs = [f"{names[index]}_{sample:02}.wav" for index, sample in rows]
            _write_blocks(windows, [folder / name for name in wavs], progress)
            for row, (index, sample) in enumerate(rows):
                recording = recordings[index] if recordings else None
                length = len(prompts[index]) if options.mode == "continuation" else 0
                entries.append(_entry(wavs[row], recording, length, sample, row, windows, options, settings))
    files.write_bytes(folder / "generation.json", (json.dumps(entries, indent=2) + "\n").encode())
    return entries


def _mesh(data: int, tensor: int) -> Mesh | None:
    """The mesh of `--mesh_data` and `--mesh_tensor`, over the first devices of this process; None for a single one."""
    where, devices = f"--mesh_data={data} --mesh_tensor={tensor}", jax.local_devices()
    if min(data, tensor) < 1:
        raise UserError("mesh axes must be 1 or more", where, "change them")
    if data * tensor > len(devices):
        raise UserError(f"mesh of {data * tensor} devices; there are {len(devices)}", where, "choose smaller axes")
    if data * tensor == 1:
        return None
    return make_mesh({"data": data, "fsdp": 1, "tensor": tensor}, devices[: data * tensor])


def _progress(options: GenerateOptions, prompts: Sequence[np.ndarray], sample_rate: int) -> tqdm.tqdm:
    """Counts samples in the files, of all that were asked for; shows seconds."""
    new_seconds = 0.0 if options.mode == "acoustic" else options.seconds or DEFAULT_SECONDS
    lengths = [len(wave_W) for wave_W in prompts] or [0]
    num_samples = options.num_samples * sum(length + round(new_seconds * sample_rate) for length in lengths)
    return seconds_bar("generate", num_samples, sample_rate)


def _write_blocks(windows: Windows, paths: Sequence[pathlib.Path], progress: tqdm.tqdm):
    """Generates; what is ready goes into the rows' files at once, so memory does not grow with the length."""
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(audio.writer(path, windows.codec.sample_rate)) for path in paths]
        for block in windows:
            for write, wave_W, length in zip(writers, block.wave_BW, block.lengths_B, strict=True):
                write(wave_W[:length])
            progress.update(int(block.lengths_B.sum()))
    # An end token leaves less to do.
    progress.total -= sum(row.total_samples for row in windows.rows) - int(windows.lengths_B.sum())
    progress.refresh()


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _entry(name, recording, prompt_length, sample, row, windows: Windows, options, settings) -> dict[str, Any]:
    rate = windows.codec.sample_rate
    return {
        "path": name,
        "mode": options.mode,
        "prompt": str(recording.path) if recording else None,
        "prompt_stretches": recording.stretches() if recording else [],
        "prompt_seconds": prompt_length / rate,
        "sample": sample,
        "seconds": int(windows.lengths_B[row]) / rate,
        "sample_rate": rate,
        "ended": bool(windows.ended_B[row]),
        "seed": options.seed,
        "settings": {
            **settings,
            "ignore_end": options.ignore_end,
            "weights": options.weights,
            "mesh_data": options.mesh_data,
            "mesh_tensor": options.mesh_tensor,
        },
        "tokens_per_second": windows.clock.rates(),
    }


def _named_path(recording: manifest.Recording) -> pathlib.Path:
    """Its path; of a stretch of a file, whose stem others may share, one that is named after its id."""
    if recording.stretches() == [(0.0, None)]:
        return recording.path
    return recording.path.with_name(f"{recording.id.replace('/', '-')}{recording.path.suffix}")


def _unique_stems(paths: Sequence[pathlib.Path]) -> list[str]:
    """The files' stems; where two are equal, with as many parent folders as it takes to tell them apart."""
    absolute = [pathlib.Path(os.path.abspath(path)).with_suffix("").parts for path in paths]
    if len(set(absolute)) < len(absolute):
        absolute = [(*parts[:-1], f"{parts[-1]}{path.suffix}") for parts, path in zip(absolute, paths, strict=True)]
    if len(set(absolute)) < len(absolute):
        twice = next(path for i, path in enumerate(paths) if absolute[i] in absolute[:i])
        raise UserError("prompt given twice", twice, "use --num_samples for several continuations")
    names = []
    for parts in absolute:
        depth = 1
        while sum(other[-depth:] == parts[-depth:] for other in absolute) > 1:
            depth += 1
        names.append("-".join(part.strip("/") for part in parts[-depth:]))
    return names
