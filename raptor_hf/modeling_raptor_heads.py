"""Raptors with heads: classification, segmentation, depth, and a backbone for dense models.

Shapes: B images, N tokens (cls, registers, patches), D channels, L layers, h×w patches of an image.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import (
    BackboneOutput,
    DepthEstimatorOutput,
    ImageClassifierOutput,
    SemanticSegmenterOutput,
)
from transformers.utils import can_return_tuple

from .configuration_raptor import RaptorConfig, token_layout
from .modeling_raptor import RaptorModel, RaptorPreTrainedModel, pair, patch_grid

IGNORE_INDEX = 255  # label of pixels that the loss of segmentation leaves out


def pool_tokens(last_hidden_state: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """Return DINOv2's image feature: [cls, mean of patches], (B, N, D) to (B, 2·D).

    Of a family without a cls token it is the mean of the patches alone, (B, D).
    """
    layout = token_layout(config)
    patches = last_hidden_state[:, layout.groups()["patches"]].mean(dim=1)
    if layout.num_cls == 0:
        return patches
    return torch.cat([last_hidden_state[:, 0], patches], dim=-1)


class RaptorForImageClassification(RaptorPreTrainedModel):
    """A Raptor with DINOv2's classification head: [cls, mean of patches] to one linear layer."""

    def __init__(self, config: RaptorConfig):
        super().__init__(config)
        self.raptor = RaptorModel(config)
        num_parts = 1 + (token_layout(config).num_cls > 0)
        self.classifier = nn.Linear(num_parts * config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        **options,
    ) -> ImageClassifierOutput:
        """Return images (B, C, H, W) to `logits` (B, labels); `labels` (B,) give `loss`.

        Args:
            options: of `RaptorModel.forward`, as in all heads.
        """
        outputs = self.raptor(pixel_values, **options)
        logits = self.classifier(pool_tokens(outputs.last_hidden_state, self.config))
        # transformers' own, by `config.problem_type`
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class PatchFrame(NamedTuple):
    """How images of one size lie on the patch grid: padded evenly on all sides to whole patches.

    480×640 pixels at patch 14 become 490×644 with 5 more rows above and below, 2 more columns left
    and right, and a grid of 35×46; where the padding is odd, right and bottom get one pixel more.
    """

    padded: tuple[int, int]  # pixels, height and width
    padding: tuple[int, int, int, int]  # pixels: left, right, top, bottom
    grid: tuple[int, int]  # patches, height and width

    @classmethod
    def of(cls, size: tuple[int, int], config: PreTrainedConfig) -> "PatchFrame":
        """Return the frame of images of `size` = (height, width) pixels."""
        patch = pair(config.patch_size)
        rows, columns = -size[0] % patch[0], -size[1] % patch[1]  # to be added
        padded = (size[0] + rows, size[1] + columns)
        padding = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        return cls(padded, padding, patch_grid(padded, config))

    def pad(self, maps: torch.Tensor) -> torch.Tensor:
        """Pad maps (…, H, W) of an image's pixels with zeros."""
        return nn.functional.pad(maps, self.padding)

    def interpolate(self, maps: torch.Tensor) -> torch.Tensor:
        """Interpolate maps (B, C, h, w) to the pixels of the image, without its padding."""
        maps = resize_maps(maps, self.padded)
        left, right, top, bottom = self.padding
        return maps[..., top : self.padded[0] - bottom, left : self.padded[1] - right]


def resize_maps(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Interpolate maps (B, C, h, w) bilinearly to (B, C, H, W)."""
    return nn.functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def drop_registers(states: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """Return cls and the patches, for dense heads: (B, N, D) to (B, 1 + h·w, D).

    Of a family without a cls token it is the patches alone.
    """
    layout = token_layout(config)
    patches = states[:, layout.groups()["patches"]]
    if layout.num_cls == 0:
        return patches
    return torch.cat([states[:, :1], patches], dim=1)


def segmentation_logits(
    classifier: nn.Linear, tokens: torch.Tensor, grid: tuple[int, int]
) -> torch.Tensor:
    """Apply a linear layer to every patch: (B, 1 + h·w, D) to logits (B, labels, h, w)."""
    patches = tokens[:, -grid[0] * grid[1] :]
    return classifier(patches).transpose(1, 2).unflatten(2, grid)


def depth_logits(
    classifier: nn.Linear, tokens: torch.Tensor, grid: tuple[int, int]
) -> torch.Tensor:
    """Apply a linear layer to [patch, cls]: (B, 1 + h·w, D) to logits (B, bins, 4·h, 4·w).

    DINOv2 upsamples the 2·D features and then applies the layer. Bilinear weights sum to one, so
    the layer can come first, on a sixteenth of the positions, with the same result.
    """
    cls, patches = tokens[:, :1], tokens[:, 1:]
    logits = classifier(torch.cat([patches, cls.expand_as(patches)], dim=-1))
    logits = logits.transpose(1, 2).unflatten(2, grid)
    return resize_maps(logits, (4 * grid[0], 4 * grid[1]))


def expected_depth(
    logits: torch.Tensor, frame: PatchFrame, *, min_depth: float, max_depth: float
) -> torch.Tensor:
    """Return the bins' centres averaged by the softmax: (B, bins, h, w) to metres (B, H, W)."""
    edges = torch.linspace(
        min_depth, max_depth, logits.shape[1] + 1, dtype=logits.dtype, device=logits.device
    )
    centres = (edges[:-1] + edges[1:]) / 2
    depth = torch.einsum("bkhw,k->bhw", logits.softmax(dim=1), centres)
    return frame.interpolate(depth[:, None])[:, 0]


def depth_loss(
    logits: torch.Tensor,
    predicted_depth: torch.Tensor,
    target: torch.Tensor,
    frame: PatchFrame,
    *,
    min_depth: float,
    max_depth: float,
) -> torch.Tensor:
    """Return 10 × scale-invariant log loss (λ = 0.85) + cross-entropy, over valid pixels.

    With d = log(prediction + 1 mm) − log(target + 1 mm): mean(d²) − 0.85·mean(d)². A pixel is valid
    if its depth lies in [min_depth, max_depth]; the others count in neither part. Without one the
    loss is 0.

    Args:
        logits: (B, bins, h, w) over the padded images.
        predicted_depth, target: (B, H, W) in metres.
    """
    bins, target = logits.shape[1], target.to(predicted_depth.dtype)  # labels may be integers
    valid = (target >= min_depth) & (target <= max_depth)
    if not valid.any():
        return 0.0 * (predicted_depth.sum() + logits.sum())

    # scale-invariant log loss, over pixels
    difference = torch.log(predicted_depth[valid] + 1e-3) - torch.log(target[valid] + 1e-3)
    scale_invariant = difference.square().mean() - 0.85 * difference.mean().square()

    # cross-entropy of the bins; the padding has depth 0, which is unknown
    padded = frame.pad(target)[:, None]
    coarse = nn.functional.interpolate(padded, size=logits.shape[-2:], mode="nearest")[:, 0]
    labels = ((coarse - min_depth) / (max_depth - min_depth) * bins).long().clamp(0, bins - 1)
    counted = (coarse >= min_depth) & (coarse <= max_depth)
    labels = labels.masked_fill(~counted, -100)
    cross_entropy = nn.functional.cross_entropy(logits, labels, reduction="sum")
    return 10 * scale_invariant + cross_entropy / counted.sum().clamp(min=1)


def segmentation_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of logits (B, labels, H, W) for labels (B, H, W).

    `IGNORE_INDEX` is not counted; the loss is 0 where no pixel has a label. A ValueError refuses a
    single label, of which every pixel would be.
    """
    if logits.shape[1] < 2:
        raise ValueError("Segmentation learns from two labels or more; num_labels is 1.")
    total = nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (labels != IGNORE_INDEX).sum().clamp(min=1)


class RaptorForSemanticSegmentation(RaptorPreTrainedModel):
    """A Raptor with a linear layer on every patch token after the final norm."""

    def __init__(self, config: RaptorConfig):
        super().__init__(config)
        self.raptor = RaptorModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        **options,
    ) -> SemanticSegmenterOutput:
        """Return images (B, C, H, W) of any size to the logits of every patch.

        Args:
            labels: classes (B, H, W); 255 (`IGNORE_INDEX`) is not counted. They give `loss`.

        Returns:
            `logits` (B, labels, h, w) on the patch grid, to be interpolated bilinearly; where the
            image had to be padded to whole patches they have its own size (B, labels, H, W),
            without the padding.
        """
        frame = PatchFrame.of(pixel_values.shape[-2:], self.config)
        outputs = self.raptor(frame.pad(pixel_values), **options)
        tokens = drop_registers(outputs.last_hidden_state, self.config)
        logits = segmentation_logits(self.classifier, tokens, frame.grid)
        # the loss counts the pixels of the image, without its padding
        loss = None
        if labels is not None:
            loss = segmentation_loss(frame.interpolate(logits), labels)
        if any(frame.padding):
            logits = frame.interpolate(logits)
        return SemanticSegmenterOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class RaptorForDepthEstimation(RaptorPreTrainedModel):
    """A Raptor with DINOv2's depth head: [patch, cls] to a linear layer on bins of depth."""

    def __init__(self, config: RaptorConfig):
        super().__init__(config)
        if not token_layout(config).num_cls:
            raise ValueError(
                "DINOv2's depth head looks at [patch, cls], and a "
                f"{config.teacher_config.model_type!r} has no cls token."
            )
        self.raptor = RaptorModel(config)
        self.classifier = nn.Linear(2 * config.hidden_size, config.depth_bins)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        **options,
    ) -> DepthEstimatorOutput:
        """Return images (B, C, H, W) of any size to `predicted_depth` (B, H, W) in metres.

        Args:
            labels: depth (B, H, W) in metres, 0 where it is unknown; gives `loss` (`depth_loss`).
        """
        frame = PatchFrame.of(pixel_values.shape[-2:], self.config)
        limits = {"min_depth": self.config.min_depth, "max_depth": self.config.max_depth}
        outputs = self.raptor(frame.pad(pixel_values), **options)
        tokens = drop_registers(outputs.last_hidden_state, self.config)
        # bins of depth, and their mean in metres
        logits = depth_logits(self.classifier, tokens, frame.grid)
        depth = expected_depth(logits, frame, **limits)
        loss = None if labels is None else depth_loss(logits, depth, labels, frame, **limits)
        return DepthEstimatorOutput(
            loss=loss,
            predicted_depth=depth,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class RaptorBackbone(BackboneMixin, RaptorPreTrainedModel):
    """A Raptor whose states are feature maps for a dense model: UperNet, DPT, Mask2Former, ….

    `out_features` ("stem", "stage1", … "stageL") or `out_indices` (0 … L) say after which layers,
    as in `Dinov2WithRegistersBackbone`.
    """

    _keys_to_ignore_on_load_unexpected = [r"^classifier\."]

    def __init__(self, config: RaptorConfig):
        super().__init__(config)
        self.raptor = RaptorModel(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        interpolate_pos_encoding: bool = True,
    ) -> BackboneOutput:
        """Return images (B, C, H, W) to `feature_maps`, one for each of `out_features`.

        With `config.apply_layernorm` they are after the final norm. With
        `config.reshape_hidden_states` they are (B, D, h, w) on the patch grid; else cls and then
        the patches (B, 1 + h·w, D), without registers: models that take tokens drop the cls only.
        """
        # states: those that are asked for, and those of the maps
        wanted = self.wanted_states(output_hidden_states)
        outputs = self.raptor(pixel_values, [*wanted, *self.out_indices], output_attentions)
        hidden_states = None
        if wanted:
            states = enumerate(outputs.hidden_states)
            hidden_states = tuple(state if layer in wanted else None for layer, state in states)

        # maps
        grid = patch_grid(tuple(pixel_values.shape[-2:]), self.config)
        feature_maps = []
        for index in self.out_indices:
            states = outputs.hidden_states[index]
            if self.config.apply_layernorm:
                states = self.raptor.norm(states)
            tokens = drop_registers(states, self.config)
            if self.config.reshape_hidden_states:
                patches = tokens[:, -grid[0] * grid[1] :]
                tokens = patches.transpose(1, 2).unflatten(2, grid).contiguous()
            feature_maps.append(tokens)
        return BackboneOutput(
            feature_maps=tuple(feature_maps),
            hidden_states=hidden_states,
            attentions=outputs.attentions,
        )


AUTO_CLASSES = {
    "AutoModel": RaptorModel,
    "AutoModelForImageClassification": RaptorForImageClassification,
    "AutoModelForSemanticSegmentation": RaptorForSemanticSegmentation,
    "AutoModelForDepthEstimation": RaptorForDepthEstimation,
    "AutoBackbone": RaptorBackbone,
}
for auto_class, model_class in AUTO_CLASSES.items():
    model_class.register_for_auto_class(auto_class)  # its code is saved with it
