"""A small network that detects which objects of a known list a picture shows, with their attributes and places."""

import math

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from models.classifier import Residual


class Reader(nn.Module):
    r"""A detector of K objects in pictures: for each a logit that it is there, and J attributes.

    The picture is folded, 2x2 pixels into one place, so that nothing of it is lost (one of odd sides is not); residual
    blocks follow at half its size and at a quarter. Each place p of the last map gets its coordinates, and outputs for
    each object an attention logit a_kp, and attributes m_kjp. The output for the picture is

    .. math:: o_{k0} = \log \sum_p e^{a_{kp}}, \qquad o_{kj} = \sum_p \frac{e^{a_{kp}}}{\sum_q e^{a_{kq}}}\, m_{kjp}
        \qquad \text{[Reader (places)]}

    so that without any sign of an object all places contribute, and otherwise the places that see it.

    Args:
        image_size: side in pixels, or (H, W).
        in_channels: channels of the pictures.
        things: K.
        facts: J, the number of attributes of an object besides its presence.
        channels: of the blocks at half the size; the others have twice as many.
        blocks: at each of the two sizes.
    Raises: ValueError for a size below 1, and for pictures of another shape.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        in_channels: int = 3,
        things: int = 32,
        facts: int = 4,
        channels: int = 32,
        blocks: int = 1,
    ):
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        sizes = (height, width, in_channels, things, facts, channels, blocks)
        if min(sizes) < 1:
            raise ValueError(
                f"H, W, in_channels, things, facts, channels and blocks are at least 1, not {sizes}; take 1 or more"
            )
        self.image_shape, self.things = (in_channels, height, width), things
        side = 2 if height % 2 == 0 and width % 2 == 0 else 1  # of a place in pixels
        self.fold = nn.PixelUnshuffle(side)
        self.stem = nn.Conv2d(in_channels * side**2, channels, 3, padding=1)
        finer = [Residual(channels, channels) for _ in range(blocks)]
        coarser = [Residual((1 if b == 0 else 2) * channels, 2 * channels) for b in range(blocks)]
        self.body = nn.Sequential(*finer, nn.MaxPool2d(2, ceil_mode=True), *coarser)
        self.says = nn.Conv2d(2 * channels + 2, things * (1 + facts), 1)
        places = math.ceil(height / side / 2) * math.ceil(width / side / 2)
        nn.init.constant_(self.says.bias[:: 1 + facts], -math.log(places * things))  # type: ignore[index]  # none is there
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster; torch leaves it untyped

    def forward(self, x: Tensor) -> Tensor:
        """Return the reading (B, K, 1 + J) of pictures (B, C, H, W) in [-1, 1]: first the logit of presence."""
        if x.shape[1:] != self.image_shape:
            raise ValueError(f"this reader takes pictures of shape {self.image_shape}, not {tuple(x.shape[1:])}")
        seen = self.body(self.stem(self.fold(x)))
        output = self.says(torch.cat([seen, _places(seen)], 1))
        output = rearrange(output, "b (k j) h w -> b k j (h w)", k=self.things)
        a, m = output[:, :, 0], output[:, :, 1:]
        o_0 = a.logsumexp(-1, keepdim=True)  # (B, K, 1)
        o_j = (a.softmax(-1)[:, :, None] * m).sum(-1)  # (B, K, J)
        return torch.cat([o_0, o_j], 2)


def _places(x: Tensor) -> Tensor:
    """Return two channels (B, 2, H, W) for x: how far to the right and downwards each place is, in -1..1."""
    across, down = (torch.linspace(-1, 1, n, dtype=x.dtype, device=x.device) for n in (x.shape[3], x.shape[2]))
    return torch.stack(
        [repeat(across, "w -> b h w", b=len(x), h=len(down)), repeat(down, "h -> b h w", b=len(x), w=len(across))], 1
    )
