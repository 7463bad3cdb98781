"""The commands: each takes a composed configuration; `ddpm.cli` turns their outcomes into exit codes."""
