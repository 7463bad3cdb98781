"""`ddpm-sample` and `ddpm-edit`: what is drawn."""
