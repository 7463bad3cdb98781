"""Published weights: folders of config.json and diffusion_pytorch_model.safetensors, read and written.

The forms are those of three classes of the diffusers library. UNet2DModel, in which the networks of Ho et al. were
published (arXiv 2006.11239: CIFAR-10 at 32x32, CelebA-HQ and LSUN bedroom, cat, church at 256x256), and later those of
Dhariwal and Nichol (arXiv 2105.05233), and UNet2DConditionModel, in which those of latent diffusion that are told a
text were, are our `UNet`; AutoencoderKL, in which the autoencoders of latent diffusion were (arXiv 2112.10752), is our
`AutoencoderKL`. The text half of CLIP has its own form, that of the transformers library: see text.py and tokenizer.py.
What differs:

* Their t is counted from 0, ours from 1: a loaded network has time_offset = -1, so ours(x, t) == published(x, t - 1).
* They place attention by the types of the blocks, we by resolution: level i of size n has the resolution n >> i.
* `attention_head_dim` of a UNet2DModel is the width of one head, or null for one head; that of a UNet2DConditionModel
  is the number of heads, one or one a level.
* `sample_size` of an autoencoder, and of a UNet2DConditionModel, is the size that it was trained at, and no other is
  refused, here as there.
* A UNet2DConditionModel with more channels in than out is given the others beside x_t: here they are the image of its
  condition, which is concatenated after x_t, in the published order (for inpainting: mask, then masked latents).
* Names: the tables in folder.py. Older files call the maps of attention query, key, value and proj_attn, and may store
  them as 1x1 convolutions.
"""

from models.pretrained.autoencoder import load_autoencoder, save_autoencoder
from models.pretrained.folder import CONFIG, published_name
from models.pretrained.lora import load_lora, save_lora, with_lora
from models.pretrained.pipeline import load_pipeline
from models.pretrained.text import load_text_encoder, save_text_encoder
from models.pretrained.tokenizer import load_tokenizer, save_tokenizer
from models.pretrained.unet import load_unet, save_unet
from models.pretrained.weights import WEIGHTS

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "load_autoencoder",
    "load_lora",
    "load_pipeline",
    "load_text_encoder",
    "load_tokenizer",
    "load_unet",
    "published_name",
    "save_autoencoder",
    "save_lora",
    "save_text_encoder",
    "save_tokenizer",
    "save_unet",
    "with_lora",
]
