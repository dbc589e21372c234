"""Eight devices train a codec as one does, with the balancer and without."""

import pytest

from tests.training.devices import on_eight_devices


@pytest.mark.slow
def test_eight_devices_equal_one_in_double_precision():
    """Twenty steps: the same codes throughout, though codes die and their replacements are drawn."""
    for result in on_eight_devices("tests.codec.meshes", "float64", JAX_ENABLE_X64="1").values():
        assert result["codes_that_differ"] == 0 and result["skipped"] == 0
        assert result["replaced"] > 0 and result["discriminator"] > 0
        assert result["metrics"] < 1e-9 and result["gradient_norms"] < 1e-8
        assert result["codebooks"] < 1e-8 and result["weights"] < 1e-8
        assert result["held"] < 0.6
        assert result["reconstruction"][-1] < 0.95 * result["reconstruction"][0]


@pytest.mark.slow
def test_the_first_step_of_eight_devices_equals_that_of_one_in_single_precision():
    for result in on_eight_devices("tests.codec.meshes", "float32").values():
        assert max(result["metrics"], result["gradient_norms"], result["gradients"]) < 1e-5
