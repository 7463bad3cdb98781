"""Training losses."""

from einops import reduce
from torch import Tensor


def L_simple(output: Tensor, target: Tensor) -> Tensor:
    r"""Mean squared error of the network's output, in the coordinate that it is trained in; for eps

    .. math:: L_\text{simple} = E_{t, x_0, \epsilon} \left\| \epsilon -
        \epsilon_\theta(\sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon, t) \right\|^2
        \qquad \text{[DDPM (14)]}

    as a mean, not a sum, over the dimensions of x.

    Args:
        output, target: (B, *).
    Returns:
        (B,).
    """
    return reduce((target - output) ** 2, "b ... -> b", "mean")
