"""The commands: each takes a composed configuration; `ddpm.cli` makes exit codes of how they end."""
