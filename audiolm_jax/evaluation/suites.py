"""`audiolm evaluate`: a suite measures, and leaves results.json and report.html."""

import dataclasses
import importlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from audiolm_jax import files
from audiolm_jax.errors import UserError
from audiolm_jax.evaluation import journal
from audiolm_jax.evaluation.statistics import Estimate
from audiolm_jax.parts import read_part

# Module and function (Request, Journal) -> Findings of each; loaded when asked for.
SUITES = {
    "codec": ("audiolm_jax.evaluation.codec", "evaluate_codec"),
    "abx": ("audiolm_jax.evaluation.phonetics", "evaluate_abx"),
    "detector": ("audiolm_jax.evaluation.classification", "evaluate_detector"),
    "speaker": ("audiolm_jax.evaluation.classification", "evaluate_speaker"),
}


@dataclasses.dataclass(frozen=True)
class Request:
    """Options of `audiolm evaluate`, as on the command line; each suite says what it needs."""

    suite: str
    output: str
    codec: str | None = None
    semantic_tokenizer: Sequence[str] = ()
    layers: Sequence[int] = ()
    frame_rate: float | None = None
    detector: str | None = None
    classifier: str | None = None
    data: str | None = None
    split: str | None = None
    judges: Sequence[str] = ()
    seed: int = 0

    def need(self, name: str) -> Any:
        """An option that the suite cannot do without."""
        value = getattr(self, name)
        if value is None or value == []:
            raise UserError(f"suite {self.suite} needs --{name}", "arguments", "see `audiolm evaluate --help`")
        return value

    def fingerprints(self) -> dict[str, str]:
        """Of the parts under test: by role, semantic tokenizers by the names of their folders."""
        roles = {role: getattr(self, role) for role in ("codec", "detector", "classifier")}
        found = {role: read_part(path).fingerprint() for role, path in roles.items() if path is not None}
        for folder in self.semantic_tokenizer:
            if (name := pathlib.Path(folder).resolve().name) in found:
                raise UserError("two parts of one name", f"--semantic_tokenizer={folder}", "rename one's folder")
            found[name] = read_part(folder).fingerprint()
        return found

    def identity(self) -> dict[str, Any]:
        """All that the results depend on: options, parts, and the names, sizes and times of the files of the data."""
        options = {name: value for name, value in dataclasses.asdict(self).items() if name != "output"}
        stamps = [] if self.data is None else _stamps(pathlib.Path(self.data))
        return {**options, "fingerprints": self.fingerprints(), "stamps": stamps}


def _stamps(data: pathlib.Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of the file or of the files below the folder."""
    below = (pathlib.Path(folder) / name for folder, _, names in os.walk(data) for name in names)
    found = ((path, path.stat()) for path in (sorted(below) if data.is_dir() else [data]) if path.exists())
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in found]


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a suite found.

    Attributes:
      metrics: by name.
      notes: what was left out, and why.
      page: the report, HTML.
    """

    metrics: Mapping[str, Estimate]
    notes: Sequence[str]
    page: str


def evaluate(request: Request):
    """Runs a suite and writes its findings into a new folder; goes on where a run of the same request was stopped.

    Raises:
      UserError: an unknown suite, an option that it needs and lacks, an output that exists, or whatever the suite says.
    """
    if request.suite not in SUITES:
        raise UserError("unknown suite", f"--suite={request.suite}", f"use one of {', '.join(SUITES)}")
    module, function = SUITES[request.suite]
    measure = getattr(importlib.import_module(module), function)
    files.refuse_existing(request.output)
    identity = request.identity()
    with journal.kept_beside(request.output, identity) as items:
        findings = measure(request, items)
        results = {
            "suite": request.suite,
            "seed": request.seed,
            "fingerprints": identity["fingerprints"],
            "metrics": {name: dataclasses.asdict(estimate) for name, estimate in findings.metrics.items()},
            "notes": findings.notes,
        }
        with files.new_folder(request.output) as scratch:
            (scratch / "results.json").write_text(json.dumps(results, indent=2) + "\n")
            (scratch / "report.html").write_text(findings.page)
    print(f"report: {request.output}/report.html")
