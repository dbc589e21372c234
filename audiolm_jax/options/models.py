"""Options of the commands that use models: encode, decode, convert, bundle, generate, compare, evaluate."""

from audiolm_jax.options.strings import seed

STAGES = ("semantic", "coarse", "fine")


def add_commands(command):
    """Adds them by `command(name, function, summary, details, takes_overrides)`, which gives a parser of arguments."""
    _add_codec(command)
    _add_bundle(command)
    _add_generate(command)
    _add_compare(command)
    _add_evaluate(command)
    _add_detect(command)


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
    added.add_argument("--detector", metavar="DIR", help="to go with them: a detector of what they generate")
    added.add_argument("--output", required=True, metavar="DIR", help="new folder of the bundle")


def _bundle(options, _):
    from audiolm_jax.bundle import write_bundle

    roles = ("codec", "semantic_tokenizer", *STAGES, "detector")
    write_bundle({role: getattr(options, role) for role in roles}, options.output)


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
    added.add_argument("--seed", type=seed, default=0, help="the same seed gives the same audio (default: 0)")
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
        "Runs side by side, on one page: generated audio to be heard, measured figures to be read.",
        "Of `generate` and `quickstart`: what each run made of the same prompts, with a blind test (docs/report.md).\n"
        "Of `evaluate`: each metric with its intervals, marked where they do not meet the first run's.\n\n"
        "  audiolm compare runs/continuations runs/acoustic_continuations --output=runs/comparison\n"
        "  audiolm compare runs/quality_10k runs/quality_50k --output=runs/progress",
    )
    added.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder that `generate` or `quickstart` wrote, or, among themselves, folders of `evaluate`",
    )
    added.add_argument("--output", required=True, metavar="DIR", help="new folder of report.html")


def _compare(options, _):
    from audiolm_jax.evaluation.comparison import compare

    compare(options.runs, options.output)


SUITES = (
    "codec   --codec, --data: SI-SDR, log-mel distance, PESQ, STOI, ViSQOL at each number of levels, beside Opus\n"
    "        at 6, 12 and 24 kbit/s on the same recordings; and how much of each codebook is used. PESQ, STOI and\n"
    "        ViSQOL come with the extra `eval`, Opus with Debian's opus-tools: what is missing is left out, and\n"
    "        said to be. Twelve levels and every judge take about twice as long as the recordings last.\n"
    "abx     --semantic_tokenizer, --data: ABX error within and across speakers of log-mel features, layers and\n"
    "        tokens; phone purity, PNMI and token rates. --data is an item file of Libri-Light, an alignment\n"
    "        table, or a folder with either or both, recordings below it (docs/abx.md).\n"
    "swuggy, sblimp, storycloze, salmon\n"
    "        --bundle, --data: how often the semantic stage finds the right of two recordings likelier than the\n"
    "        wrong one. --data is the folder of ZeroSpeech 2021 (--split=dev or test), of Spoken StoryCloze or of\n"
    "        SALMon (docs/evaluation.md). scores_normalized.txt and scores_sum.txt are as ZeroSpeech reads them.\n"
    "likelihood\n"
    "        --bundle, --data: loss of each stage in nats a token, nats and bits a second of audio. --data is\n"
    "        recordings that were not trained on, or a token dataset; --split picks some of them.\n"
    "acoustic      --bundle, --data: recordings again from their semantic tokens; word errors, voice, quality.\n"
    "continuation  the same for continuations: is it the prompt's voice? Original, reconstruction, generation,\n"
    "              continuation and another speaker in one table. Recordings of 4 to 10 s, prompts of 3 s.\n"
    "sampling      --bundle, --data: quality and diversity over --temperature, --top_k, --top_p.\n"
    "piano         --bundle, --data: pitch classes, key, onsets of continuation and prompt.\n"
    "fad           --data, --generated: Fréchet distance of folders to recordings, by Resemblyzer or by the\n"
    "              encoder of --semantic_tokenizer. Judges are packages, chosen by --judge: docs/evaluation.md.\n"
    "detector  --detector, --data: generated or real? Accuracy and area under the curve on held-out speakers, for\n"
    "        each mode of generating; --data is the manifest of `audiolm detection-data` (docs/detector.md).\n"
    "speaker --classifier, --data: who is it? Accuracy on recordings that the classifier's training held out.\n\n"
    "Stopped or killed, the same command goes on where it was.\n\n"
    "  audiolm evaluate --suite=codec --codec=runs/codec --data=RECORDINGS --output=runs/quality\n"
    "  audiolm evaluate --suite=abx --semantic_tokenizer=runs/encoder --data=dev-clean.item --output=runs/abx"
)


def _add_evaluate(command):
    title = "Measure: results.json, each metric with its confidence interval, and report.html."
    added = command("evaluate", _evaluate, title, SUITES)
    added.add_argument("--suite", required=True, metavar="NAME", help="one of the above")
    _add_what_is_measured(added)
    _add_how_it_generates(added)
    added.add_argument("--seed", type=seed, default=0, help="of all sampling and of the bootstrap (default: 0)")
    added.add_argument("--output", required=True, metavar="DIR", help="new folder of the results")


def _add_what_is_measured(added):
    added.add_argument("--bundle", metavar="DIR", help="the whole model, as `audiolm bundle` makes it")
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
    text = "of the layers' frames, a multiple of the encoder's own: by passes shifted in between (default: its own)"
    added.add_argument("--frame_rate", type=float, metavar="HZ", help=text)
    added.add_argument("--detector", metavar="DIR", help="trained by --config=detector")
    added.add_argument("--classifier", metavar="DIR", help="trained by --config=speaker_classifier")
    added.add_argument("--data", metavar="PATH", help="recordings or sets as above: folder, file or .jsonl manifest")
    added.add_argument(
        "--generated", action="append", default=[], metavar="PATH", help="fad: generated recordings; repeatable"
    )
    added.add_argument(
        "--split", metavar="NAME", help="only these, such as validation (default: all; detector, speaker: validation)"
    )
    added.add_argument(
        "--judge",
        action="append",
        default=[],
        metavar="NAME",
        help="codec: si_sdr, log_mel_distance, pesq, stoi or visqol (default: all that are installed); others: one of "
        "a kind, whisper_base, whisper_tiny, pocketsphinx or whisper:MODEL, resemblyzer, dnsmos, basic_pitch (default: "
        "of each kind the first that is installed); repeatable",
    )


def _add_how_it_generates(added):
    for name, text in (
        ("prompt_seconds", "of each recording's beginning (default: 3, piano 4)"),
        ("seconds", "of new audio (default: 7, piano 16)"),
        ("min_seconds", "leave out shorter recordings (default: the paper's 4, piano both together)"),
        ("max_seconds", "leave out longer recordings (default: the paper's 10, piano none)"),
    ):
        added.add_argument(f"--{name}", type=float, metavar="s", help=text)
    added.add_argument("--num_samples", type=int, default=3, metavar="n", help="generations each (default: 3)")
    added.add_argument(
        "--stage",
        action="append",
        default=[],
        metavar="NAME",
        help="sampling: change these stages alone (default: all); repeatable",
    )
    grid: tuple[tuple[str, type, str], ...] = (
        ("temperature", float, "sampling: a point of the grid (default: 0.4 to 1.2)"),
        ("top_k", int, "the same (default: 0, all tokens)"),
        ("top_p", float, "the same (default: 1, all tokens)"),
    )
    for name, kind, text in grid:
        added.add_argument(f"--{name}", action="append", default=[], type=kind, help=f"{text}; repeatable")


def _evaluate(options, _):
    from audiolm_jax.evaluation.suites import Request, evaluate

    evaluate(
        Request(
            suite=options.suite,
            output=options.output,
            bundle=options.bundle,
            codec=options.codec,
            semantic_tokenizer=options.semantic_tokenizer,
            layers=options.layer,
            frame_rate=options.frame_rate,
            detector=options.detector,
            classifier=options.classifier,
            data=options.data,
            split=options.split,
            judges=options.judge,
            generated=options.generated,
            prompt_seconds=options.prompt_seconds,
            seconds=options.seconds,
            num_samples=options.num_samples,
            min_seconds=options.min_seconds,
            max_seconds=options.max_seconds,
            stages=options.stage,
            temperatures=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
        )
    )


def _add_detect(command):
    added = command(
        "detect",
        _detect,
        "Is it generated? A line of JSON for each recording: path, seconds, generated (its probability), verdict.",
        "The probability is the mean over windows of a second, one every quarter. A detector knows the model and the\n"
        "codec that it was trained on, and no other: none is shipped, docs/detector.md says how to train one.\n"
        "What cannot be read is named on standard error, and the exit status is then 2.\n\n"
        "  audiolm detect a.wav b.flac FOLDER --detector=runs/detector",
    )
    added.add_argument("inputs", nargs="+", metavar="WAV", help="recording, folder or .jsonl manifest")
    text = "trained by --config=detector: workdir, checkpoint or export; or a bundle made with --detector"
    added.add_argument("--detector", required=True, metavar="DIR", help=text)


def _detect(options, _):
    from audiolm_jax.evaluation.detection import detect

    detect(options.inputs, options.detector)
