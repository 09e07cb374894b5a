"""The columns of `thinwire top`. Imports nothing heavy: the command line lists them."""

import enum


class Column(enum.StrEnum):
    """What layers are sorted by."""

    LAYER = "layer"
    CODEC = "codec"
    ELEMENTS = "elements"
    RATIO = "ratio"
    BYTES = "bytes"
    RESIDUAL = "residual"
    RMS = "rms"
