"""What looks at runs, or plays against them: audits, attacks, reports, sweeps, sharpness, loggers and the live view."""
