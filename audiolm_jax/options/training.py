"""Options of the commands that train: quickstart, train, compile, sweep."""

import os

from audiolm_jax.errors import UserError
from audiolm_jax.options.strings import split


def add_commands(command):
    """Adds them by `command(name, function, summary, details, takes_overrides)`, which gives a parser of arguments."""
    _add_quickstart(command)
    _add_training(command)
    _add_compile(command)
    _add_sweep(command)


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
        "Train any objective: SoundStream, w2v-BERT, the semantic, coarse or fine language model, or a classifier.",
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

    launcher = split("--launcher", options.launcher)
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
