"""`audiolm detect`: is it generated? One line of JSON for each recording."""

import json
import os
from collections.abc import Sequence

from audiolm_jax import bundle
from audiolm_jax.classifier.classifier import Classifier
from audiolm_jax.data import manifest
from audiolm_jax.errors import UserError
from audiolm_jax.evaluation.detection_data import GENERATED, REAL
from audiolm_jax.progress import report

THRESHOLD = 0.5


def load_detector(path: str | os.PathLike[str]) -> Classifier:
    """A classifier that has the label "generated": of a folder, or a bundle's own.

    Raises:
      UserError: as `bundle.load_classifier`, or a classifier of something else.
    """
    detector = bundle.load_classifier(path)
    if GENERATED not in detector.labels:
        what = f"not a detector but a classifier of {', '.join(detector.labels[:5])}"
        raise UserError(what, path, "train one with --config=detector")
    return detector


def detect(inputs: Sequence[str], detector: str):
    """Prints {"path", "seconds", "generated": its probability, "verdict": "generated" or "real"} of each recording.

    Args:
      inputs: recordings, folders or manifests.
      detector: folder of it, or of a bundle that has one.

    Raises:
      UserError: a detector or an input that cannot be read; of several recordings the others come first.
    """
    model = load_detector(detector)
    recordings = [recording for path in inputs for recording in manifest.read_manifest(path)]
    refused: list[UserError] = []
    for recording in recordings:
        try:
            wave_W = recording.read(model.sample_rate)
            generated = float(model.predict(wave_W[None])[0, model.labels.index(GENERATED)])
        except UserError as error:
            refused.append(error)
            if len(recordings) > 1:
                report(f"left out: {error}")
            continue
        line = {
            "path": str(recording.path),
            "seconds": len(wave_W) / model.sample_rate,
            "generated": generated,
            "verdict": GENERATED if generated > THRESHOLD else REAL,
        }
        print(json.dumps(line), flush=True)
    if len(recordings) == len(refused) == 1:
        raise refused[0]
    if refused:
        what = f"{len(refused)} of {len(recordings)} recordings could not be read"
        raise UserError(what, ", ".join(inputs), "see the lines above")
