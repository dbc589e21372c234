"""Fréchet distance against scipy's root of a matrix, and the suite `fad`."""

import json

import numpy as np
import pytest
import scipy.linalg
import soundfile

from audiolm_jax.errors import UserError
from audiolm_jax.evaluation import frechet, speakers
from audiolm_jax.evaluation.adapters import Adapter
from audiolm_jax.evaluation.suites import Request, evaluate

RATE = 16_000


def by_roots(first_MD, second_MD):
    """The formula as it is written."""
    covariances = [np.cov(set_MD, rowvar=False) for set_MD in (first_MD, second_MD)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    shift_D = first_MD.mean(axis=0) - second_MD.mean(axis=0)
    return float(np.sum(shift_D**2) + np.trace(covariances[0] + covariances[1] - 2 * np.real(root)))


@pytest.mark.parametrize("sizes", [(200, 150), (7, 300), (12, 9)])
def test_distance_is_its_definition(sizes):
    generator = np.random.default_rng(sum(sizes))
    mix_DD = generator.standard_normal((20, 20))
    first_MD = generator.standard_normal((sizes[0], 20)) @ mix_DD
    second_MD = 1.5 * generator.standard_normal((sizes[1], 20)) + 0.3
    expected = by_roots(first_MD, second_MD)
    # Where there are fewer samples than dimensions scipy takes the root of a singular matrix.
    tolerance = 1e-9 if min(sizes) > 20 else 1e-5
    assert frechet.frechet_distance(first_MD, second_MD) == pytest.approx(expected, rel=tolerance)
    assert frechet.frechet_distance(second_MD, first_MD) == pytest.approx(expected, rel=tolerance)


def test_distance_of_gaussians_and_of_the_same():
    generator = np.random.default_rng(0)
    x_MD = generator.standard_normal((500, 6))
    assert frechet.frechet_distance(x_MD, x_MD) == pytest.approx(0.0, abs=1e-9)
    assert frechet.frechet_distance(x_MD, x_MD + 2.0) == pytest.approx(6 * 4.0)
    # N(0, Σ) and N(0, 9 Σ): the trace of Σ (1 + 9 − 2 · 3).
    assert frechet.frechet_distance(x_MD - x_MD.mean(0), 3 * (x_MD - x_MD.mean(0))) == pytest.approx(
        4 * np.trace(np.cov(x_MD, rowvar=False))
    )
    assert frechet.frechet_distance(x_MD[:1], x_MD[1:2]) == pytest.approx(np.sum((x_MD[0] - x_MD[1]) ** 2))


@pytest.fixture
def folders(tmp_path):
    """Noise, other noise of the same kind, and hum."""
    for seed, name in enumerate(("noise", "more", "hum")):
        (tmp_path / name).mkdir()
        for index in range(6):
            wave_W = 0.1 * np.random.default_rng([seed, index]).standard_normal(2 * RATE)
            if name == "hum":
                wave_W = np.convolve(wave_W, np.ones(64) / 8, "same")
            soundfile.write(tmp_path / name / f"{index}.wav", wave_W, RATE)
    (tmp_path / "more" / "7.wav").write_bytes(b"RIFF")
    return tmp_path


def bands(wave_W):
    """Energies of four bands, each second."""
    return np.stack([[np.abs(band).mean() for band in np.array_split(np.fft.rfft(s), 4)] for s in np.split(wave_W, 2)])


def test_suite(folders, monkeypatch):
    monkeypatch.setattr(frechet, "EMBEDDINGS", {"bands": Adapter("bands", RATE, lambda: bands, ())})
    generated = [str(folders / "more"), str(folders / "hum")]
    evaluate(Request("fad", str(folders / "out"), data=str(folders / "noise"), generated=generated))
    results = json.loads((folders / "out" / "results.json").read_text())
    found = {name: one["value"] for name, one in results["metrics"].items()}
    read = {n: [bands(soundfile.read(folders / n / f"{i}.wav")[0]) for i in range(6)] for n in ("noise", "more", "hum")}
    for name in ("more", "hum"):
        expected = by_roots(np.concatenate(read["noise"]), np.concatenate(read[name]))
        assert found[name] == pytest.approx(expected, rel=1e-3)
        assert results["metrics"][name]["count"] == 12
    assert found["hum"] > 10 * found["more"] and found["reference_halves"] < found["hum"]
    assert any("more: 1 of 7 recordings could not be used" in note for note in results["notes"])
    assert "hum" in (folders / "out" / "report.html").read_text()


def test_names_of_metrics():
    folders = ["a/hum", "b/hum", "b/noise/", "runs/reference_halves"]
    assert [frechet._name(folder, folders) for folder in folders] == ["a/hum", "b/hum", "noise", folders[3]]


def test_encoder_and_bad_input(folders, bundle_folder, monkeypatch):
    encoder = str(bundle_folder / "semantic_tokenizer")
    request = dict(data=str(folders / "noise"), generated=[str(folders / "hum")])
    evaluate(Request("fad", str(folders / "out"), semantic_tokenizer=[encoder], layers=[1], **request))
    results = json.loads((folders / "out" / "results.json").read_text())
    assert results["metrics"]["hum"]["count"] == 12 and results["metrics"]["hum"]["value"] > 0
    with pytest.raises(UserError, match="no such layer: --layer=99"):
        evaluate(Request("fad", str(folders / "other"), semantic_tokenizer=[encoder], layers=[99], **request))
    monkeypatch.setattr(speakers, "RESEMBLYZER", ())
    absent = Adapter("absent", RATE, lambda: bands, ("no_such_module",), "pip install it")
    monkeypatch.setattr(frechet, "EMBEDDINGS", {"resemblyzer": absent})
    with pytest.raises(UserError, match="nothing to embed with: no module no_such_module; pip install it"):
        evaluate(Request("fad", str(folders / "other"), **request))
    with pytest.raises(UserError, match="suite fad needs --generated"):
        evaluate(Request("fad", str(folders / "other"), data=str(folders / "noise"), generated=[]))
    (folders / "hum2").mkdir()
    with pytest.raises(UserError, match="no recordings"):
        evaluate(
            Request(
                "fad",
                str(folders / "other"),
                data=str(folders / "noise"),
                generated=[str(folders / "hum2")],
                semantic_tokenizer=[encoder],
            )
        )
    assert not (folders / "other").exists()
