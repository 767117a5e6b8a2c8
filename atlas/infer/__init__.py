"""Inference on cached pages: llama-architecture models, tokenizers, sampling."""

from __future__ import annotations
