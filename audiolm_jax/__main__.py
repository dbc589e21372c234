"""`python -m audiolm_jax` is `audiolm`."""

from audiolm_jax.cli import main

if __name__ == "__main__":
    main()
