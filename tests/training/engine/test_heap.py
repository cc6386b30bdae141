"""Freed memory of a process that trains on the CPU."""

from __future__ import annotations
