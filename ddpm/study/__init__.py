"""Analysis of sweeps: arms, their differences with intervals and tests, and a report on one page."""
