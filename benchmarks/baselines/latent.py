"""DiT, which SiT shares, and the autoencoder's decoder that turns its latents into pixels, from diffusers.

Sources: DiT (arXiv 2212.09748), SiT (arXiv 2401.08740), the Stable Diffusion VAE (arXiv 2112.10752).
"""

from __future__ import annotations

from diffusers import AutoencoderKL, DiTTransformer2DModel
from torch import Tensor, nn


class DiT(nn.Module):
    """Latents x [B, 4, H, H], time t [B], class y [B] to [B, 8, H, H] (mean and variance), patches of 2 x 2.

    diffusers gives every block a time and class embedding of its own; the model has one, so all blocks hold
    the first one's here. It is still evaluated once a block: 0.2% of XL's FLOPs, as diffusers does it.
    """

    def __init__(self, depth: int, heads: int, head: int, size: int = 32) -> None:
        super().__init__()
        self.dit = DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=head,
            in_channels=4,
            out_channels=8,
            num_layers=depth,
            sample_size=size,
            patch_size=2,
            num_embeds_ada_norm=1000,
        )
        first = self.dit.transformer_blocks[0].norm1.emb
        for block in self.dit.transformer_blocks:
            block.norm1.emb = first

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.dit(x, t, y).sample


class VAEDecoder(nn.Module):
    """Latents [B, 4, H, H] to images [B, 3, 8H, 8H]; the time and class that every network takes are unused."""

    def __init__(self) -> None:
        super().__init__()
        whole = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[128, 256, 512, 512],
            layers_per_block=2,
            latent_channels=4,
        )
        self.first, self.decoder = whole.post_quant_conv, whole.decoder

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.decoder(self.first(x))
