"""The one training loop, for SoundStream, w2v-BERT and the three language models alike."""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
import tqdm
from etils import epath
from jax.experimental import multihost_utils

from audiolm_jax import accelerators, files
from audiolm_jax import config as configs
from audiolm_jax.errors import Diverged, UserError
from audiolm_jax.objective import State
from audiolm_jax.progress import report
from audiolm_jax.training import registry, sharding
from audiolm_jax.training.checkpoint import Checkpoints
from audiolm_jax.training.metrics import Clock, MetricsWriter, StepLog, read_metrics
from audiolm_jax.training.step import build_program, model_flops, with_average
from audiolm_jax.training.watch import Watch

CONFIG_FILE = "config.json"
# What may differ between a run and its resumption; see `check_resumable`.
MAY_CHANGE = (
    "mesh.", "input.", "profile.", "num_train_steps", "data_dir", "mixture.data_dirs", "init_from", "max_eval_batches",
    "keep_checkpoints", "keep_best_checkpoints", "max_skipped_steps", "model.attention", "model.unrolled_layers",
)  # fmt: skip


def train(config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]) -> int:
    """Trains until `config.num_train_steps`, resuming from the workdir's last checkpoint if it has one.

    Writes `config.json`, `metrics.jsonl`, TensorBoard events and `checkpoints/STEP` into the workdir. Where a run
    has several processes (`jax.distributed`), each calls this with the same arguments and a workdir that all of them
    see; every process saves its part of a checkpoint, and the first one writes everything else.

    Args:
      config: a recipe's.
      workdir: folder or gs:// path, created where it does not exist; another run in the same folder is refused (in a
        bucket it is not noticed).

    Returns:
      exit status: 0 when finished, 143 or 130 when SIGTERM or Ctrl-C stopped it (saved first).

    Raises:
      UserError: a config that contradicts itself, the data, the mesh or the workdir's checkpoint.
      Diverged: `config.max_skipped_steps` steps in a row were not finite; the last good state is saved.
    """
    clock = Clock()
    _check(config)
    config = registry.complete(config)
    folder = files.make_workdir(workdir)
    with _only_run(folder), sharding.active(mesh := sharding.make_mesh(config.mesh)), _StopSignals() as stop:
        return _Run(config, folder, mesh, clock).train(stop)


@contextlib.contextmanager
def _only_run(folder: epath.Path) -> Iterator[None]:
    if jax.process_index() == 0 and files.is_local(folder):
        with files.exclusive(os.fspath(folder / ".lock"), "another run is training here", folder):
            yield
    else:
        yield


def _check(config: ml_collections.ConfigDict):
    names = ("num_train_steps", "batch_size", "log_every_steps", "eval_every_steps", "checkpoint_every_steps")
    for name in (*names, "max_skipped_steps"):
        if config[name] < 1:
            raise UserError("must be 1 or more", f"config.{name}={config[name]}", "change it")
    for name in ("num_threads", "prefetch_batches"):
        if config.input[name] < 0:
            raise UserError("must be 0 or more", f"config.input.{name}={config.input[name]}", "change it")


def check_resumable(before: dict[str, Any], now: dict[str, Any], workdir: epath.Path):
    """Refuses, by name, to resume a run with a config or tokens that would change what it computes.

    Args:
      before, now: descriptions, {"config": …, "tokens": metadata of the token dataset or None}.
      workdir: for the message.
    """
    was, wanted = (configs.flat(configs.from_json(json.dumps(description["config"]))) for description in (before, now))
    for name in sorted({*was, *wanted}):
        # What an earlier version did not know, and what is off now, changes nothing.
        unknown_and_off = name not in was and not wanted[name]
        may_change = name.startswith(MAY_CHANGE) or name.endswith("_every_steps") or unknown_and_off
        if not may_change and was.get(name) != wanted.get(name):
            raise UserError(
                f"checkpoint of another config: config.{name} was {was.get(name)}, now {wanted.get(name)}",
                workdir,
                "choose another --workdir or restore the field",
            )
    for name in ("codec", "semantic_tokenizer"):
        if (before["tokens"] or {}).get(name) != (now["tokens"] or {}).get(name):
            raise UserError(f"config.data_dir holds tokens of another {name}", workdir, "choose another --workdir")


class _StopSignals:
    """Remembers SIGTERM or Ctrl-C until the step is done; a second Ctrl-C interrupts at once.

    In a run of several processes all of them must stop at the same step: there JAX's preemption service, which hears
    SIGTERM in any process, picks it.
    """

    def __init__(self):
        self._status: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "_StopSignals":
        def remember(number, _):
            self._status = 128 + number
            if number == signal.SIGINT:
                signal.signal(signal.SIGINT, signal.default_int_handler)

        if jax.process_count() == 1:
            # Handlers can be set in the main thread only; elsewhere the caller's stay in force.
            with contextlib.suppress(ValueError):
                for number in (signal.SIGTERM, signal.SIGINT):
                    self._previous[number] = signal.signal(number, remember)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def status(self, step: int) -> int | None:
        """The exit status with which to stop after this step, None to go on; asked once a step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self._status = 128 + signal.SIGTERM
        return self._status


class _Run:
    """What stays fixed during a run: the compiled functions, the input, the mesh."""

    def __init__(self, config: ml_collections.ConfigDict, folder: epath.Path, mesh: jax.sharding.Mesh, clock: Clock):
        self.config, self.folder, self.mesh, self.clock = config, folder, mesh, clock
        self.writes = jax.process_index() == 0
        with clock.measure("startup"):
            self.program = build_program(config, mesh)
            self.input = registry.build_input(config, report)
        self.rows = sharding.process_rows(mesh, config.batch_size)
        self.description = {"config": config.to_dict(), "tokens": self.input.tokens}
        self.init_key, self.step_key, self.eval_key, self.warm_start_key = jax.jit(
            lambda: tuple(jax.random.split(jax.random.key(config.seed), 4)), out_shardings=sharding.replicated(mesh)
        )()

    def train(self, stop: _StopSignals) -> int:
        config = self.config
        with Checkpoints(self.folder, config.keep_checkpoints, config.keep_best_checkpoints) as checkpoints:
            with self.clock.measure("startup"):
                done = checkpoints.latest_step()
                if done is not None:
                    check_resumable(checkpoints.description(done), self.description, self.folder)
                if self.writes:
                    files.write_bytes(self.folder / CONFIG_FILE, configs.to_json(config).encode())
                batches = self.input.training(self.rows)
                if done is None:
                    done, state = 0, self.initial_state()
                else:
                    state, position = checkpoints.restore(done, self.program.abstract_state)
                    batches.set_state(position)
            if done >= config.num_train_steps:
                report(f"{self.folder}: already at step {done}")
                return 0
            with contextlib.ExitStack() as stack:
                writer = stack.enter_context(MetricsWriter(self.folder, done)) if self.writes else None
                bar = stack.enter_context(self._progress(done))
                profiler = stack.enter_context(_Profiler(config.profile, done, self.folder))
                return self._loop(state, done, batches, checkpoints, writer, bar, profiler, stop)

    def _loop(self, state: State, done: int, batches, checkpoints, writer, bar, profiler, stop: _StopSignals) -> int:
        config, clock = self.config, self.clock
        rows = read_metrics(self.folder) if done and writer is not None else []
        watch = Watch(self.program.objective.symptoms, rows, report)
        with clock.measure("compile"):
            log = StepLog(writer, watch, bar, clock, self._utilization_per_step())
        programs: dict[tuple[tuple[int, ...], ...], Any] = {}
        for step in range(done + 1, config.num_train_steps + 1):
            with clock.measure("data"):
                batch = self.global_batch(next(batches))
            shapes = tuple(array.shape for array in batch.values())
            if shapes not in programs:
                with clock.measure("compile"):
                    programs[shapes] = self.program.step.lower(state, batch, self.step_key).compile()
            profiler.before(step)
            with jax.transfer_guard("disallow"):
                state, metrics = programs[shapes](state, batch, self.step_key)
            profiler.after(step, metrics)
            diverged = self._diverged(log.flush())
            status = 1 if diverged else stop.status(step)
            last = step == config.num_train_steps or status is not None
            # What stops a run may leave it half a minute: enough to save, not to evaluate.
            evaluate = status is None and (step % config.eval_every_steps == 0 or last)
            save = last or step % config.checkpoint_every_steps == 0
            if evaluate or save:
                # Either waits for the steps that are still under way: their time is theirs, not its own.
                jax.block_until_ready(state)
            evaluated: dict[str, np.ndarray] = {}
            if evaluate or last or step % config.log_every_steps == 0:
                log.add(step, metrics)
            if evaluate:
                with clock.measure("evaluation"):
                    log.extend(evaluated := self.evaluate(state))
            if save:
                # The rows up to a checkpoint are on disk before it is: resuming never misses one.
                log.flush()
                if writer is not None:
                    writer.next_part(step)
                with clock.measure("checkpoint"):
                    eval_loss = float(evaluated["eval_loss"]) if "eval_loss" in evaluated else None
                    checkpoints.save(step, state, batches.get_state(), self.description, eval_loss)
            bar.update(1)
            if last:
                break
        checkpoints.wait()
        if diverged:
            raise Diverged(
                f"{config.max_skipped_steps} steps in a row were not finite; saved as it was before them",
                f"{self.folder} at step {step}",
                "lower the learning rate, clip gradients, or look at the data there",
            )
        return status or 0

    def _diverged(self, metrics: dict[str, np.ndarray]) -> bool:
        return bool(metrics) and int(metrics["skipped_in_a_row"]) >= self.config.max_skipped_steps

    def _utilization_per_step(self) -> float | None:
        """Model FLOPs of a step over what the mesh's devices can do in a second; None where either is unknown."""
        accelerator = accelerators.of_device(jax.devices()[0].device_kind)
        if accelerator is None:
            return None
        return model_flops(self.config) / (accelerator.peak_flops * self.mesh.size)

    def initial_state(self) -> State:
        """A fresh, sharded state, warm-started on the first batches of the training data."""
        objective, abstract_state = self.program.objective, self.program.abstract_state
        state = self.program.init(self.init_key)
        if self.config.init_from:
            from audiolm_jax.parts import read_part  # A part is read through the objectives: not at import.

            weights = read_part(self.config.init_from, for_training=True).weights_for(abstract_state, objective)
            for name in objective.optional_weights:
                if name not in weights and self.writes:
                    report(f"{name}: not saved in {self.config.init_from}, or of another shape: it starts afresh")
            places = {name: abstract_state[name] for name in weights}
            state = {**state, **jax.tree.map(_put, weights, places)}
        elif objective.warm_start is not None:
            batches = self.input.training(self.rows)
            first = [self.global_batch(next(batches)) for _ in range(objective.warm_start_batches)]
            state = {**state, **objective.warm_start(state, first, self.warm_start_key)}
        else:
            return state
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
        finish = (lambda state: with_average(objective, state)) if self.config.ema_decay else (lambda state: state)
        return jax.jit(finish, out_shardings=places)(state)

    def global_batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows of a batch -> the global arrays; a bucket's batch has more than `batch_size` rows."""
        factor = len(next(iter(batch.values()))) // len(self.rows)
        return sharding.global_batch(batch, self.config.batch_size * factor, self.mesh)

    def evaluate(self, state: State) -> dict[str, np.ndarray]:
        """Means over the held-out set, as "eval_NAME"; nothing where there is none."""
        totals: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for index, batch in enumerate(self.input.evaluation(self.rows)):
            if index == self.config.max_eval_batches:
                break
            key = jax.random.fold_in(self.eval_key, index)
            sums = jax.device_get(self.program.eval_step(state, self.global_batch(batch), key))
            for name, (total, count) in sums.items():
                before = totals.get(name, (np.zeros(()), np.zeros(())))
                totals[name] = before[0] + np.asarray(total), before[1] + np.asarray(count)
        return {f"eval_{name}": total / np.maximum(count, 1e-9) for name, (total, count) in totals.items()}

    def _progress(self, done: int) -> tqdm.tqdm:
        return tqdm.tqdm(
            total=self.config.num_train_steps,
            initial=done,
            desc=f"train {self.config.objective}",
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
            disable=not self.writes,
        )


def _put(array: np.ndarray, place: jax.ShapeDtypeStruct) -> jax.Array:
    """The same array in every process -> a sharded one."""
    return jax.make_array_from_callback(array.shape, place.sharding, lambda index: array[index].astype(place.dtype))


class _Profiler:
    """Traces `profile.num_steps` steps from `profile.start_step` on into WORKDIR/profile, for TensorBoard or XProf.

    A context manager: a run that ends within the window leaves the trace of what it did of it.
    """

    def __init__(self, profile: ml_collections.ConfigDict, done: int, folder: epath.Path):
        first = max(profile.start_step, done + 1)
        self._window = range(first, profile.start_step + profile.num_steps)
        self._folder = folder / "profile"
        self._tracing = False

    def __enter__(self) -> "_Profiler":
        return self

    def __exit__(self, *_):
        if self._tracing:
            jax.profiler.stop_trace()

    def before(self, step: int):
        if self._window and step == self._window[0]:
            jax.profiler.start_trace(os.fspath(self._folder))
            self._tracing = True

    def after(self, step: int, metrics):
        if self._tracing and step == self._window[-1]:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            self._tracing = False
