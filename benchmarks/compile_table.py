"""Compiles every shipped config for TPU slices and writes docs/topologies.md; no TPU is needed, only time.

    python benchmarks/compile_table.py                       # an hour or two on two cores; run again, it goes on
    python benchmarks/compile_table.py --only=coarse_librilight@v4:2x2x4

Each pair is one `audiolm compile`; its report stays in the workdir as CONFIG@TOPOLOGY.json. Delete those that are to be
compiled anew.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import jinja2
import tqdm

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOPOLOGIES = ("v4:2x2x4", "v5e:4x4", "v6e:4x4", "v5p:2x2x4", "v5e:16x16")
LARGE = (
    "coarse_librilight", "semantic_librilight", "fine_librilight", "w2v_bert_xl", "coarse_piano", "semantic_piano",
    "w2v_bert_piano",
)  # fmt: skip
# Convolutions keep the compiler busy for ten minutes: last.
CODECS = ("soundstream_base", "soundstream_piano")
TINY = (
    "soundstream_tiny", "w2v_bert_tiny", "semantic_tiny", "coarse_tiny", "fine_tiny", "soundstream_piano_tiny",
    "w2v_bert_piano_tiny", "semantic_piano_tiny", "coarse_piano_tiny",
)  # fmt: skip
PAIRS = [
    *((config, topology) for topology in TOPOLOGIES for config in LARGE),
    *((config, "v5e:2x2") for config in TINY),
    *((config, topology) for topology in TOPOLOGIES for config in CODECS),
]

PAGE = jinja2.Template(
    """\
# What each recipe needs on a TPU slice

Made by `python benchmarks/compile_table.py` with libtpu's own compiler, ahead of time and without a TPU; one row is
one `audiolm compile --config=… --topology=…` with the recipe as shipped. Nothing here was timed on hardware.

- *Memory*: the compiler's peak for a device, of what the device has.
- *FLOPs, traffic, sent*: of one device in one step. FLOPs of matrix products, convolutions and kernels, what is
  computed twice to save memory included; bytes to and from the device's memory; bytes sent to other devices.
- *Floor*: the least time of a step if computing, memory and network each ran at their peak and hid behind the longest
  of the three, which is in bold. Peak rates: `audiolm_jax/accelerators.py`.
- *Utilisation*: model FLOPs (the causal half of attention, nothing twice) over what the devices can do in that time: an
  upper bound.
- *Chip-hours*: all of the recipe's steps at the floor.

| config | slice | devices | weights | memory, GiB | TFLOP | traffic, GB | sent, GB | compute, s | memory, s | \
network, s | utilisation | chip-hours |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{% for r in reports if r.fits -%}
| {{ r.name }} | {{ r.topology }} | {{ r.num_devices }} | {{ "%.1f M" % (r.parameters / 1e6) }} | \
{{ "%.1f of %.0f" % (r.peak_bytes_per_device / 2**30, r.memory_bytes_per_device / 2**30) }} | \
{{ "%.3g" % (r.flops_per_device / 1e12) }} | {{ "%.3g" % (r.traffic_bytes_per_device / 1e9) }} | \
{{ "%.3g" % (r.collective_bytes_per_device / 1e9) }} | \
{% for term in ("compute", "memory", "network") -%}
{% set seconds = "%.3g" % r.floor_seconds[term] -%}
{{ "**" + seconds + "**" if r.floor_seconds[term] == r.step_seconds else seconds }} | \
{% endfor -%}
{{ "%.0f %%" % (100 * r.utilization) }} | {{ "%.0f" % (r.step_seconds * r.num_devices * r.steps / 3600) }} |
{% endfor %}
{% for r in reports if not r.fits -%}
- {{ r.name }} on {{ r.topology }} does not fit: {{ r.reason }}.
{% endfor -%}
"""
)


def compile_pair(config: str, topology: str, output: pathlib.Path):
    command = [sys.executable, "-m", "audiolm_jax", "compile", f"--config={config}", f"--topology={topology}"]
    done = subprocess.run([*command, f"--output={output}"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{config} on {topology}: {done.stderr.strip().splitlines()[-1]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, default=ROOT / "docs" / "topologies", help="of the reports")
    parser.add_argument(
        "--only", action="append", metavar="CONFIG@TOPOLOGY", help="compile this pair alone; repeatable"
    )
    options = parser.parse_args()
    options.workdir.mkdir(parents=True, exist_ok=True)
    reports = []
    for config, topology in tqdm.tqdm(PAIRS, desc="compile", unit="pair"):
        name = f"{config}@{topology}"
        path = options.workdir / f"{name.replace(':', '_')}.json"
        if not path.exists() and (options.only is None or name in options.only):
            compile_pair(config, topology, path)
        if path.exists():
            from audiolm_jax.config import load_config

            reports.append(
                {**json.loads(path.read_text()), "name": config, "steps": load_config(config).num_train_steps}
            )
    (ROOT / "docs" / "topologies.md").write_text(PAGE.render(reports=reports))


if __name__ == "__main__":
    main()
