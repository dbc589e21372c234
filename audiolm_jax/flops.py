"""FLOPs: what a step's model needs, and what devices can do."""


def peak_flops(device_kind: str) -> float | None:
    return None


def model_flops(config) -> float:
    return 0.0
