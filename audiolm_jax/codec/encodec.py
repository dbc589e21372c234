"""EnCodec: SEANet's convolutions around an LSTM and a residual quantizer (Défossez et al., arXiv 2210.13438)."""

import dataclasses

from audiolm_jax.codec import seanet
from audiolm_jax.codec.quantizer import ResidualQuantizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodecConfig(seanet.SeanetConfig):
    """Architecture of the codec: the fields of a config's `model`; see `SeanetConfig`."""

    @property
    def encoder(self) -> seanet.Encoder:
        """Waveforms to frame vectors."""
        return seanet.Encoder(self)

    @property
    def decoder(self) -> seanet.Decoder:
        """Frame vectors to waveforms."""
        return seanet.Decoder(self)

    @property
    def quantizer(self) -> ResidualQuantizer:
        """Frame vectors to codes and back."""
        return ResidualQuantizer(self.num_quantizers, self.codebook_size, self.embed_dim)

    @property
    def streams(self) -> bool:
        """No: what comes before the first sample is the reflection of those after it, of which a short first chunk of
        frames holds too few, and so on at each layer; and the normalised variant looks at the whole recording."""
        return False

    @property
    def reach(self) -> None:
        """A decoded sample depends on all frames: on those before it by the LSTM."""
        return None
