"""One self-contained HTML file: recordings to hear, see and tell apart, tables, plots, and how it was made."""

import base64
import dataclasses
import hashlib
import io
import itertools
import json
import platform
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import jinja2
import matplotlib.figure
import numpy as np

import audiolm_jax
from audiolm_jax import audio, spectral
from audiolm_jax.evaluation.statistics import Estimate

ACCENT, MUTED = "#0b6e75", "#8a8f98"
COLORS = (ACCENT, MUTED, "#b3261e", "#c77700", "#6a4fb3", "#3a7d2c")
# What a clip is in the blind test.
ORIGINAL, RECONSTRUCTION, GENERATED = "original", "reconstruction", "generated"
DETAILS_PLACE = "<!-- details -->"  # In the template.


@dataclasses.dataclass(frozen=True)
class Clip:
    """One recording of the report.

    Attributes:
      title: what it is.
      wave_W: samples.
      sample_rate: Hz.
      boundary: seconds at which the prompt ends and new audio begins; None where nothing does.
      kind: ORIGINAL, RECONSTRUCTION or GENERATED. The blind test sets generated clips against their group's
        reconstruction, or original where it has none; None takes no part.
    """

    title: str
    wave_W: np.ndarray
    sample_rate: int
    boundary: float | None = None
    kind: str | None = None

    @property
    def seconds(self) -> float:
        return len(self.wave_W) / self.sample_rate

    def audio_uri(self) -> str:
        """The samples as a WAV data URI: 1.6 times the size of a FLAC, in which Chromium 156 cannot seek to the end."""
        return _uri("audio/wav", audio.encode_wav(self.wave_W, self.sample_rate))

    def picture_uri(self) -> str:
        """Waveform and log-mel spectrogram, the boundary marked, as a WebP data URI.

        Time runs from edge to edge, so that a share of the width is the same share of the clip.
        """
        figure = matplotlib.figure.Figure(figsize=(6.4, 2.2))
        wave_axes = figure.add_axes((0, 0.72, 1, 0.28))
        mel_axes = figure.add_axes((0, 0.15, 1, 0.57), sharex=wave_axes)
        times = np.arange(len(self.wave_W)) / self.sample_rate
        wave_axes.plot(times, self.wave_W, linewidth=0.4, color="#1a8f97")
        wave_axes.set(ylim=(-1, 1), xlim=(0, self.seconds))
        wave_axes.set_axis_off()
        hop = self.sample_rate // 100
        mel_BTM = spectral.mel_spectrogram(
            jnp.asarray(self.wave_W, jnp.float32)[None], self.sample_rate, 4 * hop, hop, 64
        )
        decibels_MT = 20 * np.log10(np.maximum(np.asarray(mel_BTM)[0].T, 1e-3))
        mel_axes.imshow(
            decibels_MT, origin="lower", aspect="auto", extent=(0, self.seconds, 0, 64), cmap="magma", vmin=-60, vmax=40
        )
        ticks = [tick for tick in mel_axes.get_xticks() if 0.03 < tick / self.seconds < 0.97]
        mel_axes.set(yticks=(), xticks=ticks, xticklabels=[f"{tick:g} s" for tick in ticks])
        mel_axes.tick_params(colors="#737a84", labelsize=13, pad=1)
        mel_axes.spines[:].set_visible(False)
        for axes in (wave_axes, mel_axes):
            if self.boundary is not None:
                axes.axvline(self.boundary, color="#3ddc84", linewidth=3)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="webp", dpi=150, transparent=True, pil_kwargs={"quality": 60})
        return _uri("image/webp", buffer.getvalue())


@dataclasses.dataclass(frozen=True)
class Group:
    """Recordings that belong together: an original and what was made of it."""

    title: str
    text: str
    clips: Sequence[Clip]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of measured figures; each row as long as the header."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Curve:
    """One run's training curve.

    Attributes:
      title: of the plot.
      label: of the vertical axis.
      train, held_out: pairs of step and value.
      floor: a value to beat, drawn as a dashed line with its name.
    """

    title: str
    label: str
    train: Sequence[tuple[int, float]]
    held_out: Sequence[tuple[int, float]]
    floor: tuple[str, float] | None = None

    def picture_uri(self) -> str:
        figure, axes = _figure()
        axes.plot(*np.reshape(self.train, (-1, 2)).T, linewidth=1.5, color=MUTED, label="training")
        axes.plot(
            *np.reshape(self.held_out, (-1, 2)).T, "o-", linewidth=1.5, markersize=4, color=ACCENT, label="held out"
        )
        if self.floor is not None:
            axes.axhline(self.floor[1], color="#b3261e", linestyle="--", linewidth=1, label=self.floor[0])
        axes.set(title=self.title, xlabel="step", ylabel=self.label)
        axes.legend(frameon=False, fontsize="small")
        return _figure_uri(figure)


@dataclasses.dataclass(frozen=True)
class IntervalPlot:
    """A measure over a quantity, with its intervals.

    Attributes:
      title: the measure.
      label: of the horizontal axis.
      series: pairs of the quantity and the measure there, by name.
      floors: a value to beat for each series that has one, drawn as a dashed line in its colour.
      logarithmic: whether the horizontal axis is.
    """

    title: str
    label: str
    series: Mapping[str, Sequence[tuple[float, Estimate]]]
    floors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    logarithmic: bool = False

    def picture_uri(self) -> str:
        figure, axes = _figure()
        for (name, points), color in zip(self.series.items(), itertools.cycle(COLORS)):
            places = [place for place, _ in points]
            value, low, high = (
                np.array([getattr(found, field) for _, found in points]) for field in ("value", "low", "high")
            )
            axes.errorbar(places, value, (value - low, high - value), fmt="o-", capsize=2, color=color, label=name)
            if name in self.floors:
                axes.axhline(self.floors[name], color=color, linestyle="--", linewidth=1)
        axes.set(title=self.title, xlabel=self.label)
        axes.set(xscale="log") if self.logarithmic else axes.set(xlim=(0, 1.05 * axes.dataLim.xmax))
        axes.legend(frameon=False, fontsize="small")
        return _figure_uri(figure)


@dataclasses.dataclass(frozen=True)
class Bars:
    """How often each whole number from 0 on came, in at most `MAX_BARS` bars of equal width."""

    title: str
    label: str
    counted: str
    counts: Sequence[int]

    MAX_BARS: ClassVar[int] = 60

    def picture_uri(self) -> str:
        width = -(-len(self.counts) // self.MAX_BARS) or 1
        counts = np.add.reduceat(self.counts, np.arange(0, len(self.counts), width))
        figure, axes = _figure()
        axes.bar(np.arange(len(counts)) * width, counts, width, align="edge", color=ACCENT)
        axes.set(title=self.title, xlabel=self.label, ylabel=self.counted, xlim=(0, max(1, len(counts) * width)))
        return _figure_uri(figure)


@dataclasses.dataclass(frozen=True)
class Lines:
    """Values by their rank from 1 on, on logarithmic axes; a value of 0 is not drawn."""

    title: str
    label: str
    measure: str
    series: Mapping[str, np.ndarray]

    def picture_uri(self) -> str:
        figure, axes = _figure()
        for name, values in self.series.items():
            shown = values[values > 0]
            axes.plot(np.arange(1, len(shown) + 1), shown, linewidth=1.2, label=name)
        axes.set(title=self.title, xlabel=self.label, ylabel=self.measure, xscale="log", yscale="log")
        axes.legend(frameon=False, fontsize="x-small", ncols=2)
        return _figure_uri(figure)


def render(
    title: str,
    introduction: str,
    tables: Sequence[Table],
    curves: Sequence[Curve | IntervalPlot | Bars | Lines],
    groups: Sequence[Group],
    commands: str = "",
    notes: Sequence[str] = (),
) -> str:
    """The report as one HTML page that needs nothing else, no network either; `with_details` completes it.

    Notes follow the introduction, a sentence each.
    """
    return _template("report.html.j2").render(
        title=title,
        introduction=" ".join([introduction, *(f"{note}." for note in notes)]),
        tables=tables,
        curves=curves,
        groups=groups,
        commands=commands,
        identity=_identity(groups),
        prompted=any(clip.boundary is not None for group in groups for clip in group.clips),
    )


def with_details(page: str, details: Mapping[str, Any]) -> str:
    """The page of `render` with a section on how it was made.

    Args:
      page: the HTML.
      details: text, or what JSON can hold, by name: configuration, seeds, fingerprints.
    """
    texts = {
        name: value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
        for name, value in details.items()
    }
    return page.replace(DETAILS_PLACE, _template("details.html.j2").render(details=texts))


def software() -> dict[str, str]:
    """Versions of what figures depend on."""
    return {"audiolm_jax": audiolm_jax.__version__, "jax": jax.__version__, "python": platform.python_version()}


def _template(name: str) -> jinja2.Template:
    loader = jinja2.PackageLoader(__package__, "")
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(name)


def _identity(groups: Sequence[Group]) -> str:
    """Hash of everything to be heard: answers of a blind test belong to it."""
    digest = hashlib.sha256()
    for group in groups:
        for clip in group.clips:
            digest.update(json.dumps([group.title, clip.title, clip.sample_rate, clip.kind]).encode())
            digest.update(np.ascontiguousarray(clip.wave_W, np.float32).data)
    return digest.hexdigest()[:32]


def _figure() -> tuple[matplotlib.figure.Figure, matplotlib.axes.Axes]:
    """An empty plot as all of a report are."""
    figure = matplotlib.figure.Figure(figsize=(4.2, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _figure_uri(figure: matplotlib.figure.Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return _uri("image/png", buffer.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
