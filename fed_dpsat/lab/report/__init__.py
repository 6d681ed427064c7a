"""Figures, pages and tables from run folders."""
