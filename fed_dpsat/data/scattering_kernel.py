"""The inner loop of the scattering transform in C: eight wavelets at a time, each in its own lane of a vector register.

It is an extra: without a C compiler ``scattering`` takes torch's transforms, which need several times as long; the
numbers are the same up to rounding.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import subprocess

import numpy as np
import torch
from torch import Tensor

from fed_dpsat.step.gradients.compiled import built

log = logging.getLogger("fed_dpsat")

LANES = 8
SOURCE = r"""
#include <math.h>
#include <stddef.h>

typedef ptrdiff_t Size;
typedef float Lanes __attribute__((vector_size(32)));

/* Inverse transform of n complex numbers, stride apart. Those at b and n - b share a cosine and, negated, a sine. */
static void inverse(Lanes *re, Lanes *im, Size n, Size stride, const float *table, Lanes *room) {
    Size half = (n - 1) / 2;
    Lanes *sum_re = room, *sum_im = room + n, *dif_re = room + 2 * n, *dif_im = room + 3 * n;
    Lanes zero_re = re[0], zero_im = im[0];
    for (Size b = 1; b <= half; b++) {
        Lanes ar = re[b * stride], ai = im[b * stride], br = re[(n - b) * stride], bi = im[(n - b) * stride];
        sum_re[b] = ar + br, sum_im[b] = ai + bi, dif_re[b] = ar - br, dif_im[b] = ai - bi;
    }
    Lanes middle_re = zero_re - zero_re, middle_im = middle_re;
    if (n % 2 == 0) middle_re = re[n / 2 * stride], middle_im = im[n / 2 * stride];
    for (Size x = 0; x <= n / 2; x++) {
        const float *at = table + x * 2 * n;
        Lanes even_re, even_im, odd_re = zero_re - zero_re, odd_im = odd_re;
        if (x % 2) even_re = zero_re - middle_re, even_im = zero_im - middle_im;
        else even_re = zero_re + middle_re, even_im = zero_im + middle_im;
        for (Size b = 1; b <= half; b++) {
            float c = at[2 * b], s = at[2 * b + 1];
            even_re += c * sum_re[b], even_im += c * sum_im[b], odd_re += s * dif_re[b], odd_im += s * dif_im[b];
        }
        re[x * stride] = even_re - odd_im, im[x * stride] = even_im + odd_re;
        if (x && 2 * x != n) re[(n - x) * stride] = even_re + odd_im, im[(n - x) * stride] = even_im - odd_re;
    }
}

/* spectra[count][M][N / 2 + 1][2], the half of real images, and filters[groups][M][N][8]
   -> moduli[count][angles][m][n] unless NULL, smooth[count][angles][h][w] */
void wavelet_moduli(const float *spectra, const float *filters, const float *table_m, const float *table_n,
                    const float *low_m, const float *low_n, float *moduli, float *smooth, float *room,
                    Size count, Size angles, Size m, Size n, Size step, Size h, Size w) {
    Size high = m * step, wide = n * step, half = wide / 2 + 1, all = high * wide;
    Lanes *re = (Lanes *)room, *im = re + m * n, *part = im + m * n, *lines = part + h * n;
    for (Size k = 0; k < count; k++)
        for (Size first = 0; first < angles; first += 8) {
            const float *spectrum = spectra + k * high * half * 2;
            const Lanes *filter = (const Lanes *)(filters + first * all);
            for (Size a = 0; a < m; a++)
                for (Size b = 0; b < n; b++) {
                    Lanes r = filter[0] - filter[0], i = r;
                    for (Size p = a; p < high; p += m)
                        for (Size q = b; q < wide; q += n) {
                            Lanes f = filter[p * wide + q];
                            Size mirrored = q >= half, row = mirrored ? (high - p) % high : p;
                            const float *at = spectrum + 2 * (row * half + (mirrored ? wide - q : q));
                            r += f * at[0], i += f * (mirrored ? -at[1] : at[1]);
                        }
                    re[a * n + b] = r, im[a * n + b] = i;
                }
            for (Size a = 0; a < m; a++) inverse(re + a * n, im + a * n, n, 1, table_n, lines);
            for (Size b = 0; b < n; b++) inverse(re + b, im + b, m, n, table_m, lines);
            for (Size i = 0; i < m * n; i++) {
                Lanes square = re[i] * re[i] + im[i] * im[i];
                for (int lane = 0; lane < 8; lane++) re[i][lane] = sqrtf(square[lane]);
            }
            for (Size r = 0; r < h; r++)
                for (Size b = 0; b < n; b++) {
                    Lanes sum = low_m[r * m] * re[b];
                    for (Size a = 1; a < m; a++) sum += low_m[r * m + a] * re[a * n + b];
                    part[r * n + b] = sum;
                }
            for (Size r = 0; r < h; r++)
                for (Size c = 0; c < w; c++) {
                    Lanes sum = low_n[c * n] * part[r * n];
                    for (Size b = 1; b < n; b++) sum += low_n[c * n + b] * part[r * n + b];
                    for (Size lane = 0; lane < 8 && first + lane < angles; lane++)
                        smooth[((k * angles + first + lane) * h + r) * w + c] = sum[lane];
                }
            if (moduli)
                for (Size lane = 0; lane < 8 && first + lane < angles; lane++)
                    for (Size i = 0; i < m * n; i++)
                        moduli[(k * angles + first + lane) * m * n + i] = re[i][lane];
        }
}
"""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled loop; None, with a line in the log, if there is no compiler for it."""
    try:
        found = built(SOURCE)
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        log.warning("no compiled scattering transform, so it takes several times as long: %s", error)
        return None
    found.wavelet_moduli.argtypes = [ctypes.c_void_p] * 9 + [ctypes.c_ssize_t] * 7
    found.wavelet_moduli.restype = None
    return found


@functools.cache
def table(n: int) -> Tensor:
    """``[n // 2 + 1, n, 2]``: cosine and sine of 2 pi x b / n, by x and b."""
    angle = 2 * np.pi / n * np.outer(np.arange(n // 2 + 1), np.arange(n))
    return torch.from_numpy(np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32)).contiguous()


def in_lanes(filters: Tensor) -> Tensor:
    """``[groups, M, N, 8]`` of ``filters[angles, M, N]``; the last group is filled with zeros."""
    angles = len(filters)
    filled = torch.cat([filters, filters.new_zeros(-angles % LANES, *filters.shape[1:])])
    return filled.view(-1, LANES, *filters.shape[1:]).permute(0, 2, 3, 1).contiguous()


def wavelet_moduli(
    spectra: Tensor, filters: Tensor, low: tuple[Tensor, Tensor], angles: int, step: int, *, smooth_only: bool
) -> tuple[Tensor | None, Tensor]:
    """Moduli ``[K, angles, m, n]``, unless ``smooth_only``, and ``[K, angles, h, w]``, of real images.

    ``spectra[K, M, N / 2 + 1]`` is ``rfft2`` of the images, ``filters`` are ``in_lanes``, divided by M and N, and
    ``low`` are matrices ``[h, m]`` and ``[w, n]``.
    """
    found = library()
    assert found is not None
    spectra = spectra.contiguous()
    (h, m), (w, n) = (matrix.shape for matrix in low)
    moduli = None if smooth_only else torch.empty(len(spectra), angles, m, n)
    smooth = torch.empty(len(spectra), angles, h, w)
    room = torch.empty(2 * m * n + h * n + 4 * max(m, n), LANES)
    tensors = (spectra, filters, table(m), table(n), *low, moduli, smooth, room)
    pointers = [None if t is None else t.data_ptr() for t in tensors]
    found.wavelet_moduli(*pointers, len(spectra), angles, m, n, step, h, w)
    return moduli, smooth
