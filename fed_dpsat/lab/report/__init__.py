"""Run folders to figures, pages and tables: what privacy cost, and what it bought."""
