"""Times audiolm_jax: training, decoding, codec, start-up and compiling, against audiolm-pytorch and the machine.

    python benchmarks/speed.py                               # on the CPU, one thread; alone
    bash benchmarks/make_peer.sh                             # once: audiolm-pytorch 2.4.0 in an environment of its own
    python benchmarks/speed.py --peer                        # both in one run: about 25 minutes
    python benchmarks/speed.py --sizes=paper                 # on a GPU: the recipes' sizes in bfloat16
    python benchmarks/speed.py --page                        # docs/speed.md anew from the results there are

It prints one table and keeps every time measured, with the machine named, as JSON in benchmarks/results/; of those
docs/speed.md is made. Where the peer is timed, ours is timed before and after it. On the CPU everything runs on one
core, which nothing else should use meanwhile.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jinja2

from audiolm_jax import huge_pages

ROOT = pathlib.Path(__file__).resolve().parent.parent
HERE = ROOT / "benchmarks"
RESULTS = HERE / "results"
STAGES = ("semantic", "coarse", "fine")

PAPER_STAGE = {"num_clusters": 1024, "codebook_size": 1024, "num_quantizers": 12, "num_coarse_quantizers": 4}
PAPER_CODEC = {"channels": 32, "strides": [2, 4, 5, 8], "embed_dim": 64, "hop_length": 320, "frames": 200}
# Five seconds of audio: condition tokens and frames to sample. The fine stage takes them as `generate` does, in chunks
# as one batch; the peer decodes them as one sequence.
FIVE_SECONDS = {
    "semantic": {"condition": 0, "frames": 125, "chunks": 1},
    "coarse": {"condition": 125, "frames": 250, "chunks": 1},
    "fine": {"condition": 1000, "frames": 250, "chunks": 2},
}
SIZES: dict[str, dict[str, Any]] = {
    # Width 512, 6 layers, 8 heads of 64. The peer's heads share one key and value and its feed-forward is gated, 1365
    # wide: with heads of their own, the width that comes nearest its number of parameters without being below is 1088.
    "peer": {
        "threads": 1,
        "model": {
            "num_layers": 6,
            "num_heads": 8,
            "embed_dim": 512,
            "mlp_dim": 1088,
            "gated_mlp": True,
            "dropout_rate": 0.0,
            "block_positions": 128,
            "dtype": "float32",
            "remat": "none",
            "unrolled_layers": 6,
        },
        "stage": PAPER_STAGE,
        "codec": PAPER_CODEC,
        "decode": FIVE_SECONDS,
        "step_batches": [1, 16],
        "train": {"semantic": [0, 150], "coarse": [62, 500], "fine": [200, 400]},
        "train_batch": 2,
        "clip_norm": 0.5,
        "matmul_rows": 2048,
        "repeats": 3,
        "budget": 20.0,
    },
    # The recipes semantic_, coarse_ and fine_librilight, whole crops, without dropout.
    "paper": {
        "threads": None,
        "model": {"num_layers": 12, "embed_dim": 1024, "dropout_rate": 0.0, "dtype": "bfloat16"},
        "stage": PAPER_STAGE,
        "codec": PAPER_CODEC,
        "encoder": {},
        "decode": FIVE_SECONDS,
        "step_batches": [1, 16],
        "train": {"semantic": [0, 750], "coarse": [250, 2000], "fine": [600, 1200]},
        "train_batch": 16,
        "clip_norm": 1.0,
        "continuation": {"prompt_seconds": 3.0, "seconds": 10.0},
        "matmul_rows": 8192,
        "repeats": 5,
        "budget": 20.0,
    },
    # What a test runs in a minute; nothing of it means anything.
    "tiny": {
        "threads": 1,
        "model": {
            "num_layers": 2,
            "num_heads": 2,
            "embed_dim": 32,
            "mlp_dim": 64,
            "dropout_rate": 0.0,
            "block_positions": 16,
            "dtype": "bfloat16",
        },
        "stage": {"num_clusters": 16, "codebook_size": 16, "num_quantizers": 3, "num_coarse_quantizers": 1},
        "codec": {"channels": 2, "strides": [2, 4, 5, 8], "embed_dim": 8, "hop_length": 320, "frames": 10},
        "encoder": {
            "embed_dim": 16,
            "mlp_dim": 16,
            "num_heads": 2,
            "subsampling_channels": 2,
            "num_contrastive_layers": 1,
            "num_masked_layers": 1,
            "codebook_size": 8,
            "codebook_dim": 8,
            "default_layer": 1,
        },
        "decode": {
            "semantic": {"condition": 0, "frames": 25, "chunks": 1},
            "coarse": {"condition": 10, "frames": 20, "chunks": 1},
            "fine": {"condition": 20, "frames": 20, "chunks": 2},
        },
        "step_batches": [1, 2],
        "train": {"semantic": [0, 20], "coarse": [10, 20], "fine": [20, 40]},
        "train_batch": 2,
        "clip_norm": 1.0,
        "continuation": {"prompt_seconds": 0.2, "seconds": 0.4},
        "matmul_rows": 64,
        "repeats": 1,
        "budget": 1.0,
    },
}

# What the project wants of the size "peer": at least so many times the peer's speed, at most so many times the floor.
TARGETS = {
    "decode/semantic": ("x_peer", 4.0),
    "decode/coarse": ("x_peer", 10.0),
    "decode/fine": ("x_peer", 30.0),
    **{f"train/{stage}": ("x_peer", 1.1) for stage in STAGES},
    "step/1": ("x_floor", 1.8),
    "step/16": ("x_floor", 2.5),
    **{f"utilisation/{stage}": ("ours", 60.0) for stage in STAGES},
}

STARTUP = {
    "startup/help": ["-m", "audiolm_jax", "--help"],
    "startup/import": ["-c", "import audiolm_jax"],
    "startup/import_all": ["-c", "import audiolm_jax; audiolm_jax.load_bundle; audiolm_jax.AudioLM"],
}

TABLE = jinja2.Template(
    """\
| what | unit | ours | floor | x floor | peer | x peer | target |
| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |
{% for row in rows -%}
| {{ row.what }} | {{ row.unit }} | {{ number(row.ours) }} | {{ number(row.floor) }} | {{ number(row.x_floor) }} | \
{{ number(row.peer) }} | {{ number(row.x_peer) }} | {{ row.target }} |
{% endfor %}"""
)

PAGE = jinja2.Template(
    """\
# Speed

Made by `python benchmarks/speed.py` from the JSON in `benchmarks/results/`. Medians; weights are random.

- *x floor*: our time over the least time that the machine allows. *x peer*: the time of audiolm-pytorch 2.4.0 over
  ours.
- *Floors* rest on what was measured in the same process: reading as many bytes as a step's weights have, and the
  fastest of three matrix products of the model's width; where the accelerator is a known one, on its data sheet
  instead. A decode step's floor is reading the weights it needs once: the layers, one level's columns of the output
  matrix. For several rows, and for the decoding of a stage, it is the larger of reading weights, keys and values, and
  of two FLOPs a weight and row. A training step's floor is six FLOPs a weight and token, the embedding's weights
  aside; on a known accelerator the causal half of attention comes to it.
- *The peer* has its key/value cache on and its end token off, and its flash attention off, since with it its logits
  are wrong; it trains with its own AdamW and clipping. Its import is without fairseq, torchaudio and wandb.
- Both run with memory in pages of 2 MiB, as `audiolm` starts itself on Linux.
- *Compiling* is the first call less a later one; where one call takes a minute, that is good to a second or two.
- *A step* of decoding is what all steps took, less the prefix, over their number; the peer's holds its prefix of one.
{% for result in results %}
## {{ result.title }}

{{ result.machine.processor }}, {{ result.machine.memory_gib }} GiB; {{ result.description }}. \
Commit {{ result.commit }}, {{ result.date }}, jax {{ result.ours.facts.jax }}\
{% if result.peer %}, torch {{ result.peer.facts.torch }}{% endif %}. \
Measured: {{ "%.1f" % (result.ours.facts.bandwidth / 1e9) }} GB/s, \
{{ "%.4g" % (result.ours.facts.matmul_rate / 1e9) }} GFLOP/s\
{% if result.ours.facts.peak %} (data sheet: {{ "%.0f" % (result.ours.facts.peak.bandwidth / 1e9) }} GB/s, \
{{ "%.0f" % (result.ours.facts.peak.flops / 1e9) }} GFLOP/s){% endif %}. \
Parameters: {{ result.parameters }}. The share of the core that the processes got: \
{{ "%.2f" % result.ours.facts.core_share }}{% if result.peer %} (peer {{ "%.2f" % result.peer.facts.core_share }})\
{% endif %}.

{{ result.table }}
{%- endfor %}
"""
)


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# --- running


def run_child(command: list[str], core: int | None, python_path: bool) -> float:
    """Runs a program on one core (all where None) and returns how long it took; what it says on stderr is shown."""
    environment = {**os.environ, "TQDM_DISABLE": "1", "LOGURU_LEVEL": "ERROR"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    environment.pop("PYTHONPATH", None)
    if python_path:
        environment["PYTHONPATH"] = str(ROOT)
    if core is not None:
        # The affinity is set before anything asks how many cores there are: thread pools then have one thread.
        environment |= {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        # As `audiolm` does for itself; the peer gets the same memory.
        environment |= {huge_pages.VARIABLE: huge_pages.SETTING}
    pin = None if core is None else lambda: os.sched_setaffinity(0, {core})
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, preexec_fn=pin, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"error: status {done.returncode}: {' '.join(command[:2])}; see its message above")
    return time.perf_counter() - start


def measured(python: str, script: str, size: dict, core: int | None) -> dict:
    """What `ours.py` or `peer.py` measures."""
    print(f"speed: {script}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder) / "measured.json"
        command = [python, str(HERE / script), json.dumps(size), str(output)]
        run_child(command, core, python_path=script == "ours.py")
        return json.loads(output.read_text())


def merged(first: dict, second: dict) -> dict:
    """Two runs of the same measurements as one; floors are the lower of both, that is, rates the higher."""
    seconds = {name: times + second["seconds"][name] for name, times in first["seconds"].items()}
    facts = dict(first["facts"])
    for rate in ("matmul_rate", "bandwidth"):
        facts[rate] = max(facts[rate], second["facts"][rate])
    facts["core_share"] = min(facts["core_share"], second["facts"]["core_share"])
    return {"facts": facts, "seconds": seconds}


def measure_startup(commands: dict[str, list[str]], core: int | None, ours: bool, repeats: int) -> dict:
    """Whole processes, after one that brings the files into memory."""
    for command in commands.values():
        run_child(command, core, ours)
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            times[name].append(run_child(command, core, ours))
    return times


def machine() -> dict:
    cpuinfo = pathlib.Path("/proc/cpuinfo").read_text()
    name = re.search(r"model name\s*: (.*)", cpuinfo)
    memory = re.search(r"MemTotal:\s*(\d+)", pathlib.Path("/proc/meminfo").read_text())
    return {
        "processor": name[1].strip() if name else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory[1]) / 2**20) if memory else None,
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }


def commit() -> str:
    git = lambda *arguments: subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True).stdout
    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short", "HEAD").strip() + (" with changes" if changed else "")


# --- the table


def make_row(key: str, what: str, unit: str, times: dict, floor: float | None = None, amount: float | None = None):
    """One row; `amount` turns seconds into so much a second, the unit "ms" into milliseconds.

    Args:
      times: median seconds of "ours" and of the "peer" (None where it was not timed).
      floor: in seconds.
    """
    shown = lambda seconds: (
        None if seconds is None else amount / seconds if amount else seconds * (1e3 if unit == "ms" else 1)
    )
    ours, peer = times["ours"], times["peer"]
    return {
        "key": key,
        "what": what,
        "unit": unit,
        "ours": shown(ours),
        "floor": shown(floor),
        "x_floor": ours / floor if floor else None,
        "peer": shown(peer),
        "x_peer": peer / ours if peer else None,
        "target": "",
    }


def make_rows(ours: dict, peer: dict | None, size: dict) -> list[dict]:
    """The table's rows, from what was measured."""

    def median(name: str, of: str = "") -> dict:
        """Median times of both; with `of`, the first call `name` less the median of `of`."""

        def seconds(measured: dict | None):
            if measured is None or name not in measured["seconds"]:
                return None
            later = statistics.median(measured["seconds"][of]) if of else 0.0
            return max(statistics.median(measured["seconds"][name]) - later, 0.0)

        return {"ours": seconds(ours), "peer": seconds(peer)}

    facts, rows = ours["facts"], []
    peak = facts.get("peak")
    rate = peak["flops"] if peak else facts["matmul_rate"]
    bandwidth = peak["bandwidth"] if peak else facts["bandwidth"]

    def step_floor(decode: dict, batch: int) -> float:
        read = (decode["step_bytes"] + batch * decode["cache_bytes"]) / bandwidth
        return max(read, 2 * batch * decode["step_weights"] / rate)

    for stage in STAGES:
        decode = facts["decode"][stage]
        chunks = decode["chunks"]
        floor = decode["tokens"] / chunks * step_floor(decode, chunks)
        what = f"{stage}: decode {decode['tokens']} tokens" + (f", {chunks} chunks at once" if chunks > 1 else "")
        rows.append(make_row(f"decode/{stage}", what, "tokens/s", median(f"decode/{stage}"), floor, decode["tokens"]))
    for stage in STAGES:
        decode = facts["decode"][stage]
        positions = decode["chunks"] * decode["prefix"]
        floor = max(2 * positions * decode["step_weights"] / rate, decode["step_bytes"] / bandwidth)
        what = f"{stage}: prefix of {positions}"
        rows.append(make_row(f"prefill/{stage}", what, "ms", median(f"prefill/{stage}"), floor))
    for batch in size["step_batches"]:
        decode = facts["decode"]["semantic"]
        floor = decode["step_bytes"] / bandwidth if batch == 1 else step_floor(decode, batch)
        rows.append(make_row(f"step/{batch}", f"semantic: a step, batch {batch}", "ms", median(f"step/{batch}"), floor))
    for stage in ("coarse", "fine"):
        decode = facts["decode"][stage]
        what = f"{stage}: a step, batch {decode['chunks']}"
        rows.append(make_row(f"step/{stage}", what, "ms", median(f"step/{stage}"), decode["step_bytes"] / bandwidth))
    for stage in STAGES:
        train, times = facts["train"][stage], median(f"train/{stage}")
        floor = train["flops_causal" if peak else "flops_6n"] / rate
        what = f"{stage}: training step, {train['tokens']} tokens"
        rows.append(make_row(f"train/{stage}", what, "ms", times, floor))
    for stage in STAGES:
        row = next(row for row in rows if row["key"] == f"train/{stage}")
        empty = {name: None for name in ("floor", "x_floor", "peer", "x_peer")}
        what = f"{stage}: utilisation in training ({'causal' if peak else '6 N'})"
        rows.append({**row, **empty, "key": f"utilisation/{stage}", "what": what, "unit": "%"})
        rows[-1]["ours"] = 100 / row["x_floor"]
    for name in ("encode", "decode"):
        floor = facts["codec"]["flops"][name] / facts["matmul_rate"]
        what = f"codec: {name} {size['codec']['frames']} frames"
        rows.append(make_row(f"codec/{name}", what, "ms", median(f"codec/{name}"), floor))
    if "continuation" in facts:
        what = f"continuation, {facts['continuation']['seconds']:g} s: everything"
        rows.append(make_row("continuation", what, "s", median("continuation")))
    for kind in ("decode", "train"):
        for stage in STAGES:
            name = f"{kind}/{stage}"
            rows.append(make_row(f"compile/{name}", f"{stage}: compile {kind}", "s", median(f"compile/{name}", name)))
            # The peer compiles nothing: its first call is as long as the others, or was of another length.
            rows[-1] |= {"peer": None, "x_peer": None}
    labels = {"help": "audiolm --help", "import": "import the package", "import_all": "import what generates"}
    for name, label in labels.items():
        rows.append(make_row(f"startup/{name}", f"start: {label}", "s", median(f"startup/{name}")))
    return rows


def with_targets(rows: list[dict]) -> list[dict]:
    """Rows that say what is wanted and whether it is reached."""
    for row in rows:
        column, wanted = TARGETS.get(row["key"], (None, 0.0))
        if column is None or row[column] is None:
            continue
        reached = row[column] <= wanted if column == "x_floor" else row[column] >= wanted
        sign, name = ("≤" if column == "x_floor" else "≥"), column.replace("_", " ")
        row["target"] = f"{name} {sign} {wanted:g}: {'met' if reached else 'missed'}"
    return rows


def parameters(ours: dict, peer: dict | None) -> str:
    """Numbers of parameters, of ours and the peer's."""
    counts = {stage: facts["parameters"] for stage, facts in ours["facts"]["train"].items()}
    counts |= {"layers": ours["facts"]["train"]["semantic"]["layers"], "codec": ours["facts"]["codec"]["parameters"]}
    other = peer["facts"]["parameters"] if peer else {}
    text = lambda name: f" (peer {other[name] / 1e6:.2f} M)" if name in other else ""
    return ", ".join(f"{name} {value / 1e6:.2f} M{text(name)}" for name, value in counts.items())


def write_page():
    """docs/speed.md, from all results."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    for result in results:
        result["table"] = TABLE.render(rows=result["rows"], number=number)
    (ROOT / "docs" / "speed.md").write_text(PAGE.render(results=results))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", choices=SIZES, default="peer", help="default: peer")
    parser.add_argument("--peer", action="store_true", help="time audiolm-pytorch, too (size peer only)")
    parser.add_argument("--peer-python", type=pathlib.Path, default=ROOT / ".peer-venv" / "bin" / "python")
    parser.add_argument("--core", type=int, help="that everything runs on, where it is one; default: the last")
    parser.add_argument("--output", type=pathlib.Path, help="JSON; default: benchmarks/results/SIZES-PROCESSOR.json")
    parser.add_argument("--page", action="store_true", help="measure nothing, only write docs/speed.md")
    options = parser.parse_args()
    if options.page:
        write_page()
        return
    size, peer = SIZES[options.sizes], None
    if options.peer and options.sizes != "peer":
        parser.error("--peer: only with --sizes=peer")
    if options.peer and not options.peer_python.exists():
        parser.error(f"no {options.peer_python}: run benchmarks/make_peer.sh first, or give --peer-python")
    core = None
    if size["threads"] == 1:
        core = max(os.sched_getaffinity(0)) if options.core is None else options.core
    result = {"sizes": options.sizes, "machine": machine(), "commit": commit()}
    result["date"] = datetime.date.today().isoformat()
    ours = measured(sys.executable, "ours.py", size, core)
    if options.peer:
        python = str(options.peer_python)
        peer = measured(python, "peer.py", size, core)
        ours = merged(ours, measured(sys.executable, "ours.py", size, core))
        imports = {"startup/import_all": [python, str(HERE / "peer.py")]}
        peer["seconds"] |= measure_startup(imports, core, ours=False, repeats=size["repeats"])
    commands = {name: [sys.executable, *command] for name, command in STARTUP.items()}
    ours["seconds"] |= measure_startup(commands, core, ours=True, repeats=size["repeats"])
    rows = make_rows(ours, peer, size)
    if options.sizes == "peer":
        rows = with_targets(rows)
    on_device = "one thread" if core is not None else f"{ours['facts']['device']}"
    processor = result["machine"]["processor"] if core is not None else ours["facts"]["device"]
    model = "width {embed_dim}, {num_layers} layers, {dtype}".format(**size["model"])
    result |= {
        "title": f"{options.sizes.capitalize()} sizes on {processor}",
        "description": f"{on_device}, {model}",
        "parameters": parameters(ours, peer),
        "size": size,
        "rows": rows,
        "ours": ours,
        "peer": peer,
    }
    slug = re.sub(r"[^a-z0-9]+", "-", f"{options.sizes}-{processor}".lower()).strip("-")
    output = options.output or RESULTS / f"{slug}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    if output.resolve().parent == RESULTS:
        write_page()
    print(result["description"], "|", result["parameters"])
    print(TABLE.render(rows=rows, number=number))


if __name__ == "__main__":
    main()
