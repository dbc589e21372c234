"""Long continuations: is memory flat, when is the first sound heard, do windows, chunks and blocks join without a seam?

    python benchmarks/length.py --bundle=BUNDLE --prompt=RECORDING                # 60 s, and 10, 20 and 40 s
    python benchmarks/length.py --bundle=BUNDLE --prompt=RECORDING --seconds=600  # ten minutes, and 100, 200, 400 s
    python benchmarks/length.py --page                                            # docs/length.md anew

After a warm-up that compiles, it streams continuations of each length without keeping them, watching the process's
resident memory and JAX's live arrays; then several at once, whose borders it compares with their inside. What it
measures stays as JSON in benchmarks/results/length/; docs/length.md and its pictures are made of that.

Shape suffixes: B rows, W samples, T frames, M mel bins, Q quantizer levels.
"""

import argparse
import datetime
import gc
import itertools
import json
import os
import pathlib
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jinja2
import matplotlib.figure
import numpy as np
import scipy.stats

import audiolm_jax
from audiolm_jax import audio
from audiolm_jax.codec.codec import Codec
from audiolm_jax.generate import AudioLM
from audiolm_jax.spectral import mel_spectrogram
from audiolm_jax.windows import Windows

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from speed import RESULTS, commit, machine  # noqa: E402

RESULTS = RESULTS / "length"
FRACTIONS = (1 / 6, 1 / 3, 2 / 3, 1)
SAMPLING_SECONDS = 0.02
NUM_MELS, LOG_FLOOR = 40, 1e-5
QUANTILES = (5, 25, 50, 75, 95)

# --- memory and time


class Memory:
    """A context that watches what the process occupies while it lasts: at its beginning, and at most.

    Attributes:
      resident_start, resident_peak: bytes of the process in memory.
      arrays_peak: bytes of all live JAX arrays, programs' temporaries aside.
    """

    def __enter__(self) -> "Memory":
        gc.collect()
        self.resident_start = self.resident_peak = resident_bytes()
        self.arrays_peak = array_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _watch(self):
        while not self._stop.wait(SAMPLING_SECONDS):
            self.resident_peak = max(self.resident_peak, resident_bytes())
            self.arrays_peak = max(self.arrays_peak, array_bytes())


def resident_bytes() -> int:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def array_bytes() -> int:
    return sum(array.nbytes for array in jax.live_arrays() if not array.is_deleted())


def measure_stream(model: AudioLM, prompt_1W: np.ndarray, seconds: float, seed: int) -> dict[str, Any]:
    """Streams one continuation, keeping nothing.

    Returns:
      `seconds` of new audio; `first_sound` and `total` seconds from the request to the first and the last new block;
      `wait`: how long a player waits, from the request, so as never to run dry; `cores`: the processor's time over that
      of the clock; and the fields of `Memory`, in bytes.
    """
    rate, heard = model.codec.sample_rate, -prompt_1W.shape[1]
    arrivals = []
    with Memory() as memory:
        start, processor_start = time.perf_counter(), time.process_time()
        for block in model.stream(prompt_1W, seconds=seconds, seed=seed, ignore_end=True):
            heard_before, heard = max(heard, 0), heard + block.wave_BW.shape[1]
            if heard > 0:
                arrivals.append((heard_before / rate, time.perf_counter() - start))
        processor_seconds = time.process_time() - processor_start
    return {
        "seconds": seconds,
        "first_sound": arrivals[0][1],
        "total": arrivals[-1][1],
        "wait": max(arrival - position for position, arrival in arrivals),
        "cores": processor_seconds / arrivals[-1][1],
        "resident_start": memory.resident_start,
        "resident_peak": memory.resident_peak,
        "arrays_peak": memory.arrays_peak,
    }


# --- seams


def watch(windows: Windows) -> tuple[np.ndarray, dict[str, list[int]]]:
    """Runs a generation whose rows have the same length, never end, and have a prompt that a window takes in whole.

    Returns:
      wave_BW and the frames that begin behind each kind of border; a frame may begin behind several.
    """
    waves, lengths = [], []
    for block in windows:
        waves.append(block.wave_BW)
        lengths.append(block.wave_BW.shape[1])
    codec, first, last = windows.codec, windows.rows[0].prompt_frames, windows.rows[0].total_frames
    size, carried = windows.window_frames
    borders = {"prompt": {first}, "coarse window": set(range(size, last, size - carried))}
    if "fine" in windows.stages:
        size, carried = windows.chunk_frames
        borders["fine chunk"] = set(range(first, last, size - carried))
    borders["decoded block"] = {samples // codec.hop_length for samples in itertools.accumulate(lengths)}
    new = {kind: sorted(frame for frame in frames if first < frame < last) for kind, frames in borders.items()}
    return np.concatenate(waves, axis=1), {**new, "prompt": [first]}


def log_mel(wave_BW: np.ndarray, codec: Codec) -> np.ndarray:
    """Log-mel spectra of the samples of each codec frame alone: float32 [B, T, M], in nats."""
    hop = codec.hop_length
    mel_BTM = mel_spectrogram(wave_BW, codec.sample_rate, hop, hop, NUM_MELS, fft_length=max(512, hop))
    return np.log(np.maximum(np.asarray(mel_BTM), LOG_FLOOR))


def changes(wave_BW: np.ndarray, codec: Codec, after_BW: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """How much the sound changes where each frame begins: measures [B, T], NaN at frame 0.

    Args:
      wave_BW: whole frames.
      codec: whose frames.
      after_BW: another sound to go over to; by default this one goes on.

    Returns:
      "sample jump", from the last sample before to the first of the frame, and "log-mel distance", the mean over bins
      between the frame before and the frame.
    """
    after_BW = wave_BW if after_BW is None else after_BW
    hop = codec.hop_length
    before_BTM, after_BTM = (log_mel(sound_BW, codec) for sound_BW in (wave_BW, after_BW))
    jump_BT = np.abs(after_BW[:, hop::hop] - wave_BW[:, hop - 1 : -1 : hop])
    distance_BT = np.abs(after_BTM[:, 1:] - before_BTM[:, :-1]).mean(axis=-1)
    nothing = ((0, 0), (1, 0))
    measures = {"sample jump": jump_BT, "log-mel distance": distance_BT}
    return {name: np.pad(value_BT, nothing, constant_values=np.nan) for name, value_BT in measures.items()}


def compare(at_border: np.ndarray, inside: np.ndarray) -> dict[str, Any]:
    """Are values at borders larger than those inside?

    Returns:
      `count`; `border` and `inside`, their `QUANTILES`; `rank`, the share of the values inside that are as large as one
      at a border, on average (1/2 where borders are like the inside, 0 where all are larger); and `p`, the probability
      of so low a rank if they are alike (one-sided Mann-Whitney).
    """
    test = scipy.stats.mannwhitneyu(at_border, inside, alternative="greater")
    return {
        "count": len(at_border),
        "border": np.percentile(at_border, QUANTILES).tolist(),
        "inside": np.percentile(inside, QUANTILES).tolist(),
        "rank": 1 - float(test.statistic) / (len(at_border) * len(inside)),
        "p": float(test.pvalue),
    }


def measure_seams(wave_BW: np.ndarray, codes_BTQ: np.ndarray, borders: dict[str, list[int]], codec: Codec):
    """Rows of the table of seams, with two controls that must be seen.

    Args:
      wave_BW, borders: as `watch` returns them, the samples cut to whole frames.
      codes_BTQ: what the waveform was decoded from.
      codec: that decoded it.
    """
    first, last = borders["prompt"][0], wave_BW.shape[1] // codec.hop_length
    inside = sorted(set(range(first, last)) - set(itertools.chain(*borders.values())))
    found = changes(wave_BW, codec)
    block_frames = borders["decoded block"]
    forgetful = changes(decode_forgetfully(codec, codes_BTQ, block_frames), codec)
    swapped = changes(wave_BW, codec, np.roll(wave_BW, 1, axis=0))
    rows = []
    for measure, value_BT in found.items():
        inside_N = value_BT[:, inside].ravel()
        at = {kind: value_BT[:, frames] for kind, frames in borders.items()}
        at["control: a decoder that forgets"] = forgetful[measure][:, block_frames]
        at["control: another row goes on"] = swapped[measure][:, borders["coarse window"]]
        rows += [{"measure": measure, "kind": kind, **compare(v.ravel(), inside_N)} for kind, v in at.items() if v.size]
    # What a frame's first sample does at all: the transposed convolutions have the frames' period.
    steps_BW = np.abs(np.diff(wave_BW[:, first * codec.hop_length :], axis=1))
    whole = {"measure": "sample jump", "kind": "every frame, among all samples"}
    rows.append({**whole, **compare(found["sample jump"][:, inside].ravel(), steps_BW.ravel())})
    return rows


def decode_forgetfully(codec: Codec, codes_BTQ: np.ndarray, starts: Sequence[int]) -> np.ndarray:
    """Decodes with a decoder that begins anew at some frames: what a broken stream would sound like."""
    pieces = np.split(codes_BTQ, starts, axis=1)
    return np.concatenate([np.asarray(codec.decode(piece_BTQ)) for piece_BTQ in pieces if piece_BTQ.size], axis=1)


# --- everything


def measure(model: AudioLM, prompt_1W: np.ndarray, seconds: float, num_rows: int, seed: int) -> dict[str, Any]:
    """What the JSON holds of one bundle on one machine."""
    for warm_up in (seconds, seconds * FRACTIONS[0]):
        say(f"warming up: {warm_up:g} s")
        measure_stream(model, prompt_1W, warm_up, seed)
    runs = []
    for share in (*FRACTIONS, *FRACTIONS[::-1]):
        runs.append(measure_stream(model, prompt_1W, seconds * share, seed))
        say("{seconds:g} s: first sound after {first_sound:.2f} s, all after {total:.2f} s".format(**runs[-1]))
    request = {"seconds": seconds, "num_samples": num_rows, "seed": seed, "ignore_end": True}
    say(f"seams: {num_rows} rows at once, streamed and not")
    windows = model.stream(prompt_1W, **request)
    wave_BW, borders = watch(windows)
    whole = model.generate(prompt_1W, **request)
    offline_BW = np.asarray(model.codec.decode(whole.acoustic_BTQ))[:, : wave_BW.shape[1]]
    frames = wave_BW.shape[1] // model.codec.hop_length
    wave_BW = wave_BW[:, : frames * model.codec.hop_length]
    return {
        "runs": sorted(runs, key=lambda run: run["seconds"]),
        "rows": num_rows,
        "borders": borders,
        "seams": measure_seams(wave_BW, whole.acoustic_BTQ[:, :frames], borders, model.codec),
        "streamed_less_whole": float(np.abs(wave_BW - whole.wave_BW[:, : wave_BW.shape[1]]).max()),
        "streamed_less_offline": float(np.abs(wave_BW - offline_BW[:, : wave_BW.shape[1]]).max()),
        "level": float(np.sqrt(np.mean(np.square(wave_BW)))),
    }


def facts(model: AudioLM) -> dict[str, Any]:
    """The bundle in figures: parameters and crop of each stage, and the device it runs on."""
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "crops": {name: lm.stage.crop_seconds for name, lm in model.stages.items()},
        "parameters": {"codec": count(model.codec.weights)}
        | {name: count(lm.params) for name, lm in model.stages.items()},
    }


def say(line: str):
    print(f"length: {line}", file=sys.stderr, flush=True)


# --- the page

PAGE = jinja2.Template(
    """\
# Length

Made by `python benchmarks/length.py` from the JSON in `benchmarks/results/length/`: continuations of one prompt, end
tokens off, after calls that compiled all programs.

- *Memory*: the process's resident memory before the request and at most during it, and JAX's live arrays at most
  (weights, caches, the decoder's state); looked at {{ per_second }} times a second. Of the audio nothing is kept.
- *First sound*: from the request to the first block of new audio, that is, the prompt's tokens and one window of each
  stage. *Wait*: how long after the request playing may begin without ever running dry.
- *Seams*: at the first sample of a frame, the jump from the sample before; and the mean distance of the log-mel spectra
  ({{ num_mels }} bins, nats) of the frames on both sides. Borders are compared with all other frames of the new audio.
  *Rank* is the share of frames inside that change as much as a border, on average: 0.5 where borders are like the
  inside, 0 where every border stands out. *p* is the probability of so low a rank by chance (one-sided Mann-Whitney;
  no correction for the number of comparisons; the continuations have the end of their prompt in common).
- *Controls* are seams made on purpose: the same codes decoded by a decoder that forgets its state at every block, and
  another row that goes on where a coarse window begins.
{% for result in results %}
## {{ result.title }}

{{ result.machine.processor }}, {{ result.machine.cores }} core{{ "s" if result.machine.cores > 1 }}, \
{{ result.machine.memory_gib }} GiB. Commit {{ result.commit }}, {{ result.date }}, jax {{ result.model.jax }}. \
Crops: {% for name, crop in result.model.crops.items() %}{{ name }} {{ "%g" % crop }} s{{ ", " if not loop.last }}\
{% endfor %}. Parameters: {% for name, count in result.model.parameters.items() %}{{ name }} \
{{ "%.2f" % (count / 1e6) }} M{{ ", " if not loop.last }}{% endfor %}. \
Prompt: {{ "%g" % result.prompt_seconds }} s. Two runs of each length, the slower and the larger of both.

![Memory, time and seams](length-{{ result.slug }}.png)

| seconds | first sound, s | wait, s | all, s | all / seconds | cores used | resident before, MiB | at most, MiB | \
arrays, MiB |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{%- for run in result.lengths %}
| {{ "%g" % run.seconds }} | {{ "%.2f" % run.first_sound }} | {{ "%.2f" % run.wait }} | {{ "%.1f" % run.total }} | \
{{ "%.2f" % (run.total / run.seconds) }} | {{ "%.2f" % run.cores }} | {{ "%.1f" % run.resident_start }} | \
{{ "%.1f" % run.resident_peak }} | {{ "%.2f" % run.arrays_peak }} |
{%- endfor %}

Streamed less not streamed: at most {{ "%.1g" % result.streamed_less_whole }}; less the decoder over all codes at \
once: {{ "%.1g" % result.streamed_less_offline }} (the sound's level: {{ "%.2g" % result.level }}).

Seams, of {{ result.rows }} continuations of {{ "%g" % result.lengths[-1].seconds }} s; medians and 95th percentiles:

| measure | where | number | there | 95 % | inside | 95 % | rank | p |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{%- for row in result.seams %}
| {{ row.measure }} | {{ row.kind }} | {{ row.count }} | {{ "%.3g" % row.border[2] }} | {{ "%.3g" % row.border[4] }} | \
{{ "%.3g" % row.inside[2] }} | {{ "%.3g" % row.inside[4] }} | {{ "%.2f" % row.rank }} | {{ "%.2g" % row.p }} |
{%- endfor %}
{% endfor -%}
"""
)


def by_length(runs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """For each length the worse of its runs; memory in MiB."""
    for seconds, group in itertools.groupby(runs, key=lambda run: run["seconds"]):
        members = list(group)
        worst = {name: max(run[name] for run in members) for name in members[0] if name != "seconds"}
        worst["cores"] = min(run["cores"] for run in members)
        mebibytes = {name: worst[name] / 2**20 for name in ("resident_start", "resident_peak", "arrays_peak")}
        yield {"seconds": seconds, **worst, **mebibytes}


def draw(result: dict[str, Any], path: pathlib.Path):
    """The picture of one result: memory and time over length, and how much borders change beside the inside."""
    figure = matplotlib.figure.Figure(figsize=(12, 3.6), layout="constrained")
    memory, times, seams = figure.subplots(1, 3, width_ratios=(1, 1, 1.5))
    over = lambda name: [run[name] for run in result["lengths"]]
    memory.plot(over("seconds"), over("resident_peak"), marker="o", label="resident, at most")
    memory.plot(over("seconds"), over("arrays_peak"), marker="o", label="JAX arrays, at most")
    memory.set(xlabel="seconds of new audio", ylabel="MiB", ylim=(0, None), title="Memory")
    times.plot(over("seconds"), over("total"), marker="o", label="all")
    times.plot(over("seconds"), over("first_sound"), marker="o", label="first sound")
    times.set(xlabel="seconds of new audio", ylabel="seconds", ylim=(0, None), title="Time")
    rows = [row for row in result["seams"] if row["measure"] == "log-mel distance"]
    spans = [("inside", rows[0]["inside"]), *((row["kind"], row["border"]) for row in rows)]
    for height, (_, (low, lower, middle, upper, high)) in enumerate(spans):
        color = "C0" if height == 0 else "C3" if spans[height][0].startswith("control") else "C1"
        seams.plot([low, high], [height, height], color=color)
        seams.plot([lower, upper], [height, height], color=color, linewidth=7, solid_capstyle="butt", alpha=0.5)
        seams.plot([middle], [height], color=color, marker="o")
    seams.set_yticks(range(len(spans)), [name for name, _ in spans])
    seams.invert_yaxis()
    seams.set(xlabel="log-mel distance (5, 25, 50, 75, 95 %)", xlim=(0, None), title="Seams")
    for axes in (memory, times):
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def write_page():
    """docs/length.md and its pictures, from all results."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    for result in results:
        result["lengths"] = list(by_length(result["runs"]))
        draw(result, ROOT / "docs" / f"length-{result['slug']}.png")
    page = PAGE.render(results=results, num_mels=NUM_MELS, per_second=round(1 / SAMPLING_SECONDS))
    (ROOT / "docs" / "length.md").write_text(page)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", help="made by `audiolm bundle`")
    parser.add_argument("--prompt", help="recording to go on from")
    parser.add_argument("--prompt-seconds", type=float, default=3.0, help="of it (default: 3)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the longest continuation (default: 60)")
    parser.add_argument("--rows", type=int, default=8, help="continuations whose seams are measured (default: 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--title", help="of the section in docs/length.md; default: the machine")
    parser.add_argument("--output", type=pathlib.Path, help="JSON; default: benchmarks/results/length/MACHINE.json")
    parser.add_argument("--page", action="store_true", help="measure nothing, only write docs/length.md")
    options = parser.parse_args()
    if options.page:
        write_page()
        return
    if not options.bundle or not options.prompt:
        parser.error("--bundle and --prompt are needed")
    result: dict[str, Any] = {"machine": machine(), "commit": commit(), "date": datetime.date.today().isoformat()}
    model = audiolm_jax.load_bundle(options.bundle)
    prompt_1W = audio.read(options.prompt, model.codec.sample_rate, end=options.prompt_seconds)[None]
    on_cpu = jax.default_backend() == "cpu"
    processor = result["machine"]["processor"] if on_cpu else jax.devices()[0].device_kind
    result |= {
        "title": options.title or processor,
        "slug": re.sub(r"[^a-z0-9]+", "-", processor.lower()).strip("-"),
        "model": facts(model),
        "prompt_seconds": prompt_1W.shape[1] / model.codec.sample_rate,
        **measure(model, prompt_1W, options.seconds, options.rows, options.seed),
    }
    output = options.output or RESULTS / f"{result['slug']}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    if output.resolve().parent == RESULTS:
        write_page()
    print(json.dumps({name: result[name] for name in ("runs", "seams", "streamed_less_offline")}, indent=1))


if __name__ == "__main__":
    main()
