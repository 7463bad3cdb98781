"""`ddpm-study`: plans, reports and searches."""
