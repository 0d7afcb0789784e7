# SPDX-License-Identifier: Apache-2.0

"""The GMAI-VL model: CLIP (or SigLIP) vision tower, MLP projector, InternLM2.5 as Llama.

Shapes: ``N`` images, ``P`` patch tokens of an image (576 at 336 px and patch 14), ``C`` width of the
vision tower, ``T`` tokens of the flat batch, ``M`` supervised tokens, ``D`` width of the language model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mmengine.model import BaseModel
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionConfig, SiglipVisionConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from xtuner.model.modules import ProjectorConfig, ProjectorModel
from xtuner.registry import BUILDER

from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.model.attention import SequenceBoundaries, install_boundary_attention
from gmai_xtuner.model.liger import install_liger, require_liger
from gmai_xtuner.model.lora import add_adapters, load_adapters
from gmai_xtuner.model.loss import install_loss_head


def building_on_meta() -> bool:
    """Whether new parameters currently land on the meta device.

    ``xtuner convert pth_to_hf`` builds models this way (``accelerate.init_empty_weights``) and
    fills them afterwards, so there is no point in reading the base weights.
    """
    return torch.nn.Linear(1, 1).weight.device.type == "meta"


def num_class_tokens(vision_config: CLIPVisionConfig | SiglipVisionConfig) -> int:
    """Tokens before the patches that the projector does not read: 1 in CLIP, none in SigLIP."""
    return int(vision_config.model_type == "clip_vision_model")


def num_image_tokens(vision_config: CLIPVisionConfig | SiglipVisionConfig) -> int:
    """Patch tokens of one image, without the class token: 576 for ViT-L/14 at 336 pixels."""
    return (vision_config.image_size // vision_config.patch_size) ** 2


class ImageFeatureMismatch(GMAIError):
    """Image features and their places in the sequence differ in number."""


def _keep_frequencies_exact(rotary: Any, args: tuple[object, ...]) -> None:
    # DeepSpeed's bf16 engine calls `module.bfloat16()`, which also rounds the rotary frequencies: at
    # position 2,000 the angle of the fastest pair would be off by radians, and differ from inference.
    if rotary.inv_freq.dtype != torch.float32:
        rotary.inv_freq = rotary.original_inv_freq.to(rotary.inv_freq.device, torch.float32)


def _prepare_rotary(rotary: Any) -> None:
    rotary.register_forward_pre_hook(_keep_frequencies_exact)
    update = rotary._dynamic_frequency_update

    def update_if_longer(position_ids: torch.Tensor, device: torch.device) -> None:
        # Dynamic scaling looks for the largest position, for which the host waits for the device. In
        # training the batch's own length, known on the host, already shows that there is no need.
        if not (rotary.training and position_ids.shape[-1] <= rotary.original_max_seq_len):
            update(position_ids, device=device)

    rotary._dynamic_frequency_update = update_if_longer


def use_reentrant() -> bool:
    """Which of torch's two implementations to take.

    The newer one compares the tensors that it saves in the forward and in the recomputed pass. ZeRO-3
    gathers each weight for the moment of its use, so their shapes differ and it raises; weights below
    ``stage3_param_persistence_threshold`` are never released, which hides this on tiny models. Under
    ZeRO-3 the older, re-entrant one is right: its only condition, an input that needs a gradient, always
    holds here, because the projector learns in every stage.
    """
    return is_deepspeed_zero3_enabled()


def recompute_first_layers(decoder: Any, layers: int | None) -> None:
    """Let a ``LlamaModel`` with gradient checkpointing recompute its first ``layers`` layers only; None: all.

    The last ones keep their activations: the backward pass frees those first, before any layer is
    recomputed. ``decoder.recomputed_layers`` is the number, and may be changed.
    """
    total = len(decoder.layers)
    layers = total if layers is None else min(layers, total)
    if layers < 0:
        raise GMAIError(f"recomputed_layers must be 0 or more, got {layers}")
    recomputed, decoder.recomputed_layers = decoder._gradient_checkpointing_func, layers

    def choose(call: Any, *arguments: Any) -> Any:
        kept = call.__self__.self_attn.layer_idx >= decoder.recomputed_layers
        return call(*arguments) if kept else recomputed(call, *arguments)

    decoder._gradient_checkpointing_func = choose


class LLaVA(BaseModel):
    """Vision tower (layer -2, patch tokens) -> linear, GELU, linear -> language model.

    Paper: section "GMAI-VL: A General Medical Vision-Language Model" and Table 8 (which parts learn).

    Args:
        llm: config of ``gmai_xtuner.checkpoint.bases.load_language_model`` (or a module).
        visual_encoder: config of ``gmai_xtuner.checkpoint.bases.load_vision_tower`` (or a module).
        freeze_llm: keep the language model as it is (stages 1 and 2).
        freeze_visual_encoder: keep the vision tower as it is (stage 1).
        llm_lora: config of a ``peft.LoraConfig``: adapters on the language model learn, and its own
            weights don't, whatever ``freeze_llm`` says. See :mod:`gmai_xtuner.model.lora`.
        visual_encoder_lora: the same for the vision tower.
        visual_select_layer: hidden state of the tower that is used; -2 is the one before the last.
        projector_depth: linear layers of the projector.
        use_activation_checkpointing: recompute activations in the backward pass.
        recomputed_layers: of the language model's layers, how many are recomputed, the first ones; the
            others keep their activations, which is faster where memory allows. Default: all.
        attention: ``auto``, ``varlen`` or ``sdpa_loop``, see
            :mod:`gmai_xtuner.model.attention`.
        loss_chunk_size: tokens for which logits exist at a time.
        liger: use Liger's kernels (CUDA), see :mod:`gmai_xtuner.model.liger`.

    Raises:
        GMAIError: isolation of the conversations of a pack can't be had.
    """

    def __init__(
        self,
        llm: Mapping[str, Any] | nn.Module,
        visual_encoder: Mapping[str, Any] | nn.Module,
        *,
        freeze_llm: bool = False,
        freeze_visual_encoder: bool = False,
        llm_lora: Mapping[str, Any] | None = None,
        visual_encoder_lora: Mapping[str, Any] | None = None,
        visual_select_layer: int = -2,
        projector_depth: int = 2,
        use_activation_checkpointing: bool = True,
        recomputed_layers: int | None = None,
        attention: str = "auto",
        loss_chunk_size: int = 2048,
        liger: bool = False,
    ) -> None:
        super().__init__(data_preprocessor={"type": "BaseDataPreprocessor", "non_blocking": True})
        if liger := liger and not building_on_meta():
            require_liger()
        self.freeze_llm = freeze_llm or llm_lora is not None
        self.freeze_visual_encoder = freeze_visual_encoder or visual_encoder_lora is not None
        self.use_llm_lora = llm_lora is not None
        self.use_visual_encoder_lora = visual_encoder_lora is not None
        self.visual_select_layer = visual_select_layer
        self.use_activation_checkpointing = use_activation_checkpointing
        self.loss_chunk_size = loss_chunk_size

        self.llm: Any = _build(llm)
        self.visual_encoder: Any = _build(visual_encoder)
        self.projector: Any = ProjectorModel(
            ProjectorConfig(
                visual_hidden_size=self.visual_encoder.config.hidden_size,
                llm_hidden_size=self.llm.config.hidden_size,
                depth=projector_depth,
            )
        )
        self.llm.config.use_cache = False
        install_boundary_attention(self.llm, backend=attention)
        install_loss_head(self.llm.lm_head)
        _prepare_rotary(self.llm.model.rotary_emb)
        if liger:
            install_liger(self.llm)
        if use_activation_checkpointing:
            self.llm.gradient_checkpointing_enable({"use_reentrant": use_reentrant()})
            recompute_first_layers(self.llm.model, recomputed_layers)

        self.llm.requires_grad_(not self.freeze_llm)
        self.visual_encoder.requires_grad_(not self.freeze_visual_encoder)

        # First the weights, then the adapters: a checkpoint of a stage without adapters then fits.
        adapters, source = self.start()
        for part, lora, layers in (
            ("llm", llm_lora, None),
            ("visual_encoder", visual_encoder_lora, self.vision_depth),
        ):
            if lora is not None:
                add_adapters(getattr(self, part), lora, option=f"{part}_lora", num_layers=layers)
        load_adapters(self, adapters, source=source)

    def start(self) -> tuple[Mapping[str, torch.Tensor], str]:
        """Load weights before adapters are added; return the adapters to go on with, and their source."""
        return {}, ""

    def init_weights(self) -> None:
        """Weights come from the checkpoints; mmengine must not initialise them again."""

    def parts(self) -> dict[str, Any]:
        """Return the parts by name, in the order in which an image passes them."""
        return {name: getattr(self, name) for name in ("visual_encoder", "projector", "llm")}

    @property
    def image_size(self) -> int:
        return self.visual_encoder.config.image_size

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """``[N, 3, S, S]`` -> projected patch features ``[N, P, D]``.

        Runs only the layers of the tower that the selected hidden state needs.
        """
        tower = self.visual_encoder.vision_model
        learns = torch.is_grad_enabled() and (
            self.use_visual_encoder_lora or not self.freeze_visual_encoder
        )
        recomputes = learns and self.training and self.use_activation_checkpointing
        with torch.set_grad_enabled(learns):
            hidden = tower.embeddings(pixel_values.to(self.visual_encoder.dtype))
            if hasattr(tower, "pre_layrnorm"):  # of CLIP
                hidden = tower.pre_layrnorm(hidden)
            if recomputes and not hidden.requires_grad:
                # Under adapters nothing before them learns, and re-entrant checkpointing gives no
                # gradient to a layer whose input needs none.
                hidden.requires_grad_()
            for layer in tower.encoder.layers[: self.vision_depth]:
                if recomputes:
                    hidden = checkpoint(layer, hidden, None, None, use_reentrant=use_reentrant())[0]
                else:
                    hidden = layer(hidden, None, None)[0]
        dtype = next(self.projector.parameters()).dtype
        return self.projector(hidden[:, num_class_tokens(self.visual_encoder.config) :].to(dtype))

    def embed(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor, image_positions: torch.Tensor
    ) -> torch.Tensor:
        """Token embeddings with the image features written into their places.

        Args:
            input_ids: int64 ``[1, T]``; any id at the places of image tokens.
            pixel_values: ``[N, 3, S, S]``; ``N`` may be 0.
            image_positions: int64 ``[N * P]``, places of the image tokens, in order.

        Returns:
            ``[1, T, D]``.

        Raises:
            ImageFeatureMismatch: says how many features and how many places there are. A feature is
                never dropped or repeated.
        """
        embeds = self.llm.get_input_embeddings()(input_ids.clamp(min=0))
        if pixel_values.shape[0] == 0:
            if image_positions.numel():
                raise ImageFeatureMismatch(
                    f"the batch has no image, but {image_positions.numel()} places for image tokens"
                )
            # Every rank must touch the same parameters: an image of zeros, counted zero times.
            blank = pixel_values.new_zeros((1, 3, self.image_size, self.image_size))
            return embeds + (self.encode_images(blank).to(embeds.dtype) * 0.0).sum()
        features = self.encode_images(pixel_values).flatten(0, 1)
        if features.shape[0] != image_positions.numel():
            raise ImageFeatureMismatch(
                f"{pixel_values.shape[0]} images give {features.shape[0]} image features, but the "
                f"batch has {image_positions.numel()} places for them. The dataset must be built with "
                "the same vision tower as the model (GMAI_VISION)"
            )
        flat = embeds.flatten(0, 1).index_copy(0, image_positions, features.to(embeds.dtype))
        return flat.unsqueeze(0)

    def forward(
        self, data: Mapping[str, Any], data_samples: object = None, mode: str = "loss"
    ) -> dict[str, torch.Tensor] | torch.Tensor | list[dict[str, Any]]:
        """One flat batch, as made by :func:`gmai_xtuner.data.dataset.collate_packs`.

        Args:
            data: ``input_ids`` and ``position_ids`` int64 ``[1, T]``, ``cu_seqlens`` int32 ``[S + 1]``,
                ``lengths`` (S ints), ``pixel_values`` ``[N, 3, S, S]``, ``image_positions``
                int64 ``[N * P]``, ``label_positions`` and ``label_targets`` int64 ``[M]``,
                ``label_weights`` float32 ``[M]``, and ``loss_denominator`` float (default: the sum of the
                batch's own weights).
            mode: ``loss`` -> ``{"loss": scalar to learn from, "weighted_sum": sum of weights * CE}``;
                ``tensor`` -> logits ``[1, T, V]``; ``predict`` -> for each conversation its ``id``, the
                sum of ``loss`` over its supervised tokens (CE, unweighted) and their number, ``tokens``.
        """
        hidden = self.llm.model(
            inputs_embeds=self.embed(
                data["input_ids"], data["pixel_values"], data["image_positions"]
            ),
            attention_mask=SequenceBoundaries(data["cu_seqlens"], tuple(data["lengths"])),
            position_ids=data["position_ids"],
            use_cache=False,
        ).last_hidden_state
        if mode == "loss":
            total = self.llm.lm_head(
                hidden[0, data["label_positions"]],
                data["label_targets"],
                data["label_weights"],
                self.loss_chunk_size,
            )
            denominator = data.get("loss_denominator")
            if denominator is None:
                denominator = data["label_weights"].sum()
            return {"loss": total / denominator, "weighted_sum": total.detach()}
        if mode == "tensor":
            return self.llm.lm_head(hidden)
        if mode == "predict":
            return self._losses_by_conversation(hidden, data)
        raise GMAIError(f"mode must be 'loss', 'tensor' or 'predict', got {mode!r}")

    def _losses_by_conversation(
        self, hidden: torch.Tensor, data: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        positions = data["label_positions"]
        losses = self.llm.lm_head(
            hidden[0, positions], data["label_targets"], None, self.loss_chunk_size
        )
        owner = torch.searchsorted(data["cu_seqlens"][1:].long(), positions, right=True)
        sums = losses.new_zeros(len(data["ids"]), dtype=torch.float64)
        sums.index_add_(0, owner, losses.double())
        tokens = torch.bincount(owner, minlength=len(data["ids"]))
        return [
            {"id": name, "loss": loss, "tokens": count}
            for name, loss, count in zip(data["ids"], sums.tolist(), tokens.tolist(), strict=True)
        ]

    @property
    def vision_depth(self) -> int:
        """Layers of the tower that run."""
        return range(self.visual_encoder.config.num_hidden_layers + 1)[self.visual_select_layer]


def _build(part: Mapping[str, Any] | nn.Module) -> Any:
    return part if isinstance(part, nn.Module) else BUILDER.build(part)
