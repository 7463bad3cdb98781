"""Image editing by diffusion: image to image, inpainting, inverse problems, redrawing."""

from ddpm.editing.img2img import img2img
from ddpm.editing.inpaint import inpaint, mask_of_latents
from ddpm.editing.inverse import Blur, Inpainting, Operator, SuperResolution, dps, pigdm
from ddpm.editing.invert import redraw

__all__ = [
    "Blur",
    "Inpainting",
    "Operator",
    "SuperResolution",
    "dps",
    "img2img",
    "inpaint",
    "mask_of_latents",
    "pigdm",
    "redraw",
]
