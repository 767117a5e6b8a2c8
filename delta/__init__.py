"""Page-level patches between two versions of a model (to come)."""

from __future__ import annotations
