"""Decoding chunk by chunk, for codecs that stream and for those that look ahead.

Shape suffixes: B batch, W waveform samples, T frames, Q levels.
"""

from typing import Any

import numpy as np

from audiolm_jax.codec.codec import Codec


class ChunkDecoder:
    """Waveforms of a batch of recordings, of which the codes come chunk by chunk: what `Codec.decode` makes of each.

    A codec that streams gives the waveform of every chunk at once. Any other one needs the frames around: the last ones
    that have come wait for those after them, and what is ready is the middle of a decoded window of codes. That takes
    the same memory for any length, and the same chunks compile once; only a codec whose samples depend on all frames
    (`Architecture.reach` is None) gives everything at the end.

    Args:
      codec: whose codes they are.
    """

    def __init__(self, codec: Codec):
        self._codec = codec
        self._state: Any = None
        # The last frames that have come, frames of each row so far, and for how many frames waveforms have been given.
        self._codes_BTQ = np.zeros((0, 0, 0), np.int32)
        self._lengths_B = np.zeros(0, np.int64)
        self._received = self._given = 0

    def decode(self, codes_BTQ, lengths_B: np.ndarray | None = None) -> np.ndarray:
        """Takes the next frames and gives what is ready.

        Args:
          codes_BTQ: integers [B, T, Q]; take chunks of one size, as each is a program of its own.
          lengths_B: how many of these frames each row has, fewer than T where it ends; all by default.

        Returns:
          float32 [B, W], whole frames, those that follow on what has been given before; none where nothing is ready.
          What a row holds after its end does not matter.

        Raises:
          UserError: as `Codec.decode`.
        """
        codes_BTQ = np.asarray(codes_BTQ)
        batch, num_frames, _ = codes_BTQ.shape
        if not self._received:
            self._codes_BTQ, self._lengths_B = codes_BTQ[:, :0], np.zeros(batch, np.int64)
        if self._codec.config.streams:
            chunk_BW, self._state = self._codec.decode_chunk(codes_BTQ, self._state)
            return np.asarray(chunk_BW)
        self._codes_BTQ = np.concatenate([self._codes_BTQ, codes_BTQ], axis=1)
        self._lengths_B = self._lengths_B + (num_frames if lengths_B is None else lengths_B)
        self._received += num_frames
        reach = self._codec.config.reach
        if reach is None:
            return np.zeros((batch, 0), np.float32)
        wave_BW = self._until(self._received - reach)
        self._codes_BTQ = self._codes_BTQ[:, max(0, self._given - reach - self._first) :]
        return wave_BW

    def finish(self) -> np.ndarray:
        """What is left once all frames have come, float32 [B, W]: with it, T · hop samples of T frames."""
        return self._until(self._received)

    @property
    def _first(self) -> int:
        return self._received - self._codes_BTQ.shape[1]

    def _until(self, stop: int) -> np.ndarray:
        """The waveform from the last frame given to `stop`, decoded with all frames that are still there."""
        batch, num_frames, _ = self._codes_BTQ.shape
        if stop <= self._given:
            return np.zeros((batch, 0), np.float32)
        first, hop = self._first, self._codec.hop_length
        lengths_B = np.clip(self._lengths_B - first, 0, num_frames)
        wave_BW = np.asarray(self._codec.decode(self._codes_BTQ, lengths_B))
        # A decoder may leave out the last samples of the last frame.
        wave_BW = np.pad(wave_BW, ((0, 0), (0, num_frames * hop - wave_BW.shape[1])))
        piece_BW = wave_BW[:, (self._given - first) * hop : (stop - first) * hop]
        self._given = stop
        return piece_BW
