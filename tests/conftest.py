"""What every test shares: the processor as the device, and recordings made on the spot."""

import importlib.metadata
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: half the compiler's time goes into faster code, and there are two workers.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# A flag that the compiler does not know ends the process.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_parallel_codegen_split_count=1"
    + (" --xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else ""),
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import hypothesis
import jax
import pytest

# An example may wait for a compilation, or for the other worker.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Each compiled program holds some of the 65 530 memory maps of a process; without any, the compiler crashes."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and len(maps.read_text().splitlines()) > 30_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory):
    """A bundle of the smallest parts with random weights."""
    from tests import tiny

    return tiny.write_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="session")
def model(bundle_folder):
    """It, loaded."""
    import audiolm_jax

    return audiolm_jax.load_bundle(bundle_folder)


@pytest.fixture
def float64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield
