"""Operations on cached pages: a scalar body, a CUDA kernel, a CPU loop and a launcher each."""

from __future__ import annotations
