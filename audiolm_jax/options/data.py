"""Options of the commands that make data: manifest, fit-kmeans, tokenize, inspect, render, detection-data."""

import pathlib

from audiolm_jax.errors import UserError
from audiolm_jax.options.strings import seed, split


def add_commands(command):
    """Adds them by `command(name, function, summary, details, takes_overrides)`, which gives a parser of arguments."""
    _add_tokenizing(command)
    _add_inspect(command)
    _add_render(command)
    _add_detection_data(command)


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
    added.add_argument("--seed", type=seed, default=0, help="of the k-means++ seeding (default: 0)")
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
    from audiolm_jax.progress import report

    request = sources.Request(
        source=options.source,
        input=pathlib.Path(options.input),
        output=pathlib.Path(options.output),
        target_seconds=options.target_seconds,
        min_seconds=options.min_seconds,
        validation_share=options.validation_share,
        decode=options.decode,
    )
    sources.write(request, report)


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


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _tokenize(options, _):
    if options.verify:
        from audiolm_jax.data.token_dataset import verify
        from audiolm_jax.progress import report

        print(f"all {verify(options.verify, report)} files are as they were written")
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
            pipeline_options=split("--pipeline_options", options.pipeline_options),
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
    added.add_argument("--seed", type=seed, default=0, help="of the choice of examples (default: 0)")
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
    from audiolm_jax.progress import report
    from audiolm_jax.render import render

    render(options.midi, options.output, options.soundfont, report)


def _add_detection_data(command):
    added = command(
        "detection-data",
        _detection_data,
        "What a detector learns from: generated speech, and beside it real speech that went through the same codec.",
        "Takes what `audiolm generate` made in the modes acoustic and continuation. Each WAV of a second or more, its\n"
        "prompt left out, gets a counterpart: the recording that it continues or resembles, from the same moment on,\n"
        "as long, encoded and decoded. Splits are the recordings' own, by default by speaker; of held-out speakers\n"
        "there is the uncompressed original, too, as a control.\n\n"
        "Writes WAVs and OUTPUT/manifest.jsonl, with `label` real or generated:\n"
        "  audiolm detection-data runs/continuations runs/acoustic --codec=runs/codec --input=RECORDINGS \\\n"
        "    --output=runs/pairs\n"
        "  audiolm train --config=detector_tiny --workdir=runs/detector --config.data_dir=runs/pairs/manifest.jsonl",
    )
    added.add_argument("runs", nargs="+", metavar="RUN", help="folder that `audiolm generate` wrote")
    added.add_argument("--codec", required=True, metavar="DIR", help="the codec of the bundle that generated")
    added.add_argument("--input", required=True, metavar="PATH", help="the prompts: folder or .jsonl manifest")
    added.add_argument("--output", required=True, metavar="DIR", help="new folder")


def _detection_data(options, _):
    from audiolm_jax.evaluation import detection_data

    detection_data.write(options.runs, options.codec, options.input, options.output)
