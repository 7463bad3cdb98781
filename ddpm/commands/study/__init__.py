"""`ddpm-study`: plans, reports, searches."""
