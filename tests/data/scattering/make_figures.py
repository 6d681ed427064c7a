"""Writes figures.json beside this file: features of made-up images by kymatio, for ``test_scattering``.

Kymatio 0.3.0 asks for ``scipy.special.sph_harm``, which scipy 1.15 has deprecated and 1.17 no longer has, so it has an
environment of its own (made on 2026-12-01 with torch 2.13.0 and scipy 1.14.1):

    python -m venv kymatio-env
    kymatio-env/bin/pip install "kymatio==0.3.0" "scipy<1.15" numpy torch
    kymatio-env/bin/python tests/data/scattering/make_figures.py
"""

import json
from pathlib import Path

import torch
from kymatio.torch import Scattering2D

CASES = [
    {"shape": [8, 8], "scales": 2, "angles": 8, "places": [[0, 0], [0, 1], [1, 0], [1, 1]]},
    {"shape": [28, 28], "scales": 2, "angles": 8, "places": [[0, 0], [3, 4]]},
    {"shape": [28, 36], "scales": 3, "angles": 6, "places": [[0, 0], [1, 2]]},
]


def made_up(height: int, width: int) -> torch.Tensor:
    """Pixels in 0..1: a ramp with stripes."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return ((3 * y + 5 * x) % 11 / 10 + y / height) / 2


figures = []
for case in CASES:
    transform = Scattering2D(case["scales"], case["shape"], L=case["angles"])
    found = transform(made_up(*case["shape"])[None])[0]
    values = [[round(float(v), 6) for v in found[:, row, column]] for row, column in case["places"]]
    figures.append({**case, "values": values})
Path(__file__).with_name("figures.json").write_text(json.dumps(figures))
