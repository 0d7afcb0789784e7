"""What the command line names -> who answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from gmai_xtuner.checkpoint.export_xtuner import SETTINGS_FILE
from gmai_xtuner.core.errors import EvaluationError
from gmai_xtuner.evaluate.answerers.answerer import Answerer

Loader = Literal["auto", "ours", "transformers"]


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model, and how it runs.

    Args:
        model: folder or hub name; of an endpoint the model's name there.
        name: as tables call it; default: the last part of ``model``.
        loader: ``ours`` or ``transformers``; ``auto`` looks for what our exports have.
        llm, vision: bases of an export of stage 1 or 2.
        precision: ``bfloat16``, ``float16`` or ``float32``; None: bf16 on a GPU, fp32 on the CPU.
        device: e.g. ``cuda:1``; None: the GPU of this process if there is one.
        batch_size: questions asked together.
        endpoint: base URL of an OpenAI-compatible server.
        key_variable: name of the environment variable that holds its key.
        in_flight: requests under way at once.
        retries: of one request.
        timeout: seconds that an answer may take.
        temperature: sent to the server; None: not sent, for models that refuse it.
    """

    model: str
    name: str | None = None
    loader: Loader = "auto"
    llm: str | None = None
    vision: str | None = None
    precision: str | None = None
    device: str | None = None
    batch_size: int = 16
    endpoint: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    in_flight: int = 16
    retries: int = 6
    timeout: float = 300.0
    temperature: float | None = 0.0

    @property
    def shown(self) -> str:
        return self.name or Path(self.model.rstrip("/")).name or self.model


def make_answerer(options: ModelOptions, *, cache: Path, local_rank: int = 0) -> Answerer:
    """Load the model, or get ready to ask the endpoint.

    Args:
        options: which.
        cache: folder where hashes of weights are remembered.
        local_rank: this process's GPU.

    Raises:
        GMAIError: it can't be loaded; says why.
    """
    if options.endpoint is not None:
        from gmai_xtuner.evaluate.answerers.endpoint import EndpointAnswerer

        return EndpointAnswerer(options)
    device = torch.device(
        options.device or (f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype = None if options.precision is None else getattr(torch, options.precision)
    if _is_ours(options):
        from gmai_xtuner.evaluate.answerers.ours import load_ours

        return load_ours(
            Path(options.model),
            name=options.shown,
            llm=options.llm,
            vision=options.vision,
            dtype=dtype,
            device=device,
            batch_size=options.batch_size,
            cache=cache,
        )
    from gmai_xtuner.evaluate.answerers.hub import load_from_hub

    if options.llm or options.vision:
        raise EvaluationError(
            f"--llm and --vision belong to exports of this project; {options.model!r} is none"
        )
    return load_from_hub(
        options.model,
        shown=options.shown,
        dtype=dtype,
        device=device,
        batch_size=options.batch_size,
        cache=cache,
    )


def _is_ours(options: ModelOptions) -> bool:
    if options.loader != "auto":
        return options.loader == "ours"
    folder = Path(options.model)
    return (folder / "projector").is_dir() or (folder / SETTINGS_FILE).is_file()
