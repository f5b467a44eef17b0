"""How commands print sizes."""

from __future__ import annotations


def bytes_text(size: int) -> str:
    """35840 as 35 KiB."""
    return f"{size / 1024:.0f} KiB" if size >= 1024 else f"{size} B"
