"""What the tests of figures share."""

from __future__ import annotations

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def assert_inside(figure: Figure) -> None:
    """Checks that nothing is cut off by the edge of the picture: its border shows the ground only."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (border == pixels[0, 0]).all()
    assert (pixels != pixels[0, 0]).any()
