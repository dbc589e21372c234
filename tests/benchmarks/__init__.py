import importlib.util
import pathlib
import types

SCRIPTS = pathlib.Path(__file__).resolve().parent.parent.parent / "benchmarks"


def load(name: str) -> types.ModuleType:
    """A script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
