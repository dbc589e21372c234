"""`audiolm evaluate`: a suite measures, and leaves results.json and report.html."""

import dataclasses
import functools
import hashlib
import importlib
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from audiolm_jax import bundle, files
from audiolm_jax.errors import UserError
from audiolm_jax.evaluation import journal, report
from audiolm_jax.evaluation.statistics import Estimate
from audiolm_jax.parts import Part, read_part

# Module and function (Request, Journal) -> Findings of each; loaded when asked for.
SUITES = {
    "codec": ("audiolm_jax.evaluation.codec", "evaluate_codec"),
    "abx": ("audiolm_jax.evaluation.phonetics", "evaluate_abx"),
    **dict.fromkeys(("swuggy", "sblimp", "storycloze", "salmon"), ("audiolm_jax.evaluation.pairs", "evaluate_pairs")),
    "likelihood": ("audiolm_jax.evaluation.likelihood", "evaluate_likelihood"),
    "acoustic": ("audiolm_jax.evaluation.speech", "evaluate_acoustic"),
    "continuation": ("audiolm_jax.evaluation.speech", "evaluate_continuation"),
    "sampling": ("audiolm_jax.evaluation.sampling", "evaluate_sampling"),
    "piano": ("audiolm_jax.evaluation.piano", "evaluate_piano"),
    "fad": ("audiolm_jax.evaluation.frechet", "evaluate_frechet"),
    "detector": ("audiolm_jax.evaluation.classification", "evaluate_detector"),
    "speaker": ("audiolm_jax.evaluation.classification", "evaluate_speaker"),
}
# Options that some suites know, by their fields of a Request: the name on the command line, and those suites.
CONTINUING = ("continuation", "sampling", "piano")
OPTIONS_OF = {
    "layers": ("layer", ("abx", "fad")),
    "frame_rate": ("frame_rate", ("abx",)),
    "generated": ("generated", ("fad",)),
    **{name: (name, CONTINUING) for name in ("prompt_seconds", "seconds")},
    **{name: (name, ("acoustic", *CONTINUING)) for name in ("min_seconds", "max_seconds")},
    "stages": ("stage", ("sampling",)),
    "temperatures": ("temperature", ("sampling",)),
    **{name: (name, ("sampling",)) for name in ("top_k", "top_p")},
}


@dataclasses.dataclass(frozen=True)
class Request:
    """Options of `audiolm evaluate`, as on the command line; each suite says what it needs."""

    suite: str
    output: str
    bundle: str | None = None
    codec: str | None = None
    semantic_tokenizer: Sequence[str] = ()
    layers: Sequence[int] = ()
    frame_rate: float | None = None
    detector: str | None = None
    classifier: str | None = None
    data: str | None = None
    split: str | None = None
    judges: Sequence[str] = ()
    generated: Sequence[str] = ()
    prompt_seconds: float | None = None
    seconds: float | None = None
    num_samples: int = 3
    min_seconds: float | None = None
    max_seconds: float | None = None
    stages: Sequence[str] = ()
    temperatures: Sequence[float] = ()
    top_k: Sequence[int] = ()
    top_p: Sequence[float] = ()
    seed: int = 0

    def need(self, name: str) -> Any:
        """An option that the suite cannot do without."""
        value = getattr(self, name)
        if value is None or value == []:
            raise UserError(f"suite {self.suite} needs --{name}", "arguments", "see `audiolm evaluate --help`")
        return value

    def refuse_options_of_others(self):
        """Raises a UserError for an option that another suite has: it would do nothing, and stand in the results."""
        for field, (name, suites) in OPTIONS_OF.items():
            if self.suite not in suites and getattr(self, field) not in (None, [], ()):
                what_to_do = f"leave it out, it is for {', '.join(suites)}"
                raise UserError(f"--{name} is refused", f"suite {self.suite}", what_to_do)

    @functools.cached_property
    def parts(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Fingerprint and configuration of the parts under test: by role, semantic tokenizers by their folders' names.

        They are read once: an hour later there may be other weights in a training's folder.
        """
        found = {} if self.bundle is None else bundle.describe(self.bundle)
        classifiers = dict.fromkeys(("detector", "classifier"), bundle.read_classifier)
        for role, read in {"codec": read_part, **classifiers}.items():
            if (folder := getattr(self, role)) is not None:
                found[role] = _described(read(folder))
        for folder in self.semantic_tokenizer:
            if (name := pathlib.Path(folder).resolve().name) in found:
                raise UserError("two parts of one name", f"--semantic_tokenizer={folder}", "rename one's folder")
            found[name] = _described(read_part(folder))
        return found

    def fingerprints(self) -> dict[str, str]:
        """Of the parts under test."""
        return {name: fingerprint for name, (fingerprint, _) in self.parts.items()}

    def settings(self) -> dict[str, Any]:
        """The options but for the output; JSON has no infinity, as which --max_seconds may be given."""
        given = {name: value for name, value in dataclasses.asdict(self).items() if name != "output"}
        return {name: str(value) if value in (math.inf, -math.inf) else value for name, value in given.items()}

    def identity(self) -> dict[str, Any]:
        """All that the results depend on: options, parts, and the names, sizes and times of the files of the data."""
        paths = [path for path in (self.data, *self.generated) if path is not None]
        stamps = [stamp for path in paths for stamp in _stamps(pathlib.Path(path))]
        return {**self.settings(), "fingerprints": self.fingerprints(), "stamps": stamps}

    def data_fingerprint(self) -> str | None:
        """Hash of the names below the folder of the data and of their sizes, wherever it lies; of a file, its own."""
        if self.data is None:
            return None
        data = pathlib.Path(self.data)
        if not data.is_dir():
            return files.sha256(data)[:32] if data.exists() else None
        names = [(os.path.relpath(path, data), size) for path, size, _ in _stamps(data)]
        return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:32]


def _described(part: Part) -> tuple[str, dict[str, Any]]:
    """Fingerprint and configuration of a part."""
    return part.fingerprint(), json.loads(part.config.to_json())


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
      texts: what else is to stand beside it, by the names of the files.
    """

    metrics: Mapping[str, Estimate]
    notes: Sequence[str]
    page: str
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)


def evaluate(request: Request):
    """Runs a suite and writes its findings into a new folder; goes on where a run of the same request was stopped.

    Raises:
      UserError: an unknown suite, an option that it needs and lacks or does not know, an output that exists, or
        whatever the suite says.
    """
    if request.suite not in SUITES:
        raise UserError("unknown suite", f"--suite={request.suite}", f"use one of {', '.join(SUITES)}")
    request.refuse_options_of_others()
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
            "settings": request.settings(),
            "data_fingerprint": request.data_fingerprint(),
            "metrics": {name: dataclasses.asdict(estimate) for name, estimate in findings.metrics.items()},
            "notes": findings.notes,
        }
        details = {
            "Settings": results["settings"],
            "Fingerprints": {**results["fingerprints"], "data": results["data_fingerprint"]},
            "Software": report.software(),
            **{f"Configuration: {name}": config for name, (_, config) in request.parts.items()},
        }
        with files.new_folder(request.output) as scratch:
            (scratch / "results.json").write_text(json.dumps(results, indent=2) + "\n")
            page = report.with_details(findings.page, details)
            for name, text in {"report.html": page, **findings.texts}.items():
                files.write_text(scratch / name, text)
    print(f"report: {request.output}/report.html")
