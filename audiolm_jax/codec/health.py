"""How a codec's training shows that it goes wrong, read from moving averages of its metrics (see `training.watch`)."""

from collections.abc import Mapping

from audiolm_jax.objective import Symptom

# The reconstruction loss is a sum of logarithms of spectra: it wavers by a few per cent, and by a tenth or two when
# the discriminators join.
RISE = 1.5
# A discriminator that others keep up with has a hinge loss between 1 and 2; at this one it has nothing left to learn,
# nor has the codec from it.
WON = 0.05
# Of a codebook's size. Levels in good health use more than a third of theirs.
COLLAPSED = 0.05


def symptoms(num_quantizers: int, codebook_size: int) -> tuple[Symptom, ...]:
    """Of a codec of so many levels and codes.

    diverging: the reconstruction loss is `RISE` times its lowest average.
    discriminator_wins: the discriminators' loss is below `WON` while they are right about reconstructions.
    codebook_collapsed: a level's perplexity is below `COLLAPSED` of its codes.
    """

    def diverging(averages: Mapping[str, float], lowest: Mapping[str, float]) -> str | None:
        now, best = averages["reconstruction"], lowest["reconstruction"]
        return f"the reconstruction loss rose from {best:.4g} to {now:.4g}" if now > RISE * best else None

    def discriminator_wins(averages: Mapping[str, float], _) -> str | None:
        # Both are 0 until the discriminators start.
        won = averages["accuracy_fake"] > 0.9 and averages["discriminator"] < WON
        return f"the discriminators' loss is {averages['discriminator']:.2g}: they tell every fake" if won else None

    def codebook_collapsed(averages: Mapping[str, float], _) -> str | None:
        usage_Q = [averages[name] for name in perplexities]
        level = min(range(num_quantizers), key=usage_Q.__getitem__)
        if usage_Q[level] >= COLLAPSED * codebook_size:
            return None
        return f"level {level} uses as if it had {usage_Q[level]:.1f} of its {codebook_size} codes"

    perplexities = tuple(f"perplexity_{level}" for level in range(num_quantizers))
    return (
        Symptom("diverging", ("reconstruction",), diverging),
        Symptom("discriminator_wins", ("discriminator", "accuracy_fake"), discriminator_wins),
        Symptom("codebook_collapsed", perplexities, codebook_collapsed),
    )
