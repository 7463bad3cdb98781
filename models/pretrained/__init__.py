"""Published weights: folders of config.json and diffusion_pytorch_model.safetensors, read and written.

The forms are those of two classes of the diffusers library. UNet2DModel, in which the networks of Ho et al. were
published (arXiv 2006.11239: CIFAR-10 at 32x32, CelebA-HQ and LSUN bedroom, cat, church at 256x256), is our `UNet`;
AutoencoderKL, in which those of latent diffusion were (arXiv 2112.10752), is our `AutoencoderKL`. What differs:

* Their t is counted from 0, ours from 1: a loaded network has time_offset = -1, so ours(x, t) == published(x, t - 1).
* They place attention by the types of the blocks, we by resolution: level i of size n has the resolution n >> i.
* `attention_head_dim` is the width of one head, or null for one head.
* `sample_size` of an autoencoder is the size that it was trained at, and no other is refused, here as there.
* Names: the tables below. Older files call the maps of attention query, key, value and proj_attn, and may store them as
  1x1 convolutions.
"""

from models.pretrained.autoencoder import load_autoencoder, save_autoencoder
from models.pretrained.folder import CONFIG, WEIGHTS, published_name
from models.pretrained.text import load_text_encoder, save_text_encoder
from models.pretrained.tokenizer import load_tokenizer, save_tokenizer
from models.pretrained.unet import load_unet, save_unet

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "load_autoencoder",
    "load_text_encoder",
    "load_tokenizer",
    "load_unet",
    "published_name",
    "save_autoencoder",
    "save_text_encoder",
    "save_tokenizer",
    "save_unet",
]
