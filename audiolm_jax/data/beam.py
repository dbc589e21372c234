"""Tokenizing by Apache Beam (extra `beam`): on this machine, or on a cluster whose workers see the same folders.

The collection is the plan's shards, one element one shard, so the dataset is that of `tokenize.tokenize`, byte for
byte. A worker process loads the tokenizers once.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import pathlib
import shlex
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

from audiolm_jax import files
from audiolm_jax.data import manifest, tokenize
from audiolm_jax.errors import UserError

# Importing it tells of every cloud whose client is not there.
logging.disable(logging.WARNING)
try:
    import apache_beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.portability.api import beam_provision_api_pb2
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner
    from apache_beam.runners.portability.fn_api_runner.fn_runner import ExtendedProvisionInfo
    from apache_beam.transforms.environments import SubprocessSDKEnvironment
    from apache_beam.utils.shared import Shared
except ImportError as error:
    raise UserError(f"Apache Beam is not here ({error})", "--runner", "pip install 'audiolm_jax[beam]'") from error
finally:
    logging.disable(logging.NOTSET)

WATCH_SECONDS = 0.5


def write_shards(
    load: Callable[[], tokenize.Tokenizers],
    report: Callable[[str], None],
    runner: str,
    num_workers: int,
    pipeline_options: Sequence[str],
) -> tokenize.WriteShards:
    """What makes `tokenize.tokenize` leave the shards to Beam.

    Args:
      load: gives the tokenizers; is pickled and called in the workers.
      report: called with one line for each recording that is left out.
      runner: "direct" for worker processes on this machine, or a runner as Beam names it: "dataflow", "flink", …
      num_workers: how many.
      pipeline_options: further flags of Beam's, as on its command lines.

    Raises:
      UserError: an unknown runner.
    """

    def write(workshop, shards, batch_seconds, advance):
        # What goes wrong is raised.
        logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
        log = workshop.folder / "workers.log"
        engine, flags = _direct(num_workers, log) if runner == "direct" else (runner, [f"--num_workers={num_workers}"])
        offsets = _write_list(workshop, shards)
        with _watching(workshop, shards, report, advance):
            pipeline = apache_beam.Pipeline(engine, PipelineOptions([*flags, *pipeline_options]))
            elements = pipeline | apache_beam.Create(offsets) | apache_beam.Reshuffle()
            _ = elements | apache_beam.ParDo(_WriteShard(load, workshop, batch_seconds))
            try:
                pipeline.run().wait_until_finish()
            except RuntimeError as error:
                # What Beam says is the worker's whole traceback.
                last = str(error).strip().splitlines()[-1]
                raise RuntimeError(f"{last} (a worker; its log may be {log})") from error

    _check_runner(runner)
    return write


def _check_runner(name: str):
    try:
        if name != "direct":
            apache_beam.runners.create_runner(name)
    except (ValueError, ImportError, AttributeError) as error:
        raise UserError(f"unknown runner ({error})", f"--runner={name}", "take direct, dataflow, flink …") from error


def _direct(num_workers: int, log: pathlib.Path) -> tuple[FnApiRunner, list[str]]:
    """Worker processes on this machine, whose chatter goes to a file.

    Not Beam's DirectRunner: that one prefers Prism, a program that it first fetches from the internet.
    """
    command = f"exec {shlex.quote(sys.executable)} -m apache_beam.runners.worker.sdk_worker_main"
    environment = SubprocessSDKEnvironment.from_command_string(f"{command} 2>>{shlex.quote(str(log))}")
    runner = FnApiRunner(environment, provision_info=ExtendedProvisionInfo(beam_provision_api_pb2.ProvisionInfo()))
    return runner, [f"--direct_num_workers={num_workers}"]


def _list(workshop: tokenize.Workshop) -> pathlib.Path:
    return workshop.folder / "shards.jsonl"


def _write_list(workshop: tokenize.Workshop, shards: Sequence[tokenize.Shard]) -> list[int]:
    """Writes a line for each shard; returns where each begins. A service refuses a pipeline that holds the plan."""
    lines = [json.dumps(dataclasses.asdict(shard), default=str).encode() + b"\n" for shard in shards]
    files.write_bytes(_list(workshop), b"".join(lines))
    return [0, *itertools.accumulate(map(len, lines[:-1]))]


def _read_list(workshop: tokenize.Workshop, offset: int) -> tokenize.Shard:
    with open(_list(workshop), "rb") as file:
        file.seek(offset)
        fields = json.loads(file.readline())
    recordings = [manifest.Recording(**{**r, "path": pathlib.Path(r["path"])}) for r in fields["recordings"]]
    return tokenize.Shard(fields["name"], fields["split"], tuple(recordings), tuple(fields["seconds"]))


@contextlib.contextmanager
def _watching(
    workshop: tokenize.Workshop,
    shards: Sequence[tokenize.Shard],
    report: Callable[[str], None],
    advance: Callable[[float], None],
) -> Iterator[None]:
    """Meanwhile tells of the shards that have become whole, whoever makes them."""
    stop = threading.Event()
    told: set[str] = set()

    def look():
        for shard in shards:
            if shard.name not in told and workshop.summary(shard).is_file():
                told.add(shard.name)
                advance(sum(shard.seconds))
                for entry in json.loads(workshop.summary(shard).read_text())["left_out"]:
                    report(f"left out: {entry['reason']}")

    def watch():
        while not stop.wait(WATCH_SECONDS):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        look()


class _WriteShard(apache_beam.DoFn):
    """Makes a shard whole, unless it is."""

    def __init__(self, load: Callable[[], tokenize.Tokenizers], workshop: tokenize.Workshop, batch_seconds: float):
        self._load, self._workshop, self._batch_seconds = load, workshop, batch_seconds
        self._shared = Shared()

    def setup(self):
        self._tokenizers = self._shared.acquire(self._load)

    def process(self, offset: int):
        shard = _read_list(self._workshop, offset)
        if not self._workshop.pending([shard]):
            return
        ignore = lambda _: None
        summary = tokenize.write_shard(
            self._workshop, shard, self._tokenizers, self._batch_seconds, report=ignore, advance=ignore
        )
        counters = {
            "recordings": len(summary["frames"]),
            "left_out": len(summary["left_out"]),
            "semantic_tokens": sum(summary["frames"]),
            "acoustic_tokens": summary["acoustic_tokens"],
        }
        for name, value in counters.items():
            apache_beam.metrics.Metrics.counter("audiolm", name).inc(value)
