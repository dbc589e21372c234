"""How w2v-BERT's training shows that it goes wrong, read from moving averages of its metrics (see `training.watch`)."""

from collections.abc import Mapping

from audiolm_jax.objective import Symptom

# Of the codebook's size. Trainings in good health name targets as if from a quarter of the codes or more.
COLLAPSED = 0.1


def symptoms(codebook_size: int) -> tuple[Symptom, ...]:
    """Of a quantizer of so many codes.

    codebook_collapsed: the perplexity of the targets is below `COLLAPSED` of the codes. Masked prediction then looks
    easy, and learns nothing.
    """

    def codebook_collapsed(averages: Mapping[str, float], _) -> str | None:
        used = averages["target_perplexity"]
        if used >= COLLAPSED * codebook_size:
            return None
        return f"targets are as if of {used:.1f} of {codebook_size} codes; raise config.loss.diversity_weight"

    return (Symptom("codebook_collapsed", ("target_perplexity",), codebook_collapsed),)
