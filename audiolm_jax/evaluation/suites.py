"""`audiolm evaluate`: a suite measures, and leaves results.json and report.html."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from audiolm_jax import files
from audiolm_jax.errors import UserError
from audiolm_jax.evaluation.statistics import Estimate

SUITES = ("codec", "abx")


@dataclasses.dataclass(frozen=True)
class Request:
    """Options of `audiolm evaluate`, as on the command line; each suite says what it needs."""

    suite: str
    output: str
    codec: str | None = None
    semantic_tokenizer: Sequence[str] = ()
    layers: Sequence[int] = ()
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


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a suite found.

    Attributes:
      metrics: by name.
      fingerprints: of the parts under test, by role.
      notes: what was left out, and why.
      page: the report, HTML.
    """

    metrics: Mapping[str, Estimate]
    fingerprints: Mapping[str, str]
    notes: Sequence[str]
    page: str


def evaluate(request: Request):
    """Runs a suite and writes its findings into a new folder.

    Raises:
      UserError: an unknown suite, an option that it needs and lacks, an output that exists, or whatever the suite says.
    """
    match request.suite:
        case "codec":
            from audiolm_jax.evaluation.codec import evaluate_codec as measure
        case "abx":
            from audiolm_jax.evaluation.phonetics import evaluate_abx as measure
        case other:
            raise UserError("unknown suite", f"--suite={other}", f"use one of {', '.join(SUITES)}")
    with files.new_folder(request.output) as scratch:
        findings = measure(request)
        results = {
            "suite": request.suite,
            "seed": request.seed,
            "fingerprints": findings.fingerprints,
            "metrics": {name: dataclasses.asdict(estimate) for name, estimate in findings.metrics.items()},
            "notes": findings.notes,
        }
        (scratch / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        (scratch / "report.html").write_text(findings.page)
    print(f"report: {request.output}/report.html")
