"""Eight devices compute what one does, however they share the work."""

import numpy as np
import pytest

from tests.training.devices import on_eight_devices
from tests.training.meshes import MESHES


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_eight_devices_equal_one(optimizer):
    results = on_eight_devices("tests.training.meshes", optimizer)
    assert list(results) == list(MESHES)
    single = results.pop("single")
    assert single["losses"][-1] < single["losses"][0] - 0.01
    for name, result in results.items():
        np.testing.assert_allclose(result["losses"], single["losses"], rtol=1e-5, err_msg=name)
        assert result["relative_distance"] < 1e-4, name
        assert result["model_flops"] == single["model_flops"], name
    # Nothing large is left whole on every device.
    assert results["data"]["held"] == 1.0
    for name in ("fsdp", "tensor", "combined"):
        assert results[name]["held"] < 0.3, name


# Of the classifier above all the statistics of the batch normalisation, which are of the whole batch.
@pytest.mark.slow
@pytest.mark.parametrize(("objective", "mesh", "held"), [("w2v_bert", "combined", 0.6), ("classifier", "fsdp", 0.5)])
def test_eight_devices_train_on_recordings_as_one_does(objective, mesh, held):
    results = on_eight_devices("tests.training.meshes", objective)
    single = results.pop("single")
    for name, result in results.items():
        np.testing.assert_allclose(result["losses"], single["losses"], rtol=1e-5, err_msg=name)
        assert result["relative_distance"] < 1e-4, name
    assert results[mesh]["held"] < held
