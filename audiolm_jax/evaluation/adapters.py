"""Judges of a single recording, each made of a package: chosen by name, at most one of a kind.

A package that is missing is named, with how to install it; without names the first of each kind that is there judges.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from audiolm_jax import audio
from audiolm_jax.errors import UserError

EXTRA = "pip install 'audiolm_jax[eval]' brings it"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One package that judges.

    Attributes:
      title: for people, with the unit.
      sample_rate: Hz that the judge wants.
      load: loads it, into a function of a recording [W] at that rate; with `takes_model` a function of the model.
      modules: Python modules that it needs.
      install: how they are installed.
      min_seconds: it judges nothing shorter.
      nothing: what it says of digital silence and of what is too short.
      takes_model: whether a model may be named behind a colon.
    """

    title: str
    sample_rate: int
    load: Callable[..., Callable[[np.ndarray], Any]]
    modules: Sequence[str]
    install: str = EXTRA
    min_seconds: float = 0.0
    nothing: Any = None
    takes_model: bool = False

    def missing(self) -> str | None:
        """Why it cannot judge here; None where it can."""
        return missing_modules(self.modules, self.install)

    def start(self) -> "Judge":
        """Loads it."""
        return Judge(self, self.load())


@dataclasses.dataclass(frozen=True)
class Judge:
    """A judge that is loaded: (recording [W], its sample rate) -> what it says."""

    adapter: Adapter
    judge: Callable[[np.ndarray], Any]

    @property
    def title(self) -> str:
        return self.adapter.title

    def __call__(self, wave_W: np.ndarray, sample_rate: int) -> Any:
        if len(wave_W) <= self.adapter.min_seconds * sample_rate or not wave_W.any():
            return self.adapter.nothing
        wave_W = audio.resample(np.asarray(wave_W, np.float32), sample_rate, self.adapter.sample_rate)
        return self.judge(np.clip(wave_W, -1.0, 1.0))


def missing_modules(modules: Sequence[str], install: str) -> str | None:
    """Which of the modules cannot be imported, and what to do; None where all can."""
    absent = [module for module in modules if importlib.util.find_spec(module) is None]
    return f"no module {', '.join(absent)}; {install}" if absent else None


def choose(
    names: Sequence[str], kinds: Mapping[str, Mapping[str, Adapter]]
) -> tuple[dict[str, tuple[str, Adapter]], list[str]]:
    """The judges of these names; without names, of each kind the first that is there.

    Args:
      names: as given by --judge; NAME:MODEL where the judge takes a model.
      kinds: adapters by name, by kind.

    Returns:
      name and adapter by kind, and a note for each kind that nobody judges.

    Raises:
      UserError: an unknown name, one that is missing, two of a kind.
    """
    chosen: dict[str, tuple[str, Adapter]] = {}
    for given in dict.fromkeys(names):
        name, _, model = given.partition(":")
        kind = next((kind for kind, adapters in kinds.items() if name in adapters), None)
        if kind is None:
            known = ", ".join(name for adapters in kinds.values() for name in adapters)
            raise UserError("unknown judge", f"--judge={given}", f"use one of {known}")
        adapter = kinds[kind][name]
        if bool(model) != adapter.takes_model:
            example = f"{name}:MODEL" if adapter.takes_model else name
            raise UserError("a model is missing" if adapter.takes_model else "no model can be chosen", given, example)
        if missing := adapter.missing():
            what, _, advice = missing.partition("; ")
            raise UserError(what, f"--judge={given}", advice)
        if kind in chosen:
            raise UserError(f"two judges of one kind ({kind})", f"--judge={given}", "name one")
        chosen[kind] = given, adapter
        if model:
            chosen[kind] = given, dataclasses.replace(adapter, load=functools.partial(adapter.load, model))
    notes = []
    for kind, adapters in kinds.items():
        if names and kind not in chosen:
            notes.append(f"{kind}: not measured, no judge of it was named")
        elif not names:
            there = {name: one for name, one in adapters.items() if not (one.takes_model or one.missing())}
            if there:
                chosen[kind] = next(iter(there.items()))
            else:
                first = next(one for one in adapters.values() if not one.takes_model)
                notes.append(f"{kind}: not measured, {first.missing()}")
    return chosen, notes
