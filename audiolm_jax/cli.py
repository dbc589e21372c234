"""`audiolm COMMAND`: parses, calls one function, reports errors; no logic.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

import argparse
import errno
import logging
import os
import pathlib
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

from audiolm_jax import __version__, huge_pages
from audiolm_jax.errors import UserError

STAGES = ("semantic", "coarse", "fine")
# Failures of the machine's storage that the user can do something about.
STORAGE_ERRORS = {
    errno.ENOSPC: "free some space or choose another folder",
    errno.EDQUOT: "free some space or choose another folder",
    errno.EFBIG: "the file system or a limit refuses a file of that size",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EROFS: "choose a folder that can be written to",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "check the path",
    errno.EEXIST: "check the path",
    errno.ENAMETOOLONG: "choose a shorter name",
}


class _Parser(argparse.ArgumentParser):
    """Argument errors in the project's one-line form."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, self.prog, f"see `{self.prog} --help`")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs one command (by default the program's own) and exits with the contract's status."""
    is_program = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        sys.exit(_run(arguments, is_program))
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        os._exit(1)
    except UserError as error:
        if debug:
            traceback.print_exc()
        _fail(f"error: {error}", error.status)
    except Exception as error:
        advice = _storage_advice(error)
        if advice is None or debug:
            traceback.print_exc()
        if advice is None:
            _fail(f"error: {type(error).__name__}: {_one_line(error)}; this is a bug, please report it", 1)
        _fail(f"error: {advice}", 2)


def _storage_advice(error: Exception) -> str | None:
    """WHAT: WHERE; WHAT TO DO for a full disk or a forbidden path, whoever raised it; None for anything else."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in STORAGE_ERRORS:
            return f"{cause.strerror}: {cause.filename or 'output'}; {STORAGE_ERRORS[cause.errno]}"
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if os.strerror(number).lower() in str(cause).lower():
                return f"{os.strerror(number)}: {_one_line(cause)[:200]}; {STORAGE_ERRORS[number]}"
        cause = cause.__cause__ or cause.__context__
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _fail(message: str, status: int) -> NoReturn:
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    sys.exit(status)


def _quiet_libraries():
    """Storage libraries log a failed write with its traceback, from several threads; `main` reports it once."""
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.FATAL)
    # Of writes that failed at the same time asyncio reports all but the first when it throws them away.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = lambda _: None


def _run(arguments: list[str], is_program: bool) -> int:
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not debug:
        _quiet_libraries()
    parser = _build_parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [r for r in rest if not (options.takes_overrides and r.startswith("--config."))]
    if unknown:
        raise UserError("unknown argument", unknown[0], f"see `audiolm {options.command} --help`")
    if is_program:
        huge_pages.restart_with_them()
    return options.function(options, rest) or 0


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="audiolm",
        description="AudioLM in JAX: train its parts, put them together, continue audio. No text, only audio.",
        epilog="Begin with `audiolm quickstart --workdir=runs/quickstart`. Every command has its own --help.",
    )
    parser.add_argument("--version", action="version", version=f"audiolm_jax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    def command(name: str, function, summary: str, details: str = "", takes_overrides: bool = False):
        added = commands.add_parser(
            name,
            help=summary,
            description=f"{summary}\n\n{details}".strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        added.set_defaults(function=function, takes_overrides=takes_overrides)
        added.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return added

    _add_quickstart(command)
    _add_training(command)
    _add_compile(command)
    _add_sweep(command)
    _add_tokenizing(command)
    _add_inspect(command)
    _add_render(command)
    _add_codec(command)
    _add_bundle(command)
    _add_generate(command)
    _add_compare(command)
    _add_evaluate(command)
    return parser


def _add_quickstart(command):
    added = command(
        "quickstart",
        _quickstart,
        "The whole of AudioLM on the recordings in samples/: train, tokenize, generate, report.",
        "Takes about a quarter of an hour on two CPU cores; run it again after an interruption and it goes on.\n"
        "Writes WORKDIR/report.html and WORKDIR/continuations/.",
    )
    added.add_argument("--workdir", default="runs/quickstart", help="folder of the results (default: %(default)s)")
    added.add_argument("--input", help="recordings to use instead of samples/: a folder or a .jsonl manifest")
    added.add_argument("--steps_scale", type=float, default=1.0, help="multiplies the training steps (default: 1)")


def _quickstart(options, _):
    from audiolm_jax.quickstart import quickstart

    return quickstart(options.workdir, options.input, options.steps_scale)


def _add_training(command):
    from audiolm_jax.config import shipped_configs

    added = command(
        "train",
        _train,
        "Train any objective: SoundStream, w2v-BERT, or the semantic, coarse or fine language model.",
        "Run again with the same workdir, it resumes. Change fields by --config.FIELD=VALUE, e.g.\n"
        "  audiolm train --config=soundstream_tiny --workdir=runs/codec --config.data_dir=samples\n"
        "  audiolm train --config=fine_tiny --workdir=runs/fine --config.data_dir=runs/tokens --config.batch_size=4\n\n"
        "Fine-tune a part by its own config, DIR being its folder, exported or converted:\n"
        "  audiolm train --config=DIR --config.init_from=DIR --workdir=runs/tuned --config.data_dir=samples\n\n"
        f"Shipped configs: {', '.join(shipped_configs())}",
        takes_overrides=True,
    )
    added.add_argument(
        "--config",
        required=True,
        metavar="FILE_OR_NAME",
        help="recipe file, name of a shipped one, or folder of a part or run",
    )
    added.add_argument("--workdir", required=True, help="checkpoints, metrics.jsonl and TensorBoard events go here")
    added.add_argument(
        "--distributed",
        action="store_true",
        help="this is one of several processes of the run: TPU pod workers and Slurm tasks find each other, elsewhere "
        "AUDIOLM_COORDINATOR=HOST:PORT, AUDIOLM_NUM_PROCESSES and AUDIOLM_PROCESS_ID name them",
    )


def _train(options, overrides):
    from audiolm_jax.config import load_config

    config = load_config(options.config, overrides)
    if options.distributed:
        from audiolm_jax.training import distributed

        distributed.join()
    from audiolm_jax.training.loop import train

    return train(config, options.workdir)


def _add_compile(command):
    added = command(
        "compile",
        _compile,
        "Compile a config's train step for a TPU slice, without a TPU: does it fit, and how fast can it be?",
        "Takes minutes for the paper's sizes, and the extra `tpu`. Change fields by --config.FIELD=VALUE, e.g.\n"
        "  audiolm compile --config=coarse_librilight --topology=v4:2x2x4 --output=coarse.json\n"
        "  audiolm compile --config=coarse_librilight --topology=v5e:16x16 --num_slices=2 --output=coarse.json \\\n"
        "    --config.mesh.data=2\n\n"
        "The JSON says whether it fits and if not why, memory, FLOPs and collective bytes of a device, and the floor\n"
        "of a step's time by computing, memory and network. A config that does not fit is an answer: exit status 0.",
        takes_overrides=True,
    )
    added.add_argument("--config", required=True, metavar="FILE_OR_NAME", help="recipe file, or name of a shipped one")
    added.add_argument("--topology", required=True, help="such as v4:2x2x4, v5e:4x4, v5p:2x2x4, v6e:16x16")
    added.add_argument("--num_slices", type=int, default=1, help="slices of that topology (default: 1)")
    added.add_argument("--output", required=True, metavar="JSON", help="file of the report")


def _compile(options, overrides):
    from audiolm_jax.config import load_config

    config = load_config(options.config, overrides)
    # The processor compiles, even where there is a TPU: JAX reads this when it is first imported.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from audiolm_jax import commands

    commands.compile_config(config, options.topology, options.num_slices, options.output)


def _add_sweep(command):
    added = command(
        "sweep",
        _sweep,
        "A grid over config fields: a training run for each point, and one table and one plot of the results.",
        'The grid is JSON: {"FIELD": [VALUE, ...], ...} means every combination; a list of such objects one after the\n'
        "other, where fields change together. $NAME in a value is an environment variable. The paper's are in\n"
        "configs/sweeps/. Run again after an interruption, it goes on. Fields of all runs: --config.FIELD=VALUE, e.g.\n"
        "  audiolm sweep --config=coarse_tiny --grid=configs/sweeps/semantic_condition.json --backend=local \\\n"
        "    --workdir=runs/sweep --config.data_dir=runs/tokens",
        takes_overrides=True,
    )
    added.add_argument("--config", required=True, metavar="FILE_OR_NAME", help="recipe file, or name of a shipped one")
    added.add_argument("--grid", required=True, metavar="FILE", help="fields and their values, JSON")
    added.add_argument(
        "--backend",
        required=True,
        choices=("local", "slurm", "gke", "tpu"),
        help="run here one after the other, or hand each run to launch/slurm.sh, gke.sh or tpu_pod.sh",
    )
    added.add_argument("--workdir", required=True, help="folder of the runs, results.md, results.csv and results.png")
    added.add_argument("--launcher", default="", metavar="OPTIONS", help="for the back end's script, in one string")
    added.add_argument("--dry-run", action="store_true", help="print the commands and do nothing")


def _sweep(options, overrides):
    from audiolm_jax.sweep import sweep

    launcher = _split("--launcher", options.launcher)
    if launcher and options.backend == "local":
        raise UserError("no script to give options to", f"--launcher={options.launcher}", "leave it out with local")
    return sweep(
        options.config,
        overrides,
        options.grid,
        options.backend,
        options.workdir,
        options.dry_run,
        launcher,
    )


def _add_tokenizing(command):
    added = command(
        "manifest",
        _manifest,
        "A corpus to a .jsonl manifest, which every --input and data_dir takes, by headers alone.",
        "librilight   SPEAKER/BOOK/FILE.flac and .json: speech, joined to pieces of about --target_seconds\n"
        "librispeech  SUBSET/SPEAKER/CHAPTER/*.flac and .trans.txt; train-*, dev-* and test-* tell the split\n"
        "maestro      the folder of maestro*.csv, or the CSV; its splits\n"
        "folder       any folder, recording or manifest\n"
        "tfds         the folder of a dataset that TFDS has prepared, with an `audio` feature: written out as FLAC\n\n"
        "What is left out, and why, is in OUTPUT_STEM.left_out.txt; counts by reason go to standard error.",
    )
    sources = ("librilight", "librispeech", "maestro", "folder", "tfds")
    added.add_argument("--source", required=True, choices=sources, help="how the corpus is laid out")
    added.add_argument("--input", required=True, metavar="PATH", help="the corpus")
    added.add_argument("--output", required=True, metavar="JSONL", help="new file of the manifest")
    text = "of a piece of Libri-Light (default: %(default)s)"
    added.add_argument("--target_seconds", type=float, default=60.0, metavar="x", help=text)
    text = "no piece of Libri-Light is shorter, nor should the longest training crop be longer (default: %(default)s)"
    added.add_argument("--min_seconds", type=float, default=30.0, metavar="x", help=text)
    text = "of the speakers, or recordings, held out by a hash; for corpora without splits (default: %(default)s)"
    added.add_argument("--validation_share", type=float, default=0.05, metavar="x", help=text)
    text = "read every sample, too: finds cut-off files and samples that are not finite, before training does"
    added.add_argument("--decode", action="store_true", help=text)
    added = command(
        "fit-kmeans",
        _fit_kmeans,
        "Fit k-means on a layer of an encoder: the semantic tokenizer.",
        "Normalises every dimension over the training split, then clusters the frames. Hidden states are computed\n"
        "once and kept on disk, so they may be more than memory holds. Run again after a crash, it goes on.\n\n"
        "Several layers or numbers of clusters (--layer=6,9 --num_clusters=100,500) take one pass over the audio and\n"
        "make OUTPUT/layer_L_clusters_K, with a table, results.json, and a plot, results.png.",
    )
    text = "w2v-BERT (workdir, checkpoint or export) or a converted encoder"
    added.add_argument("--encoder", required=True, metavar="DIR", help=text)
    text = "hidden state to cluster; 0 is the first block's input. Several: with commas, or repeated"
    added.add_argument("--layer", required=True, type=_integers, action="extend", metavar="L", help=text)
    added.add_argument("--input", required=True, metavar="PATH", help="folder, recording or .jsonl manifest")
    text = "semantic tokens (the paper: 1024). Several: with commas, or repeated"
    added.add_argument("--num_clusters", required=True, type=_integers, action="extend", metavar="K", help=text)
    added.add_argument("--seed", type=int, default=0, help="of the k-means++ seeding (default: 0)")
    text = "passes over the frames, at most (default: %(default)s)"
    added.add_argument("--num_iterations", type=int, default=50, metavar="n", help=text)
    text = "stop where a pass lessens the inertia by less than this part of it (default: %(default)s)"
    added.add_argument("--tolerance", type=float, default=1e-4, metavar="x", help=text)
    text = "move the centroids after this many frames, some 16 a cluster or more, not after a whole pass: for so many "
    text += "frames that a few passes must do (default: 0, whole passes)"
    added.add_argument("--mini_batch", type=int, default=0, metavar="FRAMES", help=text)
    text = "cluster at most so many frames of each layer, drawn evenly from all recordings, normalised as all of them; "
    text += "0: all (default: %(default)s, 4 GB of disk at width 1024)"
    added.add_argument("--max_frames", type=int, default=1_000_000, metavar="FRAMES", help=text)
    text = "folder that keeps the hidden states for further fits (default: OUTPUT.incomplete, removed at the end)"
    added.add_argument("--cache", metavar="DIR", help=text)
    text = "of the hidden states on disk; float16 takes half the room, and is refused where it is too coarse"
    added.add_argument("--cache_dtype", choices=("float32", "float16"), default="float32", help=text)
    added.add_argument("--output", required=True, metavar="DIR", help="new folder of the tokenizer")
    added = command(
        "tokenize",
        _tokenize,
        "Recordings to a token dataset: semantic and acoustic tokens in a TFDS dataset (ArrayRecord).",
        "Reads WAV, FLAC, MP3, Ogg at any rate and channel count; what cannot be read is listed in left_out.jsonl.\n"
        "Run again after a crash, it goes on. However many share the work, the dataset is the same, byte for byte.\n\n"
        "Several hosts that see the same folders, or several accelerators, each the same command with its number; the\n"
        "last one to be ready finishes the dataset:\n"
        "  audiolm tokenize ... --num_hosts=8 --host=0\n\n"
        "Apache Beam (extra `beam`), on this machine or on a cluster whose workers see the same folders:\n"
        "  audiolm tokenize ... --runner=direct --num_workers=2\n"
        "  audiolm tokenize ... --runner=flink --pipeline_options='--flink_master=HOST:8081'\n\n"
        "Is a dataset as it was written?\n"
        "  audiolm tokenize --verify=DATASET",
    )
    parts = {
        "codec": ("DIR", "SoundStream: workdir, checkpoint or export"),
        "semantic_tokenizer": ("DIR", "made by `audiolm fit-kmeans`"),
        "input": ("PATH", "folder, recording or .jsonl manifest"),
        "output": ("DIR", "new folder of the dataset"),
    }
    for name, (value, text) in parts.items():
        added.add_argument(f"--{name}", metavar=value, help=text)
    text = "audio a shard: what a killed run loses at most (default: %(default)s)"
    added.add_argument("--shard_seconds", type=float, default=1800.0, metavar="s", help=text)
    text = "audio encoded at once, padding included; more where the accelerator's memory allows (default: %(default)s)"
    added.add_argument("--batch_seconds", type=float, default=60.0, metavar="s", help=text)
    added.add_argument("--num_hosts", type=int, default=1, metavar="N", help="processes that share the work")
    added.add_argument("--host", type=int, default=0, metavar="i", help="number of this one, from 0")
    text = "direct (this machine), dataflow, flink, spark, or any that Apache Beam knows"
    added.add_argument("--runner", metavar="NAME", help=text)
    added.add_argument("--num_workers", type=int, default=1, metavar="N", help="of the runner (default: 1)")
    added.add_argument("--pipeline_options", default="", metavar="OPTIONS", help="for the runner, in one string")
    added.add_argument("--verify", metavar="DATASET", help="compare a dataset's files with its SHA256SUMS")


def _manifest(options, _):
    from audiolm_jax.data import sources

    request = sources.Request(
        source=options.source,
        input=pathlib.Path(options.input),
        output=pathlib.Path(options.output),
        target_seconds=options.target_seconds,
        min_seconds=options.min_seconds,
        validation_share=options.validation_share,
        decode=options.decode,
    )
    sources.write(request, report=lambda line: print(line, file=sys.stderr))


def _fit_kmeans(options, _):
    from audiolm_jax import commands

    commands.fit_kmeans(
        commands.FitKmeansOptions(
            encoder=options.encoder,
            layers=options.layer,
            input_path=options.input,
            num_clusters=options.num_clusters,
            output=options.output,
            seed=options.seed,
            cache=options.cache,
            cache_dtype=options.cache_dtype,
            max_frames=options.max_frames,
            num_iterations=options.num_iterations,
            tolerance=options.tolerance,
            mini_batch=options.mini_batch,
        )
    )


def _split(name: str, text: str) -> list[str]:
    """The options in one string."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"cannot be split ({error})", f"{name}={text}", "close the quote") from error


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _tokenize(options, _):
    if options.verify:
        from audiolm_jax.data.token_dataset import verify

        print(f"all {verify(options.verify, lambda line: print(line, file=sys.stderr))} files are as they were written")
        return
    if missing := [
        name for name in ("codec", "semantic_tokenizer", "input", "output") if getattr(options, name) is None
    ]:
        listed = ", ".join(f"--{name}" for name in missing)
        raise UserError(f"the following arguments are required: {listed}", "audiolm tokenize", "see its --help")
    from audiolm_jax import commands

    commands.tokenize(
        commands.TokenizeOptions(
            codec=options.codec,
            semantic_tokenizer=options.semantic_tokenizer,
            input_path=options.input,
            output=options.output,
            shard_seconds=options.shard_seconds,
            batch_seconds=options.batch_seconds,
            host=options.host,
            num_hosts=options.num_hosts,
            runner=options.runner,
            num_workers=options.num_workers,
            pipeline_options=_split("--pipeline_options", options.pipeline_options),
        )
    )


def _add_inspect(command):
    added = command(
        "inspect",
        _inspect,
        "Look at a token dataset: inspection.json and report.html.",
        "Counts, hours and lengths; how often tokens come, repeat and are left unused; entropies, and the unigram and\n"
        "bigram cross-entropies that a language model must beat, fitted on train and measured on validation.\n"
        "With --codec a few records are decoded, to be heard. Memory does not grow with the number of records.",
    )
    added.add_argument("dataset", metavar="DATASET", help="made by `audiolm tokenize`")
    added.add_argument("--codec", metavar="DIR", help="the codec that made the tokens: workdir, checkpoint or export")
    added.add_argument("--num_examples", type=int, default=5, metavar="n", help="records to decode (default: 5)")
    added.add_argument("--seed", type=int, default=0, help="of the choice of examples (default: 0)")
    added.add_argument("--output", required=True, metavar="DIR", help="new folder of the results")


def _inspect(options, _):
    from audiolm_jax.evaluation.inspection import inspect

    inspect(options.dataset, options.output, options.codec, options.num_examples, options.seed)


def _add_render(command):
    added = command(
        "render",
        _render,
        "MIDI to recordings of a sampled piano (FluidSynth), for tests and demos without real ones.",
        "Writes OUTPUT/rendered/NAME.flac and OUTPUT/manifest.jsonl, an input of every other command. Ids begin with\n"
        "rendered/ and rows say so, to keep them apart from recordings. On Debian:\n"
        "  apt-get install fluidsynth timgm6mb-soundfont",
    )
    added.add_argument("--midi", required=True, metavar="PATH", help="a MIDI file, or a folder, searched recursively")
    added.add_argument("--soundfont", metavar="SF2", help="the instrument (default: what Debian's packages install)")
    added.add_argument("--output", required=True, metavar="DIR", help="new folder of the recordings")


def _render(options, _):
    from audiolm_jax.render import render
    from audiolm_jax.training.loop import report

    render(options.midi, options.output, options.soundfont, report)


def _add_codec(command):
    added = command(
        "encode",
        _encode,
        "A recording to codec tokens (NPZ: codes [T, Q], sample_rate, num_samples, fingerprint).",
        "Reads any rate and channel count. A codec that streams takes a long recording block by block: an hour needs\n"
        "no more memory than a minute.",
    )
    added.add_argument("--codec", required=True, metavar="DIR", help="SoundStream: workdir, checkpoint or export")
    added.add_argument("--input", required=True, metavar="WAV", help="recording")
    added.add_argument("--output", required=True, metavar="NPZ", help="file to write")
    added.add_argument("--num_quantizers", type=int, metavar="n", help="levels to keep (default: all)")
    added = command(
        "decode",
        _decode,
        "Codec tokens (NPZ of `encode`) back to a 16-bit WAV.",
        "Block by block, as `encode`; the WAV has as many samples as were encoded.",
    )
    added.add_argument("--codec", required=True, metavar="DIR", help="the codec that encoded")
    added.add_argument("--input", required=True, metavar="NPZ", help="codes")
    added.add_argument("--output", required=True, metavar="WAV", help="file to write")
    added = command(
        "convert",
        _convert,
        "A public model to a part of ours: codecs, semantic encoders, their centroids.",
        "From the folder of a Hugging Face model, or of a Whisper in CTranslate2's format (faster-whisper). Codecs\n"
        "(EnCodec 24 kHz, DAC, Mimi) make a --codec, or an init_from to train on; encoders (HuBERT, wav2vec 2.0,\n"
        "WavLM, w2v-BERT 2.0, Whisper) an --encoder for `audiolm fit-kmeans`. Whisper's is supervised: it was\n"
        "trained on transcripts.\n\n"
        "Or centroids that were fitted elsewhere, in place of fit-kmeans: --source is a .npy, a .npz or a k-means of\n"
        "scikit-learn that joblib dumped (textless-lib, slamkit; nothing in it is run); --encoder and --layer say\n"
        "what they were fitted on. That makes a --semantic_tokenizer.",
    )
    added.add_argument(
        "--source",
        required=True,
        metavar="PATH",
        help="folder with config.json and model.safetensors, or model.bin; or centroids",
    )
    added.add_argument("--encoder", metavar="DIR", help="of centroids: a converted or trained encoder")
    added.add_argument("--layer", type=int, metavar="L", help="of centroids: hidden state; 0: the first block's input")
    added.add_argument("--output", required=True, metavar="DIR", help="new folder")


def _encode(options, _):
    from audiolm_jax import transcode

    transcode.encode(options.codec, options.input, options.output, options.num_quantizers)


def _decode(options, _):
    from audiolm_jax import transcode

    transcode.decode(options.codec, options.input, options.output)


def _convert(options, _):
    from audiolm_jax.interop.convert import convert

    convert(options.source, options.output, options.encoder, options.layer)


def _add_bundle(command):
    added = command(
        "bundle",
        _bundle,
        "Put the trained parts into one self-contained folder.",
        "Parts that do not belong together are refused by name.",
    )
    no_need = {
        "fine": " (none where the coarse stage predicts every level)",
        **dict.fromkeys(("semantic_tokenizer", "semantic"), " (none where the coarse stage has no semantic condition)"),
    }
    for role in ("codec", "semantic_tokenizer", *STAGES):
        text = f"training workdir, checkpoint or export{no_need.get(role, '')}"
        added.add_argument(f"--{role}", required=role not in no_need, metavar="DIR", help=text)
    added.add_argument("--output", required=True, metavar="DIR", help="new folder of the bundle")


def _bundle(options, _):
    from audiolm_jax.bundle import write_bundle

    write_bundle({role: getattr(options, role) for role in ("codec", "semantic_tokenizer", *STAGES)}, options.output)


def _add_generate(command):
    added = command(
        "generate",
        _generate,
        "Continue recordings, re-synthesise them from their semantic tokens, or generate from nothing.",
        "continuation   the first --prompt_seconds of each prompt, then --seconds of new audio\n"
        "acoustic       the whole prompt again, sampled from its semantic tokens: same words, another voice\n"
        "unconditional  --seconds from nothing\n\n"
        "Writes OUTPUT/{prompt stem or 'unconditional'}_{k:02}.wav and OUTPUT/generation.json.\n"
        "Runs on one device, or the language models on --mesh_data x --mesh_tensor of them.",
    )
    added.add_argument("--bundle", required=True, metavar="DIR", help="made by `audiolm bundle`")
    added.add_argument("--mode", required=True, help="continuation, acoustic or unconditional")
    added.add_argument("--prompt", action="append", default=[], metavar="PATH", help="recording or folder; repeatable")
    added.add_argument("--prompt_seconds", type=float, default=3.0, help="of each prompt (default: 3)")
    added.add_argument("--seconds", type=float, help="of new audio (default: 10); refused in acoustic mode")
    added.add_argument("--num_samples", type=int, default=1, metavar="n", help="for each prompt (default: 1)")
    added.add_argument("--seed", type=int, default=0, help="the same seed gives the same audio (default: 0)")
    added.add_argument("--ignore_end", action="store_true", help="never stop at a sampled end token")
    added.add_argument(
        "--weights", help="float32, bfloat16 or int8: what each step reads (default: the type trained in)"
    )
    added.add_argument("--mesh_data", type=int, default=1, metavar="n", help="devices among which waveforms are shared")
    added.add_argument(
        "--mesh_tensor", type=int, default=1, metavar="n", help="devices among which each model's heads are shared"
    )
    for name, kind, text in (
        ("temperature", float, "divides the logits; 0 is greedy (default: the paper's 0.6, 0.8, 0.6)"),
        ("top_k", int, "sample from the k most likely tokens (default: 0, all)"),
        ("top_p", float, "sample from the most likely tokens of total probability p (default: 1, all)"),
    ):
        added.add_argument(f"--{name}", type=kind, help=f"{text}, in every stage")
        for stage in STAGES:
            added.add_argument(f"--{name}_{stage}", type=kind, help=f"the same, in the {stage} stage")
    added.add_argument("--output", required=True, metavar="DIR", help="folder of the results")


def _generate(options, _):
    from audiolm_jax import commands

    def setting(name: str, stage: str):
        own = getattr(options, f"{name}_{stage}")
        return getattr(options, name) if own is None else own

    commands.generate(
        commands.GenerateOptions(
            bundle=options.bundle,
            mode=options.mode,
            prompt=options.prompt,
            prompt_seconds=options.prompt_seconds,
            seconds=options.seconds,
            num_samples=options.num_samples,
            seed=options.seed,
            ignore_end=options.ignore_end,
            weights=options.weights,
            mesh_data=options.mesh_data,
            mesh_tensor=options.mesh_tensor,
            output=options.output,
            sampling={s: {name: setting(name, s) for name in ("temperature", "top_k", "top_p")} for s in STAGES},
        )
    )


def _add_compare(command):
    added = command(
        "compare",
        _compare,
        "Hear what several runs of `generate` made of the same prompts: one page, side by side.",
        "  audiolm compare runs/continuations runs/acoustic_continuations --output=runs/comparison",
    )
    added.add_argument("runs", nargs="+", metavar="RUN", help="folder that `audiolm generate` wrote")
    added.add_argument("--output", required=True, metavar="DIR", help="new folder of report.html")


def _compare(options, _):
    from audiolm_jax.evaluation.comparison import compare

    compare(options.runs, options.output)


def _add_evaluate(command):
    added = command(
        "evaluate",
        _evaluate,
        "Measure: results.json, each metric with its confidence interval, and report.html.",
        "codec   --codec, --data: SI-SDR, log-mel distance, PESQ, STOI, ViSQOL at each number of levels, beside Opus\n"
        "        at 6, 12 and 24 kbit/s on the same recordings; and how much of each codebook is used. PESQ, STOI and\n"
        "        ViSQOL come with the extra `eval`, Opus with Debian's opus-tools: what is missing is left out, and\n"
        "        said to be. Twelve levels and every judge take about twice as long as the recordings last.\n"
        "abx     --semantic_tokenizer, --data: ABX error within and across speakers of log-mel features, layers and\n"
        "        tokens; phone purity, PNMI and token rates. --data is an item file of Libri-Light, an alignment\n"
        "        table, or a folder with either or both, recordings below it (docs/abx.md).\n\n"
        "  audiolm evaluate --suite=codec --codec=runs/codec --data=RECORDINGS --output=runs/quality\n"
        "  audiolm evaluate --suite=abx --semantic_tokenizer=runs/encoder --data=dev-clean.item --output=runs/abx",
    )
    added.add_argument("--suite", required=True, metavar="NAME", help="codec or abx")
    added.add_argument("--codec", metavar="DIR", help="workdir, checkpoint or export")
    added.add_argument(
        "--semantic_tokenizer",
        action="append",
        default=[],
        metavar="DIR",
        help="encoder, with clusters or without; repeatable, for a plot over the number of clusters",
    )
    added.add_argument(
        "--layer",
        action="append",
        default=[],
        type=int,
        metavar="L",
        help="hidden state to measure; repeatable (default: the clusters', or all of an encoder without)",
    )
    added.add_argument("--data", metavar="PATH", help="codec: folder, file or .jsonl manifest; abx: items or alignment")
    added.add_argument("--split", metavar="NAME", help="only these, such as validation (default: all recordings)")
    added.add_argument(
        "--judge",
        action="append",
        default=[],
        metavar="NAME",
        help="si_sdr, log_mel_distance, pesq, stoi or visqol; repeatable (default: all that are installed)",
    )
    added.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    added.add_argument("--output", required=True, metavar="DIR", help="new folder of the results")


def _evaluate(options, _):
    from audiolm_jax.evaluation.suites import Request, evaluate

    evaluate(
        Request(
            suite=options.suite,
            output=options.output,
            codec=options.codec,
            semantic_tokenizer=options.semantic_tokenizer,
            layers=options.layer,
            data=options.data,
            split=options.split,
            judges=options.judge,
            seed=options.seed,
        )
    )
