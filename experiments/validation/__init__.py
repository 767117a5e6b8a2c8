"""Parts of the validation suite: faults, who must notice them, and how the outcome is told."""

from __future__ import annotations
