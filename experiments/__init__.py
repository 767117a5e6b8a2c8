"""Scripts that measure and plot; nothing imports them."""

from __future__ import annotations
