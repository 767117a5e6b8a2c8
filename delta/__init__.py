"""Page-level patches between two versions of a model."""

from __future__ import annotations
