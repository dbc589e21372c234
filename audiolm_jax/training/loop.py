"""The one training loop, for SoundStream, w2v-BERT and the three language models alike."""

import contextlib
import json
import os
import pathlib
import signal
import sys
import time
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import tqdm

from audiolm_jax import config as configs
from audiolm_jax import files
from audiolm_jax.errors import UserError
from audiolm_jax.objective import Batch, Metrics, Objective, State
from audiolm_jax.training import registry, sharding
from audiolm_jax.training.checkpoint import Checkpoints
from audiolm_jax.training.metrics import MetricsWriter

CONFIG_FILE = "config.json"
# What may differ between a run and its resumption; see `check_resumable`.
MAY_CHANGE = ("mesh.", "input.", "num_train_steps", "data_dir", "init_from", "max_eval_batches", "keep_checkpoints")


def train(config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]) -> int:
    """Trains until `config.num_train_steps`, resuming from the workdir's last checkpoint if it has one.

    Writes `config.json`, `metrics.jsonl`, TensorBoard events and `checkpoints/STEP` into the workdir.

    Args:
      config: a recipe's.
      workdir: created where it does not exist; another run in it is refused.

    Returns:
      exit status: 0 when finished, 143 or 130 when SIGTERM or Ctrl-C stopped it (saved first).
    """
    _check(config)
    folder = files.make_folder(workdir)
    with files.exclusive(folder / ".lock", "another run is training here", workdir):
        mesh = sharding.make_mesh(config.mesh)
        rules = list(sharding.RULES.items())
        with jax.set_mesh(mesh), nn.logical_axis_rules(rules), _StopSignals() as stop:
            return _Run(config, folder, mesh).train(stop)


def _check(config: ml_collections.ConfigDict):
    for name in ("num_train_steps", "batch_size", "log_every_steps", "eval_every_steps", "checkpoint_every_steps"):
        if config[name] < 1:
            raise UserError("must be 1 or more", f"config.{name}={config[name]}", "change it")


def check_resumable(before: dict[str, Any], now: dict[str, Any], workdir: pathlib.Path):
    """Refuses, by name, to resume a run with a config or tokens that would change what it computes.

    Args:
      before, now: descriptions, {"config": …, "tokens": metadata of the token dataset or None}.
      workdir: for the message.
    """
    was, wanted = (configs.flat(configs.from_json(json.dumps(description["config"]))) for description in (before, now))
    for name in sorted({*was, *wanted}):
        may_change = name.startswith(MAY_CHANGE) or name.endswith("_every_steps")
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
    """Remembers SIGTERM or Ctrl-C until the step is done; a second Ctrl-C interrupts at once."""

    def __init__(self):
        self.status: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "_StopSignals":
        def remember(number, _):
            self.status = 128 + number
            if number == signal.SIGINT:
                signal.signal(signal.SIGINT, signal.default_int_handler)

        # Handlers can be set in the main thread only; elsewhere the caller's stay in force.
        with contextlib.suppress(ValueError):
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, remember)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class _Run:
    """What stays fixed during a run: the objective, its compiled functions, the input, the mesh."""

    def __init__(self, config: ml_collections.ConfigDict, folder: pathlib.Path, mesh: jax.sharding.Mesh):
        self.config, self.folder, self.mesh = config, folder, mesh
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        if config.batch_size % shards:
            raise UserError(
                f"config.batch_size={config.batch_size} is not divided by mesh.data x mesh.fsdp = {shards}",
                "config.batch_size",
                f"choose a multiple of {shards}",
            )
        self.objective: Objective = registry.build_objective(config)
        self.input = registry.build_input(config, report)
        self.description = {"config": config.to_dict(), "tokens": self.input.tokens}
        key = jax.random.key(config.seed)
        boxed = jax.eval_shape(self.objective.init, key)
        self.shardings = sharding.state_shardings(boxed, mesh)
        self.abstract_state = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            sharding.unbox(boxed),
            self.shardings,
        )
        everywhere = sharding.replicated(mesh)
        batch_place = sharding.batch_sharding(mesh)
        init_key, self.step_key, self.eval_key, self.warm_start_key = jax.device_put(
            jax.random.split(key, 4), everywhere
        )
        self.init_key = init_key
        self._init = jax.jit(lambda key: sharding.unbox(self.objective.init(key)), out_shardings=self.shardings)

        def step(state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
            return self.objective.step(state, batch, jax.random.fold_in(key, state["step"]))

        self.step = jax.jit(
            step,
            in_shardings=(self.shardings, batch_place, everywhere),
            out_shardings=(self.shardings, everywhere),
            donate_argnums=0,
        )
        self.eval_step = jax.jit(
            self.objective.eval_step,
            in_shardings=(self.shardings, batch_place, everywhere),
            out_shardings=everywhere,
        )

    def train(self, stop: _StopSignals) -> int:
        config = self.config
        with Checkpoints(self.folder, config.keep_checkpoints) as checkpoints:
            batches = self.input.training(jax.process_index(), jax.process_count())
            restored = checkpoints.latest_step()
            if restored is not None:
                check_resumable(checkpoints.description(restored), self.description, self.folder)
            files.write_bytes(self.folder / CONFIG_FILE, configs.to_json(config).encode())
            if restored is None:
                state = self.initial_state()
            else:
                state, position = checkpoints.restore(restored, self.abstract_state)
                batches.set_state(position)
            done = restored or 0
            if done >= config.num_train_steps:
                report(f"{self.folder}: already at step {done}")
                return 0
            with MetricsWriter(self.folder, done) as writer, self._progress(done) as bar:
                return self._loop(state, done, batches, checkpoints, writer, bar, stop)

    def _loop(self, state: State, done: int, batches, checkpoints, writer, bar, stop) -> int:
        config = self.config
        log = _Log(writer, bar)
        for step in range(done + 1, config.num_train_steps + 1):
            batch = sharding.global_batch(next(batches), self.mesh)
            with jax.transfer_guard("disallow"):
                state, metrics = self.step(state, batch, self.step_key)
            last = step == config.num_train_steps or stop.status is not None
            evaluate = step % config.eval_every_steps == 0 or last
            log.flush()
            if evaluate or step % config.log_every_steps == 0:
                log.add(step, metrics)
            if evaluate:
                log.extend(self.evaluate(state))
            if last or step % config.checkpoint_every_steps == 0:
                # The rows up to a checkpoint are on disk before it is: resuming never misses one.
                log.flush()
                checkpoints.save(step, state, batches.get_state(), self.description)
            bar.update(1)
            if last:
                break
        checkpoints.wait()
        return stop.status or 0

    def initial_state(self) -> State:
        """A fresh, sharded state, warm-started on the first batches of the training data."""
        state = self._init(self.init_key)
        if self.config.init_from:
            from audiolm_jax.parts import read_part  # A part is read through the objectives: not at import.

            weights = read_part(self.config.init_from).weights_for(self.abstract_state, self.objective)
            places = {name: self.shardings[name] for name in weights}
            state = {**state, **jax.device_put(weights, places)}
        elif self.objective.warm_start is not None:
            batches = self.input.training(jax.process_index(), jax.process_count())
            first = [sharding.global_batch(next(batches), self.mesh) for _ in range(self.objective.warm_start_batches)]
            state = self.objective.warm_start(state, first, self.warm_start_key)
            state = jax.device_put(state, self.shardings)
        return state

    def evaluate(self, state: State) -> dict[str, np.ndarray]:
        """Means over the held-out set, as "eval_NAME"; nothing where there is none."""
        totals: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for index, batch in enumerate(self.input.evaluation(jax.process_index(), jax.process_count())):
            if index == self.config.max_eval_batches:
                break
            key = jax.random.fold_in(self.eval_key, index)
            sums = jax.device_get(self.eval_step(state, sharding.global_batch(batch, self.mesh), key))
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
            disable=jax.process_index() != 0,
        )


class _Log:
    """Holds one step's metrics back until the next step runs, so that fetching them never stalls the device."""

    def __init__(self, writer: MetricsWriter, bar: tqdm.tqdm):
        self._writer, self._bar = writer, bar
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._last = (time.monotonic(), bar.n)

    def add(self, step: int, metrics: Metrics):
        self._pending = (step, dict(metrics))

    def extend(self, values: dict[str, np.ndarray]):
        assert self._pending is not None
        self._pending[1].update(values)

    def flush(self):
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = jax.device_get(metrics)
        now = time.monotonic()
        elapsed, steps = now - self._last[0], step - self._last[1]
        self._last = (now, step)
        self._writer.write(step, {**values, "steps_per_second": steps / max(elapsed, 1e-9)})
        self._bar.set_postfix(loss=f"{float(values['loss']):.4g}", refresh=False)


def report(line: str):
    """One line on standard error, above a progress bar."""
    tqdm.tqdm.write(line, file=sys.stderr)
