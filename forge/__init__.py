"""GGUF models as checked 4 KiB pages, and back, bit for bit."""

from __future__ import annotations
