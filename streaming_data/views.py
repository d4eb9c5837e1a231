"""How the vision tower sees a picture: the whole of it, and with AnyRes its tiles, too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Views:
    image_size: int = 384  # pixels a view, each way
    patch_size: int = 14
    anyres: bool = False

    @property
    def side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def features(self) -> int:
        """Of one view."""
        return self.side**2
