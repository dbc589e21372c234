"""benchmarks/codecs.py: both sides of a tiny model code the same, and a row says how fast."""

import pytest
from transformers import DacConfig, DacModel, EncodecConfig, EncodecModel

from tests.benchmarks import load

TINY = {
    "DAC": lambda: DacModel(DacConfig(encoder_hidden_size=2, downsampling_ratios=[2, 4], decoder_hidden_size=8,
                                      upsampling_ratios=[4, 2], n_codebooks=2, codebook_size=16, codebook_dim=2,
                                      sampling_rate=16_000)),
    "EnCodec": lambda: EncodecModel(EncodecConfig(hidden_size=4, num_filters=2, upsampling_ratios=[2, 2],
                                                  codebook_size=16, target_bandwidths=[48.0])),
}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_a_row_for_each_step(name):
    codecs = load("codecs")
    codecs.torch_seed()
    lines = codecs.rows(name, TINY[name](), seconds=0.02, repeats=2)
    cells = [dict(zip(codecs.COLUMNS, line.strip("| ").split(" | "), strict=False)) for line in lines]
    assert [(row["codec"], row["step"]) for row in cells] == [(name, "encode"), (name, "decode")]
    assert float(cells[0]["codes that differ"].rstrip("%")) < 1
    assert all(float(row["x transformers"]) > 0 and float(row["ours, x real time"]) > 0 for row in cells)
