"""The GMAI-VL model: CLIP vision tower, MLP projector, InternLM2.5 as Llama.

Shapes: ``N`` images, ``P`` patch tokens of an image (576 at 336 px and patch 14), ``C`` width of the
vision tower, ``T`` tokens of the flat batch, ``M`` learnt tokens, ``D`` width of the language model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.logging import print_log
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import nn
from xtuner.model.modules import ProjectorConfig, ProjectorModel
from xtuner.registry import BUILDER

from gmai_xtuner.errors import GMAIError
from gmai_xtuner.models.attention import SequenceBoundaries, install_boundary_attention
from gmai_xtuner.models.checkpoints import load_checkpoint_state, load_parts
from gmai_xtuner.models.export import save_xtuner_layout
from gmai_xtuner.models.loss import install_loss_head
from gmai_xtuner.models.recompute import recompute, use_reentrant


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


@MODELS.register_module()
@BUILDER.register_module()
class GMAILLaVAModel(BaseModel):
    """Vision tower (layer -2, patch tokens) -> linear, GELU, linear -> language model.

    Paper: section "GMAI-VL: A General Medical Vision-Language Model" and Table 8 (which parts learn).

    Args:
        llm: config of ``gmai_xtuner.models.load_language_model`` (or a module).
        visual_encoder: config of ``gmai_xtuner.models.load_vision_tower`` (or a module).
        freeze_llm: keep the language model as it is (stages 1 and 2).
        freeze_visual_encoder: keep the vision tower as it is (stage 1).
        visual_select_layer: hidden state of the tower that is used; -2 is the one before the last.
        projector_depth: linear layers of the projector.
        pretrained_pth: file, DeepSpeed directory or work dir of the stage before.
        pretrained_parts: parts that ``pretrained_pth`` must contain; a checkpoint of an earlier stage
            than the one meant is refused.
        use_activation_checkpointing: recompute activations in the backward pass.
        attention: ``auto``, ``varlen``, ``sdpa_loop`` or ``block_mask``, see
            :mod:`gmai_xtuner.models.attention`.
        loss_chunk_size: tokens for which logits exist at a time.

    Raises:
        ModelLoadError: a checkpoint does not fit; names the keys.
        GMAIError: isolation of the conversations of a pack can't be had.
    """

    def __init__(
        self,
        llm: Mapping[str, Any] | nn.Module,
        visual_encoder: Mapping[str, Any] | nn.Module,
        *,
        freeze_llm: bool = False,
        freeze_visual_encoder: bool = False,
        visual_select_layer: int = -2,
        projector_depth: int = 2,
        pretrained_pth: str | None = None,
        pretrained_parts: Sequence[str] = ("projector",),
        use_activation_checkpointing: bool = True,
        attention: str = "auto",
        loss_chunk_size: int = 2048,
    ) -> None:
        super().__init__(data_preprocessor={"type": "BaseDataPreprocessor", "non_blocking": True})
        self.freeze_llm = freeze_llm
        self.freeze_visual_encoder = freeze_visual_encoder
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
        if use_activation_checkpointing:
            self.llm.gradient_checkpointing_enable({"use_reentrant": use_reentrant()})

        self.llm.requires_grad_(not freeze_llm)
        self.visual_encoder.requires_grad_(not freeze_visual_encoder)

        if pretrained_pth is not None:
            parts = load_parts(
                self,
                load_checkpoint_state(pretrained_pth),
                required=pretrained_parts,
                source=str(pretrained_pth),
            )
            print_log(
                f"Loaded {', '.join(parts)} from {pretrained_pth}",
                logger="current",
                level=logging.INFO,
            )

    def init_weights(self) -> None:
        """Weights come from the checkpoints; mmengine must not initialise them again."""

    @property
    def image_size(self) -> int:
        return self.visual_encoder.config.image_size

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """``[N, 3, S, S]`` -> projected patch features ``[N, P, D]``.

        Runs only the layers of the tower that the selected hidden state needs.
        """
        tower = self.visual_encoder.vision_model
        depth = range(self.visual_encoder.config.num_hidden_layers + 1)[self.visual_select_layer]
        learns = torch.is_grad_enabled() and not self.freeze_visual_encoder
        with torch.set_grad_enabled(learns):
            hidden = tower.pre_layrnorm(tower.embeddings(pixel_values.to(self._vision_dtype)))
            for layer in tower.encoder.layers[:depth]:
                if learns and self.training and self.use_activation_checkpointing:
                    hidden = recompute(layer, hidden, None, None)[0]
                else:
                    hidden = layer(hidden, None, None)[0]
        return self.projector(hidden[:, 1:].to(self._projector_dtype))

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        image_positions: torch.Tensor,
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
    ) -> dict[str, torch.Tensor] | torch.Tensor:
        """One flat batch, as made by :func:`gmai_xtuner.datasets.collate.collate_packs`.

        Args:
            data: ``input_ids`` and ``position_ids`` int64 ``[1, T]``, ``cu_seqlens`` int32 ``[S + 1]``,
                ``lengths`` (S ints), ``pixel_values`` ``[N, 3, S, S]``, ``image_positions``
                int64 ``[N * P]``, ``label_positions`` and ``label_targets`` int64 ``[M]``,
                ``label_weights`` float32 ``[M]``, ``loss_denominator`` float.
            mode: ``loss`` -> ``{"loss": scalar to learn from, "weighted_sum": sum of weights * CE}``;
                ``tensor`` -> logits ``[1, T, V]``.
        """
        hidden = self._hidden_states(data)
        if mode == "loss":
            total = self.llm.lm_head(
                hidden[0, data["label_positions"]],
                data["label_targets"],
                data["label_weights"],
                self.loss_chunk_size,
            )
            return {"loss": total / data["loss_denominator"], "weighted_sum": total.detach()}
        if mode == "tensor":
            return self.llm.lm_head(hidden)
        raise GMAIError(f"mode must be 'loss' or 'tensor', got {mode!r}")

    def _hidden_states(self, data: Mapping[str, Any]) -> torch.Tensor:
        embeds = self.embed(data["input_ids"], data["pixel_values"], data["image_positions"])
        return self.llm.model(
            inputs_embeds=embeds,
            attention_mask=SequenceBoundaries(data["cu_seqlens"], tuple(data["lengths"])),
            position_ids=data["position_ids"],
            use_cache=False,
        ).last_hidden_state

    @property
    def _vision_dtype(self) -> torch.dtype:
        return self.visual_encoder.dtype

    @property
    def _projector_dtype(self) -> torch.dtype:
        return next(self.projector.parameters()).dtype

    def to_hf(
        self,
        cfg: ConfigDict,
        save_dir: str,
        fp32: bool = False,
        save_pretrained_kwargs: Mapping[str, Any] | None = None,
        save_format: str = "xtuner",
    ) -> None:
        """What ``xtuner convert pth_to_hf`` calls. See :mod:`gmai_xtuner.models.export`."""
        if save_format != "xtuner":
            raise GMAIError(f"--save-format {save_format} is not supported; use xtuner")
        save_xtuner_layout(
            self, cfg, save_dir, fp32=fp32, save_kwargs=dict(save_pretrained_kwargs or {})
        )


def _build(part: Mapping[str, Any] | nn.Module) -> Any:
    return part if isinstance(part, nn.Module) else BUILDER.build(part)
