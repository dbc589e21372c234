"""The whole of AudioLM on a few minutes of recordings: train, tokenize, generate, measure, report.

Every step leaves a finished folder behind, so a second run goes on where the first one stopped.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np

from audiolm_jax import audio, bundle, commands, files
from audiolm_jax.config import load_config, shipped_folder
from audiolm_jax.data import manifest
from audiolm_jax.data.token_dataset import TokenDataset
from audiolm_jax.errors import UserError
from audiolm_jax.evaluation.codec import codec_quality
from audiolm_jax.evaluation.report import (
    GENERATED,
    ORIGINAL,
    RECONSTRUCTION,
    Clip,
    Curve,
    Group,
    Table,
    render,
    software,
    with_details,
)
from audiolm_jax.evaluation.unigram import unigram_losses
from audiolm_jax.generate import AudioLM
from audiolm_jax.lm.objective import stage_from_config
from audiolm_jax.progress import report
from audiolm_jax.training.metrics import read_metrics

SEMANTIC_LAYER = 3
NUM_CLUSTERS = 64
PROMPT_SECONDS, NEW_SECONDS, NUM_SAMPLES = 3.0, 3.0, 2
PROMPTS_PER_SPEAKER = 2
RECIPES = {
    "codec": "soundstream_tiny",
    "w2v_bert": "w2v_bert_tiny",
    "semantic": "semantic_tiny",
    "coarse": "coarse_tiny",
    "fine": "fine_tiny",
}
STAGES = ("semantic", "coarse", "fine")


def quickstart(workdir: str, input_path: str | None = None, steps_scale: float = 1.0) -> int:
    """Runs everything; see the README.

    Args:
      workdir: folder of the results.
      input_path: recordings; the shipped ones by default. Splits "validation" (lines held out of
        training) and "prompt_unseen" (speakers held out) give the prompts.
      steps_scale: multiplies each objective's training steps.

    Returns:
      exit status: 0, or 143 or 130 where a signal stopped a training (run again to go on).
    """
    start = time.monotonic()
    if not 0 < steps_scale < float("inf"):
        raise UserError("steps_scale out of range", steps_scale, "give more than 0")
    recordings_path = _recordings_path(input_path)
    prompts = choose_prompts(manifest.read_manifest(recordings_path))
    folder = files.make_folder(workdir)
    path = {name: str(folder / name) for name in (*RECIPES, "semantic_tokenizer", "tokens", "bundle")}

    if status := train_side_by_side(("codec", "w2v_bert"), recordings_path, folder, steps_scale):
        return status
    if not os.path.isdir(path["semantic_tokenizer"]):
        commands.fit_kmeans(
            commands.FitKmeansOptions(
                encoder=path["w2v_bert"],
                layers=(SEMANTIC_LAYER,),
                input_path=recordings_path,
                num_clusters=(NUM_CLUSTERS,),
                output=path["semantic_tokenizer"],
            )
        )
    if not os.path.isdir(path["tokens"]):
        commands.tokenize(
            commands.TokenizeOptions(
                codec=path["codec"],
                semantic_tokenizer=path["semantic_tokenizer"],
                input_path=recordings_path,
                output=path["tokens"],
            )
        )
    if status := train_side_by_side(STAGES, path["tokens"], folder, steps_scale):
        return status
    if not os.path.isdir(path["bundle"]):
        bundle.write_bundle({role: path[role] for role in ("codec", "semantic_tokenizer", *STAGES)}, path["bundle"])

    results = _generate_and_measure(folder, recordings_path, prompts, time.monotonic() - start)
    report(f"quickstart: {(time.monotonic() - start) / 60:.1f} minutes")
    print(json.dumps(results, indent=2))
    print(f"report: {folder / 'report.html'}")
    return 0


def _recordings_path(input_path: str | None) -> str:
    if input_path is not None:
        return input_path
    shipped = shipped_folder("samples") / "manifest.jsonl"
    if not shipped.is_file():
        raise UserError("the shipped recordings are not here", shipped, "run from a clone or give --input=PATH")
    return str(shipped)


def train_side_by_side(names: Sequence[str], data_dir: str, folder: pathlib.Path, steps_scale: float) -> int:
    """Trains several objectives at once, each in a process of its own: models this small leave cores idle.

    SIGTERM is passed on, and Ctrl-C reaches the processes by itself: they save, and the next run resumes.

    Returns:
      the first exit status that is not 0, or 0. A process that fails has said why, and stops the others.
    """
    running = []
    for position, name in enumerate(names):
        config = load_config(RECIPES[name])
        steps = max(1, round(config.num_train_steps * steps_scale))
        arguments = [f"--config={RECIPES[name]}", f"--workdir={folder / name}", f"--config.data_dir={data_dir}"]
        command = [sys.executable, "-m", "audiolm_jax", "train", *arguments, f"--config.num_train_steps={steps}"]
        # On a terminal each progress bar has a line of its own.
        line = {"TQDM_POSITION": str(position)} if sys.stderr.isatty() else {}
        running.append(subprocess.Popen(command, env={**os.environ, **line}))

    def pass_on(number, _):
        for process in running:
            process.send_signal(number)

    previous = signal.signal(signal.SIGTERM, pass_on), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        status = 0
        while unfinished := [process for process in running if process.poll() is None]:
            status = status or next((p.returncode for p in running if p.returncode), 0)
            if status:
                pass_on(signal.SIGTERM, None)
            with contextlib.suppress(subprocess.TimeoutExpired):
                unfinished[0].wait(timeout=0.5)
        return status or next((process.returncode for process in running if process.returncode), 0)
    finally:
        signal.signal(signal.SIGTERM, previous[0])
        signal.signal(signal.SIGINT, previous[1])


def choose_prompts(recordings: list[manifest.Recording]) -> list[manifest.Recording]:
    """Held-out recordings to continue: for each speaker the first few that outlast prompt and continuation."""
    chosen: list[manifest.Recording] = []
    held_out = [r for r in recordings if r.split in ("validation", "prompt_unseen")]
    for speaker in dict.fromkeys(recording.speaker for recording in held_out):
        lines = [recording for recording in held_out if recording.speaker == speaker]
        long = [line for line in lines if line.seconds() >= PROMPT_SECONDS + NEW_SECONDS]
        chosen += (long or sorted(lines, key=lambda line: -line.seconds()))[:PROMPTS_PER_SPEAKER]
    if not chosen:
        raise UserError("no held-out recording to continue", "split validation", "add recordings")
    return chosen


def _generate_and_measure(folder: pathlib.Path, recordings_path: str, prompts, training_seconds: float) -> dict:
    model = bundle.load_bundle(folder / "bundle")
    paths = [str(prompt.path) for prompt in prompts]
    options = commands.GenerateOptions(
        str(folder / "bundle"),
        "continuation",
        str(folder / "continuations"),
        paths,
        PROMPT_SECONDS,
        NEW_SECONDS,
        NUM_SAMPLES,
    )
    again = dataclasses.replace(options, mode="acoustic", output=str(folder / "acoustic"), seconds=None, num_samples=1)
    from_nothing = dataclasses.replace(
        options,
        mode="unconditional",
        output=str(folder / "unconditional"),
        prompt=(),
        seconds=PROMPT_SECONDS + NEW_SECONDS,
    )
    requests = {"continuations": options, "acoustic": again, "unconditional": from_nothing}
    generated = {name: commands.generate(request) for name, request in requests.items()}
    results = {
        "minutes": training_seconds / 60,
        "codec": _codec_results(model, recordings_path),
        "w2v_bert": _w2v_bert_results(folder),
        "language_models": {name: _language_model_results(folder, name) for name in STAGES},
        "generation": {mode: [_generation_results(folder / mode, e) for e in rows] for mode, rows in generated.items()},
    }
    files.write_bytes(folder / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    page = _report(folder, model, prompts, generated, results)
    files.write_bytes(folder / "report.html", page.encode())
    return {name: results[name] for name in ("minutes", "codec", "w2v_bert", "language_models")}


def _codec_results(model: AudioLM, recordings_path: str) -> dict:
    held_out = [r for r in manifest.read_manifest(recordings_path) if r.split == "validation"]
    return codec_quality(model.codec, [recording.read(model.codec.sample_rate) for recording in held_out])


def _last_evaluation(workdir: pathlib.Path) -> dict:
    return [row for row in read_metrics(workdir) if "eval_loss" in row][-1]


def _w2v_bert_results(folder: pathlib.Path) -> dict[str, float]:
    """Masked accuracy beside the most frequent target's share, and the targets' perplexity, on held-out lines."""
    row = _last_evaluation(folder / "w2v_bert")
    shares_K = np.array(row["eval_target_histogram"])
    entropy = -np.sum(shares_K * np.log(np.maximum(shares_K, 1e-12)))
    return {
        "masked_accuracy": row["eval_masked_accuracy"],
        "most_frequent_target": float(shares_K.max()),
        "target_perplexity": float(np.exp(entropy)),
    }


def _language_model_results(folder: pathlib.Path, name: str) -> dict:
    """Held-out loss of each level beside that of the training tokens' unigram, in nats a token."""
    config = load_config(str(folder / name / "config.json"))
    unigram_Q = unigram_losses(TokenDataset(config.data_dir), stage_from_config(config))
    loss_Q = np.array(_last_evaluation(folder / name)["eval_level_loss"])
    return {
        "loss": float(loss_Q.mean()),
        "unigram": float(unigram_Q.mean()),
        "gain": float((unigram_Q - loss_Q).mean()),
        "loss_per_level": loss_Q.tolist(),
        "unigram_per_level": unigram_Q.tolist(),
    }


def _generation_results(folder: pathlib.Path, entry: dict) -> dict:
    wave_W = audio.read(folder / entry["path"], 16_000)
    new_W = wave_W[round(entry["prompt_seconds"] * 16_000) :]
    return {
        "path": entry["path"],
        "seconds": entry["seconds"],
        "ended": entry["ended"],
        "peak": float(np.abs(wave_W).max()),
        "level_db": 20 * math.log10(max(float(np.sqrt(np.mean(np.square(new_W)))), 1e-9)) if len(new_W) else None,
    }


def _report(folder: pathlib.Path, model: AudioLM, prompts, generated, results) -> str:
    rate = model.codec.sample_rate
    groups = []
    for index, prompt in enumerate(prompts):
        wave_W = prompt.read(rate)
        rebuilt_W = np.asarray(model.codec.decode(np.asarray(model.codec.encode(wave_W[None]))))[0, : len(wave_W)]
        clips = [
            Clip("Original", wave_W, rate, kind=ORIGINAL),
            Clip("Codec reconstruction", rebuilt_W, rate, kind=RECONSTRUCTION),
        ]
        for entry in generated["continuations"][index * NUM_SAMPLES : (index + 1) * NUM_SAMPLES]:
            continued_W = audio.read(folder / "continuations" / entry["path"], rate)
            title = f"Continuation {entry['sample'] + 1}"
            clips.append(Clip(title, continued_W, rate, entry["prompt_seconds"], GENERATED))
        acoustic_W = audio.read(folder / "acoustic" / generated["acoustic"][index]["path"], rate)
        clips.append(Clip("Acoustic generation", acoustic_W, rate, kind=GENERATED))
        unseen = "a speaker never heard in training" if prompt.split == "prompt_unseen" else "a held-out line"
        groups.append(Group(f"{prompt.id}: {unseen}", prompt.text, clips))
    unprompted = [
        Clip(f"Sample {entry['sample'] + 1}", audio.read(folder / "unconditional" / entry["path"], rate), rate)
        for entry in generated["unconditional"]
    ]
    groups.append(Group("Unconditional generation", "No prompt at all.", unprompted))
    introduction = (
        "A codec, a semantic tokenizer and three language models, all trained from nothing on a few minutes of "
        "recordings in a few minutes on a processor: enough to hear that every part does its work, far from enough to "
        "say words. The paper trains on 60,000 hours."
    )
    page = render(
        "AudioLM quickstart",
        introduction,
        _tables(results),
        _curves(folder, results),
        groups,
        _commands_to_go_on(folder),
    )
    return with_details(page, _details(folder, generated))


def _details(folder: pathlib.Path, generated) -> dict:
    """How everything was made: what the bundle says of its parts, and how it was sampled."""
    parts = json.loads((folder / "bundle" / bundle.FILE).read_text())["parts"]
    sampled = {mode: {"seed": rows[0]["seed"], **rows[0]["settings"]} for mode, rows in generated.items()}
    return {
        "Software": software(),
        "Fingerprints": {role: part["fingerprint"] for role, part in parts.items()},
        "Sampling": sampled,
        **{f"Configuration: {role}": part["config"] for role, part in parts.items()},
    }


def _tables(results: dict) -> list[Table]:
    codec, bert = results["codec"], results["w2v_bert"]
    levels = list(enumerate(zip(codec["codebook_perplexity"], codec["codes_used"], strict=True), 1))
    stages = results["language_models"]
    return [
        Table(
            "Codec on held-out lines",
            ("log-mel distance", "of silence", "of noise as loud", "SI-SDR"),
            [
                [f"{codec[f'log_mel_distance{other}']:.3f}" for other in ("", "_silence", "_noise")]
                + [f"{codec['si_sdr']:.1f} dB"]
            ],
        ),
        Table(
            "Codebook use on held-out lines",
            ("level", *(str(level) for level, _ in levels)),
            [
                ["perplexity", *(f"{perplexity:.0f}" for _, (perplexity, _) in levels)],
                ["codes used", *(str(used) for _, (_, used) in levels)],
            ],
        ),
        Table(
            "Semantic encoder on held-out lines",
            ("masked accuracy", "most frequent target's share", "target perplexity"),
            [
                [
                    f"{bert['masked_accuracy']:.3f}",
                    f"{bert['most_frequent_target']:.3f}",
                    f"{bert['target_perplexity']:.1f}",
                ]
            ],
        ),
        Table(
            "Language models on held-out lines, nats a token",
            ("stage", "loss", "unigram", "gain"),
            [[name, *(f"{stage[key]:.3f}" for key in ("loss", "unigram", "gain"))] for name, stage in stages.items()],
            "Means over the levels of the stage's target. Unigram: counts of the training tokens, one added.",
        ),
        Table(
            "Generated",
            ("file", "seconds", "ended", "peak", "level of the new audio"),
            [
                [
                    f"{mode}/{row['path']}",
                    f"{row['seconds']:.2f}",
                    "yes" if row["ended"] else "no",
                    f"{row['peak']:.2f}",
                    "–" if row["level_db"] is None else f"{row['level_db']:.1f} dB",
                ]
                for mode, rows in results["generation"].items()
                for row in rows
            ],
        ),
    ]


def _curves(folder: pathlib.Path, results: dict) -> list[Curve]:
    labels = {"codec": "spectral loss", "w2v_bert": "loss"}
    train_names = {"codec": "reconstruction"}
    curves = []
    for name in RECIPES:
        rows = read_metrics(folder / name)
        train_name = train_names.get(name, "loss")
        floor = ("unigram", results["language_models"][name]["unigram"]) if name in STAGES else None
        curves.append(
            Curve(
                title=RECIPES[name],
                label=labels.get(name, "nats a token"),
                train=[(row["step"], row[train_name]) for row in rows if train_name in row],
                held_out=[(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row],
                floor=floor,
            )
        )
    return curves


def _commands_to_go_on(folder: pathlib.Path) -> str:
    return f"""# continue your own recording
audiolm generate --bundle={folder}/bundle --mode=continuation --prompt=YOUR.wav --seconds=3 --num_samples=3 --output=out

# another seed, bolder sampling, another mode
audiolm generate --bundle={folder}/bundle --mode=acoustic --prompt=YOUR.wav --seed=1 --temperature=1.0 --output=out
audiolm generate --bundle={folder}/bundle --mode=unconditional --seconds=6 --top_k=50 --output=out

# train longer: the same workdir resumes
audiolm train --config=fine_tiny --workdir={folder}/fine --config.data_dir={folder}/tokens --config.num_train_steps=5000

# on your own recordings, in the paper's sizes: see "Walk-through" in the README
audiolm train --config=soundstream_base --workdir=runs/codec --config.data_dir=RECORDINGS
"""
