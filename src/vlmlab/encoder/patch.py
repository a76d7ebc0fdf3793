"""``patch``: raw patches of pixels, without any tower (Fuyu-8B; transformers' ``FuyuForCausalLM``)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmlab.contracts.errors import UserError
from vlmlab.contracts.parts import Encoder
from vlmlab.contracts.tensors import Visual
from vlmlab.contracts.values import Pixels, Size, Width
from vlmlab.encoder.preprocess import Preprocess


class PatchEncoder(Encoder):
    """Patches in raster order, each the p x p x 3 values of its pixels, from -1 to 1.

    In Fuyu one linear layer takes a patch to the LM's width: that is ``connector=linear``, so that by default this
    encoder has no weights at all. With `features` it has a linear layer of its own, which is what a connector that
    expects narrow features, or ``encoder=multi`` beside another tower, wants.

    Args:
        image_size: pixels that every image is brought to: one number for a square, or rows and columns.
        patch_size: pixels per side of a patch (30 in Fuyu).
        features: width of the linear layer; null leaves the raw p * p * 3 values.
        newline: a learned feature after every row of patches, which the grid counts as one more column (Fuyu's
            newline token): it tells where a row ends, since no patch knows its position.
        pooled: there is nothing to pool; refused.

    Raises:
        UserError: the image does not divide into patches, or a pooled output is asked for.
    """

    has_tower = False
    one_tower = False

    def __init__(
        self,
        image_size: Size = 64,
        patch_size: Pixels = 16,
        features: Width | None = None,
        newline: bool = False,
        pooled: bool = False,
    ) -> None:
        super().__init__()
        if pooled:
            raise UserError("encoder=patch has no pooled output; use encoder=hf or scratch for contrastive training.")
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % patch_size or width % patch_size:
            shown = f"encoder.image_size=[{height},{width}]"
            raise UserError(f"{shown} is not a multiple of encoder.patch_size={patch_size}; make both sides one.")
        self.source: str | None = None
        self.preprocess = Preprocess(height, width)
        self.patch = patch_size
        raw = 3 * patch_size * patch_size
        self.width = raw if features is None else features
        self.pooled_width = self.width
        # a sequence, so that an adapter can wrap the layer inside
        self.tower = nn.Sequential(*([] if features is None else [nn.Linear(raw, features)]))
        self.newline = nn.Parameter(torch.randn(self.width) * 0.5) if newline else None  # spread as pixels are

    @property
    def hw(self) -> tuple[int, int]:
        """Rows and columns of the feature grid of one image, newlines included."""
        columns = self.preprocess.width // self.patch
        return self.preprocess.height // self.patch, columns + (self.newline is not None)

    def forward(self, pixels: Tensor) -> Visual:
        """(I, 3, H, W) uint8 -> Visual with one (I, N, Dv) grid."""
        images, (rows, columns), side = pixels.shape[0], self.hw, self.patch
        values = pixels.float() / 127.5 - 1.0  # (I, 3, H, W)
        patches = values.unfold(2, side, side).unfold(3, side, side)  # (I, 3, rows, columns, p, p)
        raw = patches.permute(0, 2, 3, 4, 5, 1).flatten(3)  # (I, rows, columns, p * p * 3), channels last as in Fuyu
        grid = self.tower(raw)  # (I, rows, columns, Dv)
        if self.newline is not None:
            ends = self.newline.expand(images, rows, 1, -1).to(grid.dtype)
            grid = torch.cat([grid, ends], 2)  # (I, rows, columns + 1, Dv)
        hw = torch.tensor([[rows, columns]], device=pixels.device).expand(images, 2)
        return Visual(grids=[grid.flatten(1, 2)], pooled=None, hw=hw)

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """The linear layer and the newline, where there are any."""
        return list(self.named_parameters())
