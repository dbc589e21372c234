"""Makes an alignment table, and so ABX items, from recordings and their transcripts; see docs/abx.md.

    python benchmarks/abx_items.py CORPUS --language=fr --output=CORPUS/fr          # espeak-ng, 100 languages
    python benchmarks/abx_items.py CORPUS --language=en --method=pocketsphinx --output=CORPUS/en
    python benchmarks/abx_items.py CORPUS --language=en --compare                   # how far the two lie apart

CORPUS/utterances.tsv has a header and the columns path, speaker, seconds, text; --language takes the recordings below
CORPUS/LANGUAGE. `espeak`: espeak-ng (Debian's libespeak-ng1) speaks the text and says when each phone begins; dynamic
time warping of log-mel cepstra carries these times over to the recording. `pocketsphinx` (of PyPI): forced alignment by
its English acoustic model; words that are not in its dictionary leave a recording out. OUTPUT/alignment.tsv appears.
"""

import argparse
import csv
import ctypes
import difflib
import pathlib
import re
import sys

import numpy as np

from audiolm_jax import audio, files
from audiolm_jax.errors import UserError
from audiolm_jax.evaluation import phonetics
from audiolm_jax.evaluation.alignment import COLUMNS, TABLE, Segment

RATE, FRAME_SECONDS, NUM_CEPSTRA = 16_000, 0.01, 13
VOICES = {"en": "en-us", "fr": "fr", "es": "es-419"}
# English consonants, IPA to ARPAbet, by which the two methods are compared.
CONSONANTS = {
    **{name: name for name in "pbtdkmnfvszlw"},
    **{"ɡ": "g", "ŋ": "ng", "θ": "th", "ð": "dh", "ʃ": "sh", "tʃ": "ch", "dʒ": "jh", "h": "hh", "ɹ": "r", "j": "y"},
}
TOLERANCES_MS = (20, 50)


class _Event(ctypes.Structure):
    """`espeak_EVENT` of espeak-ng's speak_lib.h."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("name", ctypes.c_char * 8),
    ]


class Espeak:
    """Speaks a text and tells its phones. The library has one state: one object a process."""

    _CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
    _RETRIEVAL, _PHONEME_EVENTS, _IPA, _PHONEME, _CHARACTERS, _UTF8 = 1, 1, 2, 7, 1, 1

    def __init__(self, voice: str):
        try:
            self._library = ctypes.CDLL("libespeak-ng.so.1")
        except OSError as error:
            raise UserError("no libespeak-ng.so.1", "espeak-ng", "apt-get install libespeak-ng1") from error
        self._rate = self._library.espeak_Initialize(self._RETRIEVAL, 0, None, self._PHONEME_EVENTS | self._IPA)
        if self._library.espeak_SetVoiceByName(voice.encode()):
            raise UserError("espeak-ng has no such voice", voice, "choose one of `espeak-ng --voices`")
        self._callback = self._CALLBACK(self._receive)
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples, count, events) -> int:
        if count:
            self._wave.append(np.ctypeslib.as_array(samples, (count,)).astype(np.float32) / 2**15)
        index = 0
        while events[index].type:
            if events[index].type == self._PHONEME:
                self._phones.append((events[index].audio_position / 1000, events[index].name.decode(errors="ignore")))
            index += 1
        return 0

    def speak(self, text: str) -> tuple[np.ndarray, list[tuple[float, float, str]]]:
        """The waveform at `RATE`, and onset, offset and IPA name of its phones (stress left out, pauses as "sil")."""
        self._wave: list[np.ndarray] = []
        self._phones: list[tuple[float, str]] = []
        data = text.encode()
        self._library.espeak_Synth(data, len(data) + 1, 0, self._CHARACTERS, 0, self._UTF8, None, None)
        self._library.espeak_Synchronize()
        wave_W = audio.resample(np.concatenate(self._wave), self._rate, RATE)
        onsets = [onset for onset, _ in self._phones] + [len(wave_W) / RATE]
        names = [re.sub("[ˈˌ]", "", name) or "sil" for _, name in self._phones]
        return wave_W, [phone for phone in zip(onsets, onsets[1:], names) if phone[1] > phone[0]]


def cepstra(wave_W: np.ndarray) -> np.ndarray:
    """Log-mel cepstra [T, D] every 10 ms, and their slopes, each with zero mean and unit variance."""
    import scipy.fft

    x_TD = scipy.fft.dct(phonetics.log_mel(wave_W), norm="ortho")[:, :NUM_CEPSTRA]
    x_TD = np.concatenate([x_TD, np.gradient(x_TD, axis=0)], axis=1)
    return (x_TD - x_TD.mean(axis=0)) / (x_TD.std(axis=0) + 1e-3)


def warping(x_TD: np.ndarray, y_UD: np.ndarray) -> np.ndarray:
    """For each frame of `x` the middle of those of `y` that the path of least total distance pairs it with: [T]."""
    from scipy.spatial.distance import cdist

    cost_TU = cdist(x_TD, y_UD)
    total_TU = np.empty_like(cost_TU)
    total_TU[0] = np.cumsum(cost_TU[0])
    for t in range(1, len(cost_TU)):
        above_U = total_TU[t - 1]
        entered_U = np.minimum(above_U, np.concatenate([[np.inf], above_U[:-1]]))
        # Going on to the right from where the row was entered: a running minimum of totals less the row's running sum.
        sum_U = np.cumsum(cost_TU[t])
        total_TU[t] = sum_U + np.minimum.accumulate(entered_U - (sum_U - cost_TU[t]))
    t, u = total_TU.shape[0] - 1, total_TU.shape[1] - 1
    path = [(t, u)]
    while t or u:
        steps = [(t - 1, u - 1), (t - 1, u), (t, u - 1)]
        t, u = min((step for step in steps if min(step) >= 0), key=lambda step: total_TU[step])
        path.append((t, u))
    rows, columns = np.array(path).T
    return np.bincount(rows, columns) / np.bincount(rows)


def align_espeak(espeak: Espeak, wave_W: np.ndarray, text: str) -> list[tuple[float, float, str]]:
    """Onset, offset and name of the phones of a recording by espeak-ng's rendering of its text."""
    spoken_W, phones = espeak.speak(text)
    place_T = warping(cepstra(spoken_W), cepstra(wave_W))
    edges = np.array([onset for onset, _, _ in phones] + [phones[-1][1]]) / FRAME_SECONDS - 0.5
    edges = (np.interp(edges, np.arange(len(place_T)), place_T) + 0.5) * FRAME_SECONDS
    return [(edges[i], edges[i + 1], name) for i, (_, _, name) in enumerate(phones) if edges[i + 1] > edges[i]]


class Pocketsphinx:
    """Forced alignment by the acoustic model that the package carries."""

    def __init__(self):
        import pocketsphinx

        self._decoder = pocketsphinx.Decoder(lm=None, samprate=RATE, loglevel="FATAL")

    def align(self, wave_W: np.ndarray, text: str) -> list[tuple[float, float, str]] | None:
        """Onset, offset and ARPAbet name of the phones; None where a word is unknown or the text does not fit."""
        pcm = np.round(np.clip(wave_W, -1, 1) * (2**15 - 1)).astype("<i2").tobytes()
        words = re.sub(r"[^a-z' ]+", " ", text.lower()).split()
        try:
            self._decoder.set_align_text(" ".join(words))
            self._decode(pcm)
            self._decoder.set_alignment()
            self._decode(pcm)
            aligned = self._decoder.get_alignment()
        except RuntimeError:
            return None
        phones = [phone for word in aligned or () for phone in word]
        return [
            (phone.start * FRAME_SECONDS, (phone.start + phone.duration) * FRAME_SECONDS, phone.name.lower())
            for phone in phones
        ] or None

    def _decode(self, pcm: bytes):
        self._decoder.start_utt()
        self._decoder.process_raw(pcm, full_utt=True)
        self._decoder.end_utt()


def utterances(corpus: pathlib.Path, language: str, limit: int | None) -> list[dict[str, str]]:
    """Rows of the corpus' table, of recordings below its folder of that language that have a text."""
    with open(corpus / "utterances.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [row for row in rows if row["path"].startswith(f"{language}/") and row["text"].strip()][:limit]


def write_table(path: pathlib.Path, segments: list[Segment], suffix: str):
    lines = ["\t".join((*COLUMNS, "speaker"))]
    for one in segments:
        lines.append(f"{one.file}{suffix}\t{one.onset:.3f}\t{one.offset:.3f}\t{one.phone}\t{one.speaker}")
    files.write_bytes(path, ("\n".join(lines) + "\n").encode())


def compare(corpus: pathlib.Path, rows: list[dict[str, str]], espeak: Espeak):
    """Prints how far apart the two methods put the onsets of the consonants that both of them name alike, in order."""
    sphinx, apart = Pocketsphinx(), []
    for row in rows:
        wave_W = audio.read(corpus / row["path"], RATE)
        if (theirs := sphinx.align(wave_W, row["text"])) is None:
            continue
        ours = align_espeak(espeak, wave_W, row["text"])
        names = [CONSONANTS.get(name) for _, _, name in ours]
        matcher = difflib.SequenceMatcher(None, names, [name for _, _, name in theirs], autojunk=False)
        for a, b, size in matcher.get_matching_blocks():
            apart.extend(abs(ours[a + k][0] - theirs[b + k][0]) for k in range(size))
    apart_ms = 1000 * np.array(apart)
    shares = ", ".join(f"{np.mean(apart_ms <= limit):.0%} within {limit} ms" for limit in TOLERANCES_MS)
    print(f"{len(apart)} onsets: median {np.median(apart_ms):.0f} ms, mean {apart_ms.mean():.0f} ms; {shares}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=pathlib.Path)
    parser.add_argument("--language", required=True, choices=VOICES)
    parser.add_argument("--method", default="espeak", choices=("espeak", "pocketsphinx"))
    parser.add_argument("--limit", type=int, help="only so many recordings")
    parser.add_argument("--output", type=pathlib.Path, help="folder of the table: the recordings' own")
    parser.add_argument("--compare", action="store_true", help="compare both methods, write nothing")
    options = parser.parse_args()
    rows = utterances(options.corpus, options.language, options.limit)
    if options.compare:
        compare(options.corpus, rows, Espeak(VOICES[options.language]))
        return
    if options.method == "pocketsphinx":
        align = Pocketsphinx().align
    else:
        espeak = Espeak(VOICES[options.language])
        align = lambda wave_W, text: align_espeak(espeak, wave_W, text)
    output = options.output or options.corpus / options.language
    segments, left_out = [], 0
    for row in rows:
        path = options.corpus / row["path"]
        phones = align(audio.read(path, RATE), row["text"])
        left_out += phones is None
        name = path.relative_to(output).with_suffix("").as_posix()
        segments.extend(Segment(name, *phone, row["speaker"]) for phone in phones or ())
    write_table(output / TABLE, segments, pathlib.Path(rows[0]["path"]).suffix)
    print(f"{len(segments)} phones of {len(rows) - left_out} recordings, {left_out} left out", file=sys.stderr)


if __name__ == "__main__":
    main()
