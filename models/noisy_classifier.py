"""A classifier of noisy images: the encoder half of the U-Net."""

from collections.abc import Sequence

from einops import reduce
from torch import Tensor, nn

from models.layers import group_norm, normed
from models.unet import UNet


class NoisyClassifier(nn.Module):
    """A classifier of x_t and t: a U-Net's encoder and middle, averaged over the image, and a linear layer.

    Args:
        image_size, in_channels, channels, channel_mults, blocks, attention_resolutions, heads, head_channels, dropout,
            groups, patch: as in `models.unet.UNet`.
        num_classes: K.
    Attributes:
        takes: nothing, as it predicts the class.
    Raises:
        ValueError: as the U-Net, and for num_classes below 2.
    Source: Diffusion Models Beat GANs on Image Synthesis (arXiv 2105.05233), section 4.
    """

    takes = ()

    def __init__(
        self,
        image_size: int | Sequence[int],
        in_channels: int = 3,
        num_classes: int = 10,
        channels: int = 32,
        channel_mults: Sequence[int] | None = (1, 2),
        blocks: int | Sequence[int] = 1,
        attention_resolutions: Sequence[int] | None = (),
        heads: int | None = 1,
        head_channels: int | None = None,
        dropout: float = 0.1,
        groups: int = 8,
        patch: int = 1,
    ):
        super().__init__()
        if type(num_classes) is not int or num_classes < 2:
            raise ValueError(f"num_classes = {num_classes!r} must be an integer >= 2")
        self.encoder = UNet(
            image_size,
            in_channels,
            channels=channels,
            channel_mults=channel_mults,
            blocks=blocks,
            attention_resolutions=attention_resolutions,
            heads=heads,
            head_channels=head_channels,
            dropout=dropout,
            groups=groups,
            patch=patch,
        )
        deepest = self.encoder.middle_2.conv_2.out_channels
        del self.encoder.up, self.encoder.norm_out, self.encoder.conv_out  # the way up
        self.shape, self.num_classes = self.encoder.shape, num_classes
        self.norm_out = group_norm(deepest, groups, 1e-6)
        self.head = nn.Linear(deepest, num_classes)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return logits (B, K).

        Args:
            x_t: (B, in_channels, H, W).
            t: (B,), integer or real, in 0..T.
        """
        h, _, _ = self.encoder.encode(x_t, t)
        return self.head(reduce(normed(self.norm_out, h, silu=True), "b c h w -> b c", "mean"))
