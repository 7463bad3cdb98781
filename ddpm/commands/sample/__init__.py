"""`ddpm-sample` and `ddpm-edit`: samples and edited images."""
